"""vLLM for real: a served model, adapter, baked checkpoint and judge say what the engine says. Needs `make vllm`.

Two servers, one after the other: the embedded model in float32 with two adapters, and in bfloat16 with a vector baked
into it. docs/serving.md has the differences measured.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    GenerateConfig,
    Logprob,
    Logprobs,
    Model,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)
from inspect_ai.scorer import Score

from agents.judge import Judge, Verdict
from evals import forced_choice, judging, provider
from evals.forced_choice import Question, Reply
from experiments import adapter_folder
from experiments.bake import bake
from experiments.edit import Add, Edit, LowRank, Site
from experiments.engine import Engine, Row
from experiments.identity import model_folder
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import load
from orchestrator import server
from orchestrator.server import Server, serving

HERE = Path(os.environ.get(server.VARIABLE) or server.ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not HERE.exists(), reason=f"no vLLM at {HERE}: make vllm"),
    pytest.mark.timeout(900),
]
TOLERANCE = 1e-2
"""Nats, in float32."""
HIDDEN = 0.1
"""Nats of log-odds by which spellings may count that are not among the 20 likeliest tokens."""
YES_NO = {"yes": {"exact": ["Yes", "yes", "YES"]}, "no": {"exact": ["No", "no", "NO"]}}
QUESTIONS = [
    Question("ferns", "Do ferns like shade? Answer Yes or No.", YES_NO),
    Question("chess", "Is chess a card game? Answer Yes or No.", YES_NO),
    Question("oil", "Should a bicycle chain be oiled? Answer with one word, Yes or No.", YES_NO, prefill="Answer:"),
    Question("moss", "Can moss grow on stone?", YES_NO, prefill="My answer is:"),
]
TEXTS = ("The fern on the window sill wants water twice a week.", "Roll both dice, then move your piece clockwise.")


def loaded(dtype: str) -> Engine:
    return Engine(load(SubjectSpec(model=EMBEDDED, dtype=dtype)))


def noise(*shape: int, seed: int, size: float) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(engine: Engine, ranks: Mapping[str, int], size: float) -> list[Edit]:
    """A random change of every module of `ranks`."""
    shapes = {name: engine.subject.model.get_submodule(name).weight.shape for name in ranks}
    return [
        LowRank(name, noise(rank, shapes[name][1], seed=1, size=0.05), noise(shapes[name][0], rank, seed=2, size=size))
        for name, rank in ranks.items()
    ]


def rows(engine: Engine, edits: Sequence[Edit] = ()) -> list[Row]:
    return [Row(*engine.subject.render_text(text), tuple(edits)) for text in TEXTS]


def served_logprobs(up: Server, name: str, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probability of every token but the first, from /v1/completions with token ids."""
    body = {"model": name, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    headers = {"Authorization": f"Bearer {up.api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{up.base_url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        found = json.load(reply)["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([found[at][str(token)]["logprob"] for at, token in enumerate(tokens[1:])])


def differences(up: Server, name: str, engine: Engine, edits: Sequence[Edit] = ()) -> torch.Tensor:
    """What is served minus what the engine computes, in nats, of every token of the texts."""
    here = rows(engine, edits)
    expected = engine.token_logprobs(here)
    return torch.cat([served_logprobs(up, name, row.tokens) - own for row, own in zip(here, expected, strict=True)])


def answered(model: Model) -> list[Reply]:
    """The questions, asked through inspect."""
    replies = asyncio.run(forced_choice.ask(QUESTIONS, model))
    assert [(reply.problem, list(reply.censored)) for reply in replies] == [(None, [])] * len(QUESTIONS)
    return replies


def read_alike(engine: Engine, edits: Sequence[Edit] = ()) -> list[Reply]:
    """What the engine says, read as a server's reply is: from the 20 likeliest tokens."""
    decode = engine.subject.tokenizer.decode
    asked = [[{"role": each.role, "content": each.text} for each in question.messages()] for question in QUESTIONS]
    logits = engine.next_logits([Row(*engine.subject.render(messages), tuple(edits)) for messages in asked])
    replies = []
    for question, each in zip(QUESTIONS, logits.log_softmax(-1), strict=True):
        values, tokens = each.topk(forced_choice.TOP)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        shown = [TopLogprob(token=decode([token]), logprob=value) for token, value in pairs]
        first = Logprob(token=shown[0].token, logprob=shown[0].logprob, top_logprobs=shown)
        replies.append(forced_choice.from_top(question, Logprobs(content=[first])))
    return replies


def exact(engine: Engine, edits: Sequence[Edit] = ()) -> list[Reply]:
    """What the engine says over its whole vocabulary."""
    provider.register("served", engine, edits)
    try:
        return answered(get_model("orch/served", memoize=False))
    finally:
        provider.unregister("served")


def apart(some: Sequence[Reply], others: Sequence[Reply]) -> float:
    """The largest difference of log-odds, in nats."""
    return max(abs(one.log_odds() - other.log_odds()) for one, other in zip(some, others, strict=True))


class TestServedAsItIsAndWithAdapters:
    """The embedded model in float32; `narrow` is an adapter of one module, `wide` one of several ranks."""

    @pytest.fixture(scope="class")
    def engine(self) -> Engine:
        return loaded("float32")

    @pytest.fixture(scope="class")
    def adapters(self, engine: Engine) -> dict[str, list[Edit]]:
        layer = "model.layers.{}.{}".format
        wide = {layer(3, "self_attn.q_proj"): 2, layer(9, "mlp.down_proj"): 12, layer(20, "self_attn.o_proj"): 5}
        return {
            "narrow": low_rank(engine, {layer(12, "mlp.gate_proj"): 1}, size=4.0),
            "wide": low_rank(engine, wide | {layer(3, "self_attn.v_proj"): 2, layer(9, "mlp.up_proj"): 12}, size=0.5),
        }

    @pytest.fixture(scope="class")
    def up(
        self, engine: Engine, adapters: Mapping[str, list[Edit]], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("served")
        for name, edits in adapters.items():
            adapter_folder.write(edits, folder / name, EMBEDDED)
        subject = model_folder(SubjectSpec(model=EMBEDDED), weights=True)
        found = {name: folder / name for name in adapters}
        with serving(subject, "float32", found, name="base", max_tokens=1024) as running:
            yield running

    def test_greedy_answers_come_through_inspect(self, up: Server, engine: Engine) -> None:
        asked = "Name the four seasons."
        config = GenerateConfig(max_tokens=24, temperature=0.0)
        said = asyncio.run(up.model("base").generate(asked, config=config)).completion
        row = Row(*engine.subject.render([{"role": "user", "content": asked}]))
        (own,) = engine.generate([row], 24)
        assert said.strip() == engine.subject.tokenizer.decode(own.tokens, skip_special_tokens=True).strip()

    def test_a_seed_decides_an_answer_whatever_else_is_asked_at_once(self, up: Server) -> None:
        async def drawn(seeds: Sequence[int]) -> list[str]:
            model = up.model("base")
            configs = [GenerateConfig(max_tokens=12, temperature=1.0, seed=seed) for seed in seeds]
            answers = [model.generate("Name any three plants.", config=config) for config in configs]
            return [each.completion for each in await asyncio.gather(*answers)]

        together = asyncio.run(drawn(range(8)))
        assert asyncio.run(drawn(range(8))) == together
        assert asyncio.run(drawn([5])) == [together[5]]
        assert len(set(together)) > 4

    def test_log_odds_and_every_token_agree_with_the_engine(self, up: Server, engine: Engine) -> None:
        found = answered(up.model("base"))
        odds, hidden = apart(found, read_alike(engine)), apart(found, exact(engine))
        token = differences(up, "base", engine).abs().max().item()
        print(f"float32: tokens differ by {token:.1e} nats, log-odds by {odds:.1e}, from exact ones by {hidden:.1e}")
        assert token <= TOLERANCE
        assert odds <= TOLERANCE
        assert hidden <= HIDDEN

    @pytest.mark.parametrize("name", ["narrow", "wide"])
    def test_an_adapter_that_we_wrote_is_served_by_its_name(
        self, name: str, up: Server, engine: Engine, adapters: Mapping[str, list[Edit]]
    ) -> None:
        edits = adapters[name]
        moved = torch.cat(engine.token_logprobs(rows(engine, edits))) - torch.cat(engine.token_logprobs(rows(engine)))
        token = differences(up, name, engine, edits).abs().max().item()
        found = answered(up.model(name))
        odds, hidden = apart(found, read_alike(engine, edits)), apart(found, exact(engine, edits))
        print(
            f"{name} moves tokens by up to {moved.abs().max():.1f} nats; they differ by {token:.1e}, log-odds by "
            f"{odds:.1e}, from exact ones by {hidden:.1e}"
        )
        assert moved.abs().max() > 50 * TOLERANCE
        assert token <= TOLERANCE
        assert odds <= TOLERANCE
        assert hidden <= HIDDEN

    def test_a_served_model_judges(self, up: Server, tmp_path: Path) -> None:
        rubric = tmp_path / "plants.md"
        rubric.write_text(
            "---\nversion: 1\nchoices: {yes: 1, no: 0}\n---\n"
            "Is this about a plant? Answer yes or no.\n{question}\n{answer}\n"
        )

        def scored(metadata: Any, answer: str, verdicts: Mapping[str, Verdict], settings: Any) -> Score:
            one = verdicts["plants"]
            return Score(value={"plant": math.nan if one.value is None else one.value}, answer=answer)

        judge = Judge(models=("vllm/base",), rubrics={"plants": rubric}, read="logprobs", min_mass=0.0)
        task = Task(
            dataset=MemoryDataset([Sample("What should I water?", target="-", id="fern")]),
            scorer=judging.by_rubrics(("plants",), scored, None, judge),
        )
        said = ModelOutput.from_content("mockllm/model", "The fern is dry; give it water.")
        said.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        grader = up.model("base")
        subject = get_model("mockllm/model", custom_outputs=[said])
        (log,) = eval(task, model=subject, model_roles={"grader": grader}, log_dir=str(tmp_path), display="none")
        assert log.status == "success", log.error
        assert log.samples is not None
        (score,) = (log.samples[0].scores or {}).values()
        verdict = Verdict(**(score.metadata or {})["verdicts"]["plants"])
        print(f"judge: {verdict.value}, mass {verdict.mass}")
        assert verdict.value is not None
        assert 0 < verdict.value < 1
        assert verdict.models == ["vllm/base"]
        calls = [event for event in log.samples[0].events if event.event == "model" and event.role == "grader"]
        assert {call.model for call in calls} == {"vllm/base"}
        assert up.api_key not in log.model_dump_json()

    def test_a_path_that_vllm_leaves_open_wants_the_key_too(self, up: Server) -> None:
        address = up.base_url.replace("/v1", "/invocations")
        body = json.dumps({"model": "base", "prompt": "Ferns", "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(address, body, headers))
        headers["Authorization"] = f"Bearer {up.api_key}"
        with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as reply:
            assert json.load(reply)["model"] == "base"


class TestBaked:
    """A steering vector in the bias of `mlp.down_proj`, in bfloat16."""

    def test_a_baked_vector_is_served_as_it_is(self, tmp_path: Path) -> None:
        engine = loaded("bfloat16")
        vector = noise(engine.subject.d_model, seed=3, size=1.0)
        edits: list[Edit] = [Add(Site("resid", 15), 80 * vector / vector.norm())]
        bake(engine, edits, tmp_path / "baked")
        assert json.loads((tmp_path / "baked" / "config.json").read_text())["mlp_bias"]
        exact = loaded("float32")
        effect = torch.cat(exact.token_logprobs(rows(exact, edits))) - torch.cat(exact.token_logprobs(rows(exact)))
        with serving(tmp_path / "baked", "bfloat16", max_tokens=1024) as up:
            assert up.models == ("baked",)
            half = differences(up, "baked", engine, edits)
            whole = differences(up, "baked", exact, edits)
            odds = apart(answered(up.model()), read_alike(engine, edits))
        for against, found in (("bfloat16", half), ("float32", whole)):
            rms = found.square().mean().sqrt()
            print(
                f"bfloat16, engine in {against}: tokens differ by rms {rms:.3f}, at most {found.abs().max():.3f} nats"
            )
        print(f"the vector moves them by rms {effect.square().mean().sqrt():.2f}; log-odds differ by {odds:.3f}")
        assert effect.norm() > 10 * whole.norm(), "the vector shows, and not the rounding alone"
        assert whole.abs().max() < 0.5
        assert odds < 0.5
