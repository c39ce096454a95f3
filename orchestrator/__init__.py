"""What runs, in what order, and what came of it."""
