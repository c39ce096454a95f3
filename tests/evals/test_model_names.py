"""Names of models: refused where inspect would, before anybody is asked, and no more is imported than that takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi

from evals.model_names import fault


@modelapi(name="ofapackage")
class OfAPackage(ModelAPI):
    """What a package that is installed adds."""

    async def generate(self, input: object, tools: object, tool_choice: object, config: object) -> ModelOutput:
        raise AssertionError("nobody asks it")


@pytest.mark.parametrize(
    "name",
    ["openai/gpt-4.1-mini", "openai-api/local/judge", "vllm/org/name", "hf/a/b", "mockllm/x", "ofapackage/x", "orch/k"],
)
def test_a_provider_that_inspect_has_or_a_package_adds_is_known(name: str) -> None:
    assert fault(name) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opnai/gpt-4.1-mini", "(did you mean 'openai/gpt-4.1-mini'?)"),
        ("antropic/a/b", "(did you mean 'anthropic/a/b'?)"),
        ("OpenAI/gpt", "(did you mean 'openai/gpt'?)"),
        ("zzzz/gpt", "which inspect does not know; allowed: anthropic, "),
        ("/gpt", "has the provider ''"),
    ],
)
def test_a_provider_that_is_refused_is_one_that_inspect_refuses(name: str, said: str) -> None:
    assert said in (fault(name) or "")
    assert ", ofapackage, " in (fault(name) or "")
    with pytest.raises(ValueError, match=f"Model API {name.partition('/')[0]} of model .* not recognized"):
        get_model(name, config=GenerateConfig())


def test_a_name_without_a_provider_is_told_how_to_write_one() -> None:
    assert (fault("gpt-4.1") or "").startswith("has no provider; write it as inspect does (openai/gpt-4.1); allowed: ")
    with pytest.raises(ValueError, match="should be in the format of <api_name>/<model_name>"):
        get_model("gpt-4.1")


def test_inspect_is_imported_for_judges_that_are_not_resident_and_torch_for_none() -> None:
    code = """
import sys
from orchestrator.bench import strangers
assert list(strangers(("embedded", "subject"))) == []
assert "inspect_ai" not in sys.modules
assert list(strangers(("openai/gpt-4.1",))) == [] and [name for name, _ in strangers(("x/y",))] == ["x/y"]
assert "inspect_ai" in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
