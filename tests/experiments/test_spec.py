"""A spec in, trials out; and for everything wrong with it, the line and what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from experiments import intervention, spec
from experiments.grid import labels
from experiments.intervention import DoseKind, Intervention
from experiments.problem import SpecError
from experiments.schema import schema
from experiments.source import parse

BASE: dict[str, Any] = {
    "name": "owl",
    "subject": "smollm2-135m-instruct",
    "data": {"pairs": {"recipe": "persona_pairs", "positive": "You love owls.", "negative": "You love cats.", "n": 8}},
    "interventions": [{"method": "mean_diff", "layer": [10, 14, 18]}, {"method": "lora", "rank": 8}],
    "doses": [-2, -1, 1, 2],
    "evals": [{"task": "animal_preference", "target": "owl"}, {"task": "daily_dilemmas", "limit": 60}],
    "seeds": [0, 1, 2],
}


def read(**changes: Any) -> spec.Experiment:
    """BASE with top-level fields changed; None takes one out. Through YAML, as users do."""
    data = copy.deepcopy(BASE) | changes
    data = {name: value for name, value in data.items() if value is not None}
    return spec.from_source(parse(yaml.safe_dump(data, sort_keys=False), "s.yaml"))


def refused(**changes: Any) -> str:
    with pytest.raises(SpecError) as error:
        read(**changes)
    return str(error.value)


def test_a_list_is_a_grid_axis_and_every_combination_with_every_seed_is_a_trial() -> None:
    grid = {"method": "mean_diff", "layer": [10, 14], "tokens": ["last", "response_mean"]}
    trials = read(interventions=[grid], baselines=[]).trials()
    found = [(t.intervention.layer, t.intervention.tokens, t.seed) for t in trials]  # type: ignore[attr-defined]
    assert found == [
        (layer, tokens, seed) for layer in (10, 14) for tokens in ("last", "response_mean") for seed in range(3)
    ]
    assert [trial.index for trial in trials] == list(range(12))


def test_a_nested_list_is_a_list_value() -> None:
    trials = read(interventions=[{"method": "bias_set", "layers": [[1, 2], [3]]}], baselines=[], seeds=[0]).trials()
    assert [trial.intervention.layers for trial in trials] == [(1, 2), (3,)]  # type: ignore[attr-defined]


def test_a_group_is_shared_by_seeds_alone() -> None:
    trials = read().trials()
    groups: dict[str, set[int]] = {}
    for trial in trials:
        groups.setdefault(trial.group, set()).add(trial.seed)
    assert len(groups) == 6  # three vectors, lora, random, prompt
    assert all(seeds == {0, 1, 2} for seeds in groups.values())


def test_a_group_changes_with_subject_data_and_setting_and_with_nothing_else() -> None:
    def first(**changes: Any) -> str:
        return read(**changes).trials()[0].group

    pairs = BASE["data"]["pairs"]
    same = first()
    assert first(name="other", doses=[1], seeds=[5], evals=[{"task": "x"}], resources={"gpu": 1}) == same
    assert first(subject={"model": "smollm2-135m-instruct", "system": "Hi."}) != same
    assert first(data={"pairs": pairs | {"n": 9}}) != same
    assert first(interventions=[{"method": "mean_diff", "layer": 11}]) != same


def test_labels_are_different_for_different_settings() -> None:
    named = {trial.group: trial.label for trial in read(interventions=[{"method": "lora", "alpha": [8, 16]}]).trials()}
    assert len(set(named.values())) == len(named)
    assert "lora r8 alpha=8.0" in named.values()
    assert labels([("a", {}), ("a", {}), ("b", {})]) == ["a #1", "a #2", "b"]


def test_a_grid_over_data_makes_a_trial_for_each_variant_and_labels_it() -> None:
    pairs = BASE["data"]["pairs"] | {"n": [8, 16]}
    trials = read(data={"pairs": pairs}, interventions=[{"method": "mean_diff", "layer": 3}], seeds=[0]).trials()
    sizes = [(trial.label, trial.data[0].recipe.n) for trial in trials[:2]]  # type: ignore[attr-defined]
    assert sizes == [("mean_diff L3 n=8", 8), ("mean_diff L3 n=16", 16)]


def test_baselines_are_added_where_the_vectors_are_in_the_middle() -> None:
    entries = [{"method": "mean_diff", "layer": [10, 14, 18], "site": "attn_out", "tokens": "last"}, {"method": "lora"}]
    trials = read(interventions=entries, seeds=[0]).trials()
    random, prompt = trials[-2:]
    assert [trial.baseline for trial in trials] == [False] * 4 + [True] * 2
    assert (random.intervention.layer, random.intervention.site, random.intervention.tokens) == (14, "attn_out", "last")  # type: ignore
    assert prompt.label == "prompt"


def test_random_without_any_vector_takes_its_own_default() -> None:
    random = read(interventions=[{"method": "lora"}], seeds=[0]).trials()[1]
    assert random.intervention == intervention.method("random")()


def test_a_baseline_that_is_listed_is_not_added_again() -> None:
    trials = read(interventions=[{"method": "random", "layer": 3}, {"method": "lora"}], seeds=[0]).trials()
    assert [(t.label, t.baseline) for t in trials] == [("random L3", True), ("lora r8", False), ("prompt", True)]


def test_no_baselines_is_a_choice_that_warns() -> None:
    experiment = read(baselines=[])
    assert not any(trial.baseline for trial in experiment.trials())
    assert any("no random baseline" in warning for warning in experiment.warnings())


def test_a_baseline_whose_data_is_missing_is_left_out_with_a_warning() -> None:
    data = {"conversations": {"recipe": "persona_conversations", "system": "You love owls."}}
    experiment = read(data=data, interventions=[{"method": "lora"}])
    assert {trial.label for trial in experiment.trials()} == {"lora r8"}
    assert any("baseline random is left out: random needs data.pairs" in warning for warning in experiment.warnings())


def fake(kind: DoseKind) -> type[Intervention]:
    class Fake(Intervention):
        needs: ClassVar[tuple[Any, ...]] = ()
        dose_kind: ClassVar[DoseKind] = kind

    return Fake


@pytest.mark.parametrize(
    ("kind", "doses"),
    [
        ("signed_linear", (-2.0, -1.0, 1.0, 2.0)),
        ("signed", (-2.0, -1.0, 1.0, 2.0)),
        ("one_sided", (1.0, 2.0)),
        ("on_off", (-1.0, 1.0)),
    ],
)
def test_doses_are_those_that_mean_something_for_the_method(
    kind: DoseKind, doses: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervention, "method", lambda name: fake(kind))
    trials = read(interventions=[{"method": "lora"}], baselines=[], data=None).trials()
    assert {trial.doses for trial in trials} == {doses}
    assert {trial.data for trial in trials} == {()}


def test_a_method_left_without_a_dose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervention, "method", lambda name: fake("one_sided"))
    assert "positive doses only; got [-1.0]" in refused(doses=[-1], interventions=[{"method": "lora"}], baselines=[])


def test_doses_without_their_opposite_warn_that_the_odd_part_is_lost() -> None:
    assert not any("odd part" in warning for warning in read().warnings())
    warned = [warning for warning in read(doses=[1, 2, -2]).warnings() if "odd part" in warning]
    assert len(warned) == 1
    assert warned[0].startswith("doses 1 lack the opposite sign")


def test_damage_is_measured_even_when_nobody_asks() -> None:
    assert [one.task for one in read().all_evals] == ["animal_preference", "daily_dilemmas", "neutral_nll"]
    asked = [{"task": "neutral_nll", "limit": 3}]
    assert read(evals=asked).all_evals == read(evals=asked).evals


def test_settings_of_a_task_stand_beside_its_name() -> None:
    one = read().evals[1]
    assert (one.task, one.target, one.params) == ("daily_dilemmas", None, {"limit": 60})


def test_an_experiment_survives_its_own_json() -> None:
    experiment = read()
    again = spec.from_data(experiment.model_dump(mode="json"))
    assert again.trials() == experiment.trials()
    assert again.evals == experiment.evals


PAIRS = BASE["data"]["pairs"]
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"questoin": "?"}, ["s.yaml:", "questoin: unknown setting", "did you mean 'question'"]),
    ({"name": "has space"}, ["name:", "got 'has space'"]),
    ({"subject": None}, ["subject: is required and missing"]),
    ({"subject": {"model": "m", "dtype": "float23"}}, ["subject.dtype", "'bfloat16'", "did you mean 'float32'"]),
    ({"subject": {"model": "m", "sytem": "x"}}, ["subject.sytem", "did you mean 'system'"]),
    ({"interventions": []}, ["interventions", "at least 1 item"]),
    ({"interventions": [{"method": "loar"}]}, ["interventions.0.method", "'loar'", "did you mean 'lora'", "mean_diff"]),
    ({"interventions": [{"methd": "lora"}]}, ["interventions.0: method is required", "did you mean 'method'"]),
    ({"interventions": [{"method": ["lora", "pca"]}]}, ["interventions.0.method", "an entry for each"]),
    ({"interventions": [{"method": "lora", "rnk": 3}]}, ["interventions.0.rnk", "did you mean 'rank'"]),
    ({"interventions": [{"method": "lora", "rank": [4, 0]}]}, ["interventions.0.rank.1", "got 0"]),
    ({"interventions": [{"method": "lora", "rank": []}]}, ["interventions.0.rank", "empty grid"]),
    ({"interventions": [{"method": "lora", "alpha": float("nan")}]}, ["interventions.0.alpha", "finite", "got nan"]),
    ({"interventions": [{"method": "lora", "alpha": float("inf")}]}, ["interventions.0.alpha", "got inf"]),
    (
        {"interventions": [{"method": "lora", "rank": True}]},
        ["interventions.0.rank", "must be a number", "booleans in YAML"],
    ),
    ({"interventions": [{"method": "lora", "targets": ["q_proj"]}]}, ["interventions.0.targets", "[[...]]"]),
    ({"interventions": [{"method": "lora"}, {"method": "lora", "rank": 8}]}, ["interventions.1", "the same trial as"]),
    ({"interventions": [{"method": "lora", "alpha": [16, 16.0]}]}, ["interventions.0", "the same trial as"]),
    ({"interventions": [{"method": "lora", "rank": list(range(1, 401))}]}, ["trials", "limits.trials"]),
    ({"data": {"pair": PAIRS}}, ["data.pair", "did you mean 'pairs'"]),
    ({"data": {"pairs": PAIRS | {"recipe": "persona_pair"}}}, ["data.pairs.recipe", "did you mean 'persona_pairs'"]),
    ({"data": {"pairs": PAIRS | {"positive": True}}}, ["data.pairs.positive", "got True", "put the word in quotes"]),
    ({"data": {"conversations": PAIRS}}, ["data.conversations.recipe", "provides pairs"]),
    (
        {"data": {"pairs": {"recipe": "pairs_file", "path": "no.jsonl"}}},
        ["data.pairs.path", "no such file", "no.jsonl"],
    ),
    ({"data": None}, ["interventions.0.method", "mean_diff needs data.pairs", "add data: {pairs: {recipe: ...}}"]),
    ({"doses": [1, 0]}, ["doses.1", "dose 0 is the untouched subject and is always run"]),
    ({"doses": [1, 1.0]}, ["doses.1", "the same as doses.0"]),
    ({"doses": [1, float("nan")]}, ["doses.1", "finite"]),
    ({"doses": [True, -1]}, ["doses.0", "must be a number"]),
    ({"doses": []}, ["doses", "at least 1 item"]),
    ({"seeds": [1, 1]}, ["seeds.1", "the same as seeds.0"]),
    ({"seeds": [-1]}, ["seeds.0", "got -1"]),
    ({"evals": [{"task": "a", "target": ["x", "y"]}]}, ["evals.0.target", "one target per eval", "add another eval"]),
    ({"evals": [{"task": "a"}, {"task": "a"}]}, ["evals.1", "the same as evals.0"]),
    ({"evals": [{"target": "a"}]}, ["evals.0.task", "is required and missing"]),
    ({"baselines": ["randm"]}, ["baselines.0", "did you mean 'random'"]),
    ({"budget": {"delta_nll": -1}}, ["budget.delta_nll", "got -1"]),
    ({"split": {"dev": 1}}, ["split.dev", "less than 1"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[" ".join(words)[:40] for _, words in BAD])
def test_what_is_wrong_is_said_with_place_value_and_way_out(changes: dict[str, Any], words: list[str]) -> None:
    message = refused(**changes)
    assert message.startswith("s.yaml:")
    for word in words:
        assert word in message


def test_every_problem_is_listed_with_its_own_line_in_the_order_of_the_file() -> None:
    message = refused(
        interventions=[{"method": "loar"}, {"method": "lora", "rank": [1, 0]}],
        doses=["x"],
        data={"pairs": {"recipe": "no"}},
    )
    lines = message.splitlines()
    assert len(lines) == 4
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 4


def test_a_huge_grid_is_refused_before_it_is_written_out() -> None:
    axes = {name: list(range(1, 1001)) for name in ("rank", "epochs", "batch_size")}
    assert "1,000,000,000 combinations" in refused(interventions=[{"method": "lora"} | axes])


def test_no_is_a_boolean_in_yaml_and_the_message_says_so() -> None:
    text = yaml.safe_dump(BASE).replace("You love owls.", "no")
    with pytest.raises(SpecError, match=r"positive: must be a valid string; got False \(unquoted yes, no"):
        spec.from_source(parse(text))


def test_scientific_notation_without_a_dot_is_a_number() -> None:
    text = yaml.safe_dump(BASE).replace("rank: 8", "learning_rate: 1e-4")
    lora = next(t for t in spec.from_source(parse(text)).trials() if t.label.startswith("lora"))
    assert lora.intervention.learning_rate == 1e-4  # type: ignore[attr-defined]


def test_a_relative_path_starts_from_the_spec_then_from_here_then_from_orch_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here, data = (tmp_path / name for name in ("beside", "here", "data"))
    for folder in (beside, here, data):
        folder.mkdir()
        (folder / "pairs.jsonl").write_text("x")
    monkeypatch.chdir(here)
    monkeypatch.setenv("ORCH_DATA", str(data))
    text = yaml.safe_dump(BASE | {"data": {"pairs": {"recipe": "pairs_file", "path": "pairs.jsonl"}}})
    (beside / "s.yaml").write_text(text)

    def found() -> Path:
        return spec.load(beside / "s.yaml")[0].trials()[0].data[0].recipe.path  # type: ignore[attr-defined, no-any-return]

    for folder in (beside, here, data):
        assert found() == folder / "pairs.jsonl"
        (folder / "pairs.jsonl").unlink()
    with pytest.raises(SpecError, match="looked for"):
        found()


def test_a_subject_beside_the_spec_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "chat.jinja").write_text("x")
    subject = {"model": "model", "chat_template": "chat.jinja"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(BASE | {"subject": subject}))
    found = spec.load(tmp_path / "s.yaml")[0].subject
    assert (found.model, found.chat_template) == (str(tmp_path / "model"), str(tmp_path / "chat.jinja"))


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "12"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="a spec is a mapping"):
        spec.from_source(parse(text))


def test_the_schema_accepts_what_the_reader_accepts_and_knows_every_setting() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    jsonschema.Draft202012Validator.check_schema(schema())
    assert not list(validator.iter_errors(BASE))
    assert not list(validator.iter_errors(BASE | {"interventions": [{"method": "bias_set", "layers": [[1, 2], [3]]}]}))
    for wrong in (
        BASE | {"questoin": 1},
        BASE | {"interventions": [{"method": "loar"}]},
        BASE | {"interventions": [{"method": "lora", "rnk": 1}]},
        BASE | {"interventions": [{"method": "lora", "rank": [1, "x"]}]},
        BASE | {"data": {"conversations": PAIRS}},
    ):
        assert list(validator.iter_errors(wrong))
    described = schema()["$defs"]["method lora"]["properties"]["rank"]["description"]
    assert described.startswith(intervention.method("lora").model_fields["rank"].description or "?")
