"""Why a model behind an API gave no reply, in words: what judges and teachers that fail have in common."""

from __future__ import annotations

from tenacity import RetryError

SHOWN = 400


def trouble(error: Exception, timeout: int, attempt_timeout: int | None, hint: str = "") -> str:
    """What follows a model's name: `is down (status 500), after 2 retries: InternalServerError: ...`.

    The limits are those it was asked with, in seconds; `hint` is told of a request that was refused as such.
    """
    cause: BaseException = error
    tried = ""
    if isinstance(error, RetryError):
        cause = error.last_attempt.exception() or error
        tried = f", after {error.last_attempt.attempt_number - 1} retries"
    said = " ".join(f"{type(cause).__name__}: {cause}".split())[-SHOWN:]
    status = getattr(cause, "status_code", None)
    kind = type(cause).__name__
    if status == 429:
        what = "refused: its quota or rate limit is used up"
    elif status in (401, 403):
        what = "refused: the key is missing, wrong or not allowed to use this model"
    elif status == 400 and hint:
        what = f"refused the request ({hint})"
    elif "Timeout" in kind:
        what = f"gave no reply in time (timeout {timeout} s, attempt_timeout {attempt_timeout} s)"
    elif "Connection" in kind:
        what = "cannot be reached"
    elif status is not None and status >= 500:
        what = f"is down (status {status})"
    else:
        what = "did not answer"
    return f"{what}{tried}: {said}"
