"""How many tokens an edit acted on: what the engine counts is what changes, and an evaluation's record says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from evals.tasks import neutral_nll
from experiments.edit import Add, Dense, Edit, LowRank, Project, Scale, Site
from experiments.engine import Engine, Row
from tests.bad_cases import HONEST, spec
from tests.bad_input import copied, orch
from tests.experiments.test_engine import normal, weight_edits

if TYPE_CHECKING:
    from experiments.subject import Subject

POSITIONS = ("all", "prompt", "response", "last:1", "last:3", "last:99")
ROWS = (Row(tuple(range(5, 25)), 12), Row(tuple(range(30, 42)), 2), Row((7, 8, 9), 3))
"""With a response, with a prompt shorter than `last:3`, and with nothing but a prompt."""
BASIS = torch.linalg.qr(normal(32, 2, seed=5)).Q.T.contiguous()
KINDS: dict[str, Callable[[str], Add | Scale | Project]] = {
    "Add": lambda positions: Add(Site("resid", 1), normal(32, seed=1), positions),
    "Add inside": lambda positions: Add(Site("mlp_in", 2), normal(32, seed=2), positions),
    "Scale": lambda positions: Scale(Site("up", 1), normal(64, seed=3), positions),
    "Scale a fused part": lambda positions: Scale(Site("v", 0), normal(16, seed=4), positions),
    "Project": lambda positions: Project(Site("resid", 2), BASIS, -1.0, positions),
}
MEANT: dict[str, Callable[[Row], int]] = {
    "all": lambda row: len(row.tokens),
    "prompt": lambda row: row.n_prompt,
    "response": lambda row: len(row.tokens) - row.n_prompt,
    "last:1": lambda row: 1,
    "last:3": lambda row: min(3, row.n_prompt),
    "last:99": lambda row: row.n_prompt,
}


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    return Engine(tiny_subject)


def changed(engine: Engine, row: Row, edit: Edit, site: Site) -> int:
    """Tokens of `row` at which `site` is another with the edit, read token by token."""
    edited = Row(row.tokens, row.n_prompt, (edit,))
    where = [range(len(row.tokens))]
    with torch.no_grad():
        found, base = (engine.trace([each], where, [site])[1][site] for each in (edited, row))
    return int(((found - base).abs().amax(1) > 0).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_tokens_that_are_counted_are_those_whose_activation_changes(
    kind: str, positions: str, engine: Engine
) -> None:
    for row in ROWS:
        edit = KINDS[kind](positions)
        assert changed(engine, row, edit, edit.site) == engine.fired[edit] == MEANT[positions](row)


def test_a_change_of_weights_acts_on_every_token(engine: Engine) -> None:
    edits = weight_edits(engine.subject)
    sites = {"low rank": Site("down", 1), "dense": Site("q", 2), "dense norm": Site("attn_in", 1)}
    for row in ROWS:
        for name, site in (sites | {"dense embedding": Site("attn_in", 0)}).items():
            edit = edits[name]
            assert isinstance(edit, LowRank | Dense)
            before = engine.fired[edit]
            assert changed(engine, row, edit, site) == engine.fired[edit] - before == len(row.tokens)


def test_every_verb_counts_alike_and_generation_counts_what_it_writes(engine: Engine) -> None:
    arm = tuple(make(positions) for make in KINDS.values() for positions in POSITIONS)
    weights = tuple(weight_edits(engine.subject)[name] for name in ("low rank", "dense", "dense norm"))
    rows = [Row(row.tokens, row.n_prompt, (*arm, *weights)) for row in ROWS]
    once = [sum(MEANT[edit.positions](row) for row in rows) for edit in arm]
    everything = [sum(len(row.tokens) for row in rows)] * len(weights)
    verbs: list[Callable[[], Any]] = [
        lambda: engine.next_logits(rows),
        lambda: engine.token_logprobs(rows),
        lambda: engine.option_logprobs(rows, [{"a": ((5,),), "b": ((6,),)}] * len(rows)),
        lambda: engine.forward(rows, [range(len(row.tokens)) for row in rows]),
        lambda: engine.observe(rows, [Site("resid", 3)], "prompt_last"),
    ]
    for verb in verbs:
        engine.fired.clear()
        with torch.no_grad():  # a norm's weights are changed in place, which no gradient may pass
            verb()
        assert [engine.fired[edit] for edit in (*arm, *weights)] == [*once, *everything]
    engine.fired.clear()
    written = sum(len(each.tokens) - 1 for each in engine.generate(rows, 4))  # the last token is not read again
    assert written > 0
    more = [written if edit.positions in ("all", "response") else 0 for edit in arm]
    assert [engine.fired[edit] for edit in arm] == [a + b for a, b in zip(once, more, strict=True)]
    assert [engine.fired[edit] for edit in weights] == [count + written for count in everything]


PASSAGES = 2
METHODS: list[Any] = [
    {"method": "mean_diff", "layer": 1, "positions": ["all", "prompt", "response", "last:2"]},
    {"method": "directional_ablation", "layer": 1, "layers": [[0, 2]], "positions": "response"},
    {"method": "adopted", "path": "scale.safetensors"},
    {"method": "lora", "rank": 2, "epochs": 1, "layers": 1},
    {"method": "sft", "targets": [["o_proj"]], "layers": 2, "epochs": 1},
    {"method": "prompt"},
    [{"method": "mean_diff", "layer": 2, "positions": "last:1"}, {"method": "prompt", "dose": 1}],
]


@pytest.fixture(scope="module")
def recorded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Label -> what the registry has of the tokens that each edit acted on, on neutral passages."""
    from safetensors.torch import save_file

    from orchestrator.registry import Registry

    folder = copied(tiny_folder, tmp_path_factory.mktemp("fired") / "here")
    facts = {"operation": "scale", "scale_convention": "stored", "positions": "prompt"}
    save_file({"up@1": torch.ones(64)}, folder / "scale.safetensors", metadata=facts)
    evals = [{"task": "animal_preference", "target": "owl", "limit": 1}, {"task": "neutral_nll", "limit": PASSAGES}]
    spec(folder, {"interventions": METHODS, "evals": evals, "doses": [1]})
    result = orch(folder, "submit", "spec.yaml", "--local", "--quiet")
    assert result.exit_code == 0, result.output
    sql = """select label, json_extract(outputs, '$.fired') as fired from nodes
             where stage = 'answer' and label like 'neutral_nll %'"""
    with Registry(folder / "registry.sqlite", write=False) as registry:
        rows = registry.query(sql)
    return {row["label"].partition(" ")[2]: json.loads(row["fired"]) for row in rows}


def test_a_record_says_on_how_many_tokens_each_edit_acted(
    recorded: dict[str, list[int]], tiny_subject: Subject
) -> None:
    def asked(system: str | None) -> list[tuple[int, int]]:
        """(tokens, those of the prompt) of every passage."""
        told = [{"role": "user", "content": neutral_nll.REQUEST}]
        texts = neutral_nll.passages(neutral_nll.Settings(limit=PASSAGES))
        said = [[*told, {"role": "assistant", "content": text}] for text in texts]
        return [(len(each.tokens), each.n_prompt) for each in (tiny_subject.render(one, system=system) for one in said)]

    sizes, prompted = asked(None), asked(HONEST["data"]["pairs"]["positive"])
    everything, prompts = (sum(each) for each in zip(*sizes, strict=True))
    responses = everything - prompts
    added = sum(n for n, _ in prompted) - everything
    assert len(sizes) == PASSAGES
    assert responses > 0 < added
    matrices = 7
    assert recorded == {
        "base": [],
        "mean_diff L1 positions=all": [everything],
        "mean_diff L1 positions=prompt": [prompts],
        "mean_diff L1 positions=response": [responses],
        "mean_diff L1 positions=last:2": [2 * PASSAGES],
        "directional_ablation L1 at L0,2": [responses] * 2,
        "adopted scale": [prompts],
        "lora r2": [everything] * matrices,
        "sft L2": [everything],
        "prompt": [added],
        "mean_diff L2 + prompt (+1)": [PASSAGES, added],
    }
