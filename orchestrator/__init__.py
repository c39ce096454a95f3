"""What runs, in what order, and what came of it."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before ray is imported: half of its own entry points leave it off
