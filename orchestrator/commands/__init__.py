"""The commands of `orch`, one subject a file. Heavy imports stay inside the functions: `orch --help` is quick."""
