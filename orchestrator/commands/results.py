"""`orch leaderboard`, `orch report`, `orch registry`: what came of experiments."""

from __future__ import annotations

COMMANDS = ()
