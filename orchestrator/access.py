"""The token that every client of a Ray cluster must show: who reaches a cluster without one can run anything on it."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def token_path() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def secure_token() -> None:
    """Make sure that there is a token, and that nobody else on this machine can read it (Ray leaves it open to all).

    Does nothing where the user has chosen otherwise by RAY_AUTH_MODE or RAY_AUTH_TOKEN.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # a submit beside this one was quicker
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o600)
