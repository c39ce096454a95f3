"""One file each; the file name is the id."""
