"""What inspect finds through the `inspect_ai` entry point. Torch stays out until a model is asked for."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="orch")
def orch() -> type[ModelAPI]:
    """The provider of `orch/<key>`: a resident engine with an arm's edits applied."""
    from evals.provider import OrchAPI

    return OrchAPI
