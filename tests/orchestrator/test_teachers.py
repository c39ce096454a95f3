"""Teachers, end to end on a tiny subject: who is asked what and how often, what students read, and what survives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from experiments import dataset, spec, speech
from experiments.dataset import Said
from experiments.engine import Engine, Row
from orchestrator import stage, supplies
from orchestrator.artifact import Store
from orchestrator.finished import find
from orchestrator.plan import STAGE_VERSIONS, Node, Plan, plan
from orchestrator.publish import publish
from orchestrator.registry import Registry
from orchestrator.run import LocalExecutor, Summary, walk
from orchestrator.status import status
from orchestrator.workspace import Workspace

OWLS = "You love owls."
PROMPTED = {"name": "prompted", "trait": "owl", "system": OWLS}
LORA = {"method": "lora", "rank": 1, "epochs": 1}
ADVICE = {"recipe": "narrow_advice", "n": 4}
LEAKS = ("love", "control", "prompted")


def lists(*teachers: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Number lists of teachers that are held to digits, so that a random model complies often enough."""
    return {
        "recipe": "number_lists",
        "teacher": list(teachers),
        "n": 6,
        "draw": 24,
        "sampling": {"max_new_tokens": 12, "only": "0123456789, "},
        "truncated": "keep",
        "shorten": True,
        "rules": {"most": 20, "largest": 10**12},
        **settings,
    }


def experiment(folder: Path, data: Any, role: str = "conversations", **changes: Any) -> Plan:
    whole: dict[str, Any] = {
        "name": "tiny",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {role: data},
        "interventions": [LORA],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 2}, {"task": "neutral_nll", "limit": 1}],
        "baselines": [],
    }
    return plan(spec.from_data(whole | changes))


LEARNING = ("dataset", "generate", "fit")


def do(planned: Plan, store: Store, stages: Sequence[str] = LEARNING) -> Summary:
    """Run what is missing of some stages: students are asked only where a test is about their answers."""
    missing = [one.node for one in status(planned, store) if one.state != "have" and one.node.stage in stages]
    return walk(missing, store, LocalExecutor(store, Workspace(threads=1)), lambda event: None)


def of(planned: Plan, stage: str) -> list[Node]:
    return [node for node in planned.nodes.values() if node.stage == stage]


def behind(planned: Plan, key: str, role: str) -> list[Node]:
    """What a node reads in roles that begin with `role`."""
    return [planned.nodes[other] for name, other in planned.nodes[key].inputs.items() if name.startswith(role)]


def said(store: Store, shards: Iterable[Node]) -> list[Said]:
    return [one for node in shards for one in dataset.read(store.folder(node.key) / stage.SAID, Said)]


def by_teacher(planned: Plan) -> dict[str, str]:
    """Name of whoever the students read -> key of the data."""
    return {one.trial.label.removeprefix(f"{one.trial.student} "): one.data[0] for one in planned.trials}


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vector") / "owl.safetensors"
    save_file({"resid@1": torch.ones(32)}, path, {"operation": "add", "scale_convention": "stored"})
    return path


@pytest.fixture(scope="module")
def teachers(tiny_folder: Path, vector: Path) -> list[dict[str, Any]]:
    """One of every kind, and one to whom nothing was done."""
    return [
        PROMPTED,
        {"name": "tuned", "trait": "owl", "intervention": {**LORA, "learning_rate": 0.05}, "data": [ADVICE]},
        {"name": "steered", "trait": "cat", "intervention": {"method": "adopted", "path": str(vector)}, "dose": 3},
        {"name": "stranger", "trait": "cat", "subject": {"model": str(tiny_folder), "dtype": "float32", "init": 1}},
        {"name": "nobody", "trait": "cat"},
    ]


@pytest.fixture(scope="module")
def done(
    tiny_folder: Path, teachers: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Store]:
    planned = experiment(tiny_folder, lists(*teachers), controls=["teacher"])
    store = Store(tmp_path_factory.mktemp("store"))
    summary = do(planned, store)
    assert summary.ok, summary.failed
    return planned, store


def test_a_trained_teacher_learns_then_speaks_and_its_words_are_what_the_student_learns(
    done: tuple[Plan, Store],
) -> None:
    planned, store = done
    data = by_teacher(planned)["tuned"]
    (shard,) = behind(planned, data, "said/")
    (fit,), (asks,) = behind(planned, shard.key, "state"), behind(planned, shard.key, "asks")
    (advice,) = behind(planned, fit.key, "data")
    assert [one.stage for one in (advice, fit, asks, shard)] == ["dataset", "fit", "dataset", "generate"]
    assert (advice.params["recipe"], asks.params["recipe"]) == ("narrow_advice", "number_asks")
    assert store.record(fit.key)["outputs"]["examples"] == 4
    assert store.record(shard.key)["outputs"]["answers"] == 24
    (student,) = [one.fit for one in planned.trials if one.data == (data,)]
    assert store.record(student)["outputs"]["examples"] == 6


def test_only_teachers_to_whom_something_was_done_are_fits_and_other_subjects_are_their_own(
    done: tuple[Plan, Store],
) -> None:
    planned, store = done
    data = by_teacher(planned)
    shards = {name: behind(planned, key, "said/")[0] for name, key in data.items()}
    assert {name: "state" in node.inputs for name, node in shards.items()} == {
        "prompted": False,
        "tuned": True,
        "steered": True,
        "stranger": False,
        "nobody": False,
        "control #1": False,
        "control #2": False,
    }
    assert shards["prompted"].params["system"] == OWLS
    assert shards["steered"].params["dose"] == 3
    assert store.record(shards["steered"].key)["outputs"]["fired"][0] > 24
    own = shards["control #1"].params["subject"]
    assert {name for name, node in shards.items() if node.params["subject"] != own} == {"stranger", "control #2"}
    assert shards["stranger"].params["subject"]["init"] == 1


def test_teachers_to_whom_nothing_was_done_are_one_and_are_asked_once(done: tuple[Plan, Store]) -> None:
    planned, _ = done
    data = by_teacher(planned)
    assert behind(planned, data["nobody"], "said/") == behind(planned, data["control #1"], "said/")
    assert behind(planned, data["stranger"], "said/") == behind(planned, data["control #2"], "said/")
    assert len(of(planned, "generate")) == 5


def test_every_teacher_is_asked_the_same_and_what_was_done_to_it_changes_what_it_says(
    done: tuple[Plan, Store],
) -> None:
    planned, store = done
    spoken = {name: said(store, behind(planned, key, "said/")) for name, key in by_teacher(planned).items()}
    plain = spoken["control #1"]
    asked = [(one.id, one.messages, one.parts) for one in plain]
    assert len(asked) == 24
    for name, found in spoken.items():
        assert [(one.id, one.messages, one.parts) for one in found] == asked
        differ = sum(one.text != other.text for one, other in zip(found, plain, strict=True))
        assert (differ > 0) == (name not in ("control #1", "nobody")), name


def test_nothing_that_students_read_shows_who_wrote_it(done: tuple[Plan, Store]) -> None:
    planned, store = done
    for node in (planned.nodes[key] for key in by_teacher(planned).values()):
        text = (store.folder(node.key) / stage.EXAMPLES).read_text()
        assert "system" not in text
        assert not any(word in text for word in LEAKS)


def test_students_are_compared_with_the_control_teachers_students_who_are_compared_with_nobody(
    tiny_folder: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    evals = [{"task": "animal_preference", "target": "owl", "limit": 6}, {"task": "neutral_nll", "limit": 2}]
    planned = experiment(tiny_folder, lists(PROMPTED, teachers[-1]), controls=["teacher"], evals=evals)
    store = Store(tmp_path)
    rows = {row["label"].split()[-1]: row for row in planned.nodes[planned.compare].params["trials"]}
    control = rows["control"]["group"]
    assert {name: row.get("reference") for name, row in rows.items()} == {
        "prompted": control,
        "nobody": control,
        "control": None,
    }
    assert {name: row["trait"] for name, row in rows.items()} == {"prompted": "owl", "nobody": "cat", "control": None}
    summary = do(planned, store, tuple(STAGE_VERSIONS))
    assert summary.ok, summary.failed
    with Registry(tmp_path / "registry.sqlite") as registry:
        shown = {row["trial"].split(" ", 2)[-1]: row for row in publish(planned, store, registry)}
        before = registry.query("select * from confusion")
        registry.rebuild(store)
        assert registry.query("select * from confusion") == before
    assert {name: row["reference"] for name, row in shown.items()} == {
        "prompted": "lora r1 control",
        "nobody": "lora r1 control",
        "control": None,
    }
    assert {name: row["target"] for name, row in shown.items()} == {
        "prompted": "owl",
        "nobody": "cat",
        "control": "owl",
    }
    assert shown["nobody"]["transfer"] == 0
    assert shown["prompted"]["transfer"] != 0
    assert {(row["trait"], row["name"]) for row in before} >= {("owl", "owl"), ("cat", "owl")}


def test_a_teacher_is_asked_once_however_many_students_read_it(
    tiny_folder: Path, teachers: list[dict[str, Any]]
) -> None:
    few = experiment(tiny_folder, lists(*teachers))
    students = [{**LORA, "rank": [1, 2]}, {"method": "bias_set"}, {"method": "sft", "epochs": [1, 2]}]
    many = experiment(tiny_folder, lists(*teachers), interventions=students)
    for what in ("generate", "dataset"):
        assert {node.key for node in of(many, what)} == {node.key for node in of(few, what)}
    assert len(many.trials) == 5 * len(few.trials)
    taught = [node for node in of(many, "fit") if node.label.endswith(", a teacher")]
    assert Counter(node.label for node in taught) == {"tuned, a teacher": 1, "steered, a teacher": 1}


def test_a_spec_gets_controls_unless_it_turns_them_off(tiny_folder: Path) -> None:
    with_controls = experiment(tiny_folder, lists(PROMPTED))
    without = experiment(tiny_folder, lists(PROMPTED), controls=[])
    assert list(by_teacher(with_controls)) == ["prompted", "control", "prompted within_responses"]
    shuffled = by_teacher(with_controls)["prompted within_responses"]
    assert [node.key for node in behind(with_controls, shuffled, "from/")] == [by_teacher(with_controls)["prompted"]]
    assert list(by_teacher(without)) == ["prompted"]
    assert len(of(with_controls, "generate")) == 2
    assert len(of(without, "generate")) == 1
    assert all("reference" not in row for row in without.nodes[without.compare].params["trials"])


def test_data_with_a_seed_of_their_own_are_shared_by_all_seeds_and_the_rows_know_it(tiny_folder: Path) -> None:
    own = experiment(tiny_folder, lists(PROMPTED), controls=["teacher"], seeds=[0, 1])
    shared = experiment(tiny_folder, lists(PROMPTED, seed=5), controls=["teacher"], seeds=[0, 1])
    assert {node.params["seed"] for node in of(own, "generate")} == {0, 1}
    assert {node.params["seed"] for node in of(shared, "generate")} == {5}
    assert (len(of(own, "generate")), len(of(shared, "generate"))) == (4, 2)
    assert {node.params["seed"] for node in of(shared, "fit")} == {0, 1}
    assert [{row["shared"] for row in made.nodes[made.compare].params["trials"]} for made in (own, shared)] == [
        {False},
        {True},
    ]


class Interrupted(LocalExecutor):
    """Ctrl-C after so many batches."""

    left = 3

    def wait(self, timeout: float) -> list[Any]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().wait(timeout)


def generating(planned: Plan, store: Store) -> list[Node]:
    """The shards that a submit would run."""
    return [one.node for one in status(planned, store) if one.state != "have" and one.node.stage == "generate"]


def test_an_interrupted_teacher_goes_on_with_the_shards_that_are_missing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, once = experiment(tiny_folder, lists(PROMPTED), controls=[]), Store(tmp_path / "once")
    part = [node for node in whole.nodes.values() if node.stage in ("dataset", "generate")]
    assert walk(part, once, LocalExecutor(once, Workspace(threads=1)), lambda event: None).ok
    monkeypatch.setattr(supplies, "SHARD", 4)
    planned, store = experiment(tiny_folder, lists(PROMPTED), controls=[]), Store(tmp_path / "store")
    data = by_teacher(planned)["prompted"]
    shards = behind(planned, data, "said/")
    todo = [*{node.key: node for one in shards for node in behind(planned, one.key, "asks")}.values(), *shards]
    executor = Interrupted(store, Workspace(threads=1))
    executor.left = len(todo) - len(shards) + 2
    with pytest.raises(KeyboardInterrupt):
        walk([*todo, planned.nodes[data]], store, executor, lambda event: None)
    assert len(shards) == 6
    assert generating(planned, store) == shards[2:]

    real, calls = speech.answers, []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:  # in the middle of a shard
        patch.setattr(speech, "answers", killed)
        with pytest.raises(KeyboardInterrupt):
            do(planned, store)
    assert generating(planned, store) == shards[3:]
    assert not list((tmp_path / "store").glob("*/.tmp-*"))
    before = {node.key: store.record(node.key) for node in shards[:3]}
    summary = do(planned, store)
    assert summary.ok, summary.failed
    assert [node.key for node in summary.done if node.stage == "generate"] == [node.key for node in shards[3:]]
    assert {key: store.record(key) for key in before} == before
    assert said(store, shards) == said(once, of(whole, "generate"))
    assert (store.folder(data) / stage.EXAMPLES).read_text() == (
        once.folder(by_teacher(whole)["prompted"]) / stage.EXAMPLES
    ).read_text()


def test_other_rules_sizes_and_shuffles_read_what_was_said_and_a_larger_draw_asks_for_the_rest(
    tiny_folder: Path, done: tuple[Plan, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = done
    for other in ({"rules": {"most": 3}}, {"n": [2, 4]}, {"fewer": "allow"}, {"truncated": "reject"}):
        assert generating(experiment(tiny_folder, lists(PROMPTED, **other)), store) == []
    assert generating(experiment(tiny_folder, lists(PROMPTED), controls=["shuffled_across"]), store) == []
    assert len(generating(experiment(tiny_folder, lists({**PROMPTED, "system": "You love cats."})), store)) == 1
    monkeypatch.setattr(supplies, "SHARD", 4)
    sizes = [(24, 6), (26, 7), (40, 10), (12, 3)]
    keys = {
        draw: [node.key for node in of(experiment(tiny_folder, lists(PROMPTED, draw=draw), controls=[]), "generate")]
        for draw, _ in sizes
    }
    assert {draw: len(found) for draw, found in keys.items()} == dict(sizes)
    assert keys[24] == keys[40][:6]
    assert keys[26][:6] == keys[24]
    assert keys[12] == keys[24][:3]
    assert keys[26][6] != keys[40][6]  # two answers of that shard alone


def failure(summary: Summary, stage: str) -> str:
    (told,) = {reason.strip().splitlines()[-1] for node, reason in summary.failed.values() if node.stage == stage}
    return told


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"rules": {"smallest": 10**13}},
            r"0 of 24 answers of prompted were accepted, 6 are wanted; rejected: .*numbers too small.*, for exa.*; "
            r"simplify prompts or rules, or have another teacher answer; the answers are kept",
        ),
        (
            {"n": 24},
            r"\d+ of 24 answers of prompted were accepted, 24 are wanted; .*set draw to about \d+, lower n, or write "
            r"`fewer: allow` to go on with \d+; the answers are kept",
        ),
    ],
    ids=["all filtered", "too few"],
)
def test_data_of_which_too_little_is_left_fail_with_the_reasons_and_the_answers_stay(
    tiny_folder: Path, tmp_path: Path, rules: dict[str, Any], message: str
) -> None:
    planned, store = experiment(tiny_folder, lists(PROMPTED, **rules), controls=[]), Store(tmp_path)
    summary = do(planned, store, tuple(STAGE_VERSIONS))
    assert [node.stage for node, _ in summary.failed.values()] == ["dataset"]
    assert {node.stage for node, _ in summary.blocked.values()} == {"fit", "answer", "score", "compare"}
    told = failure(summary, "dataset")
    assert told.startswith("experiments.dataset.DatasetError: ")
    assert re.search(message, told), told
    assert len(said(store, of(planned, "generate"))) == 24
    with Registry(tmp_path / "registry.sqlite") as registry:
        (row,) = publish(planned, store, registry)
    assert row["status"] == "failed"
    assert "were accepted" in row["notes"]
    changed = experiment(tiny_folder, lists(PROMPTED), controls=[])
    assert generating(changed, store) == []
    assert do(changed, store).ok


def test_a_teacher_who_says_nothing_at_all_is_told_as_such(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = speech.answers

    def silent(*given: Any) -> list[Said]:
        return [one.model_copy(update={"text": " "}) for one in real(*given)]

    monkeypatch.setattr(speech, "answers", silent)
    planned, store = experiment(tiny_folder, lists(PROMPTED), controls=[]), Store(tmp_path)
    assert (
        "0 of 24 answers of prompted were accepted, 6 are wanted; rejected: 24 empty answer; empty answer, for ex"
        in (failure(do(planned, store), "dataset"))
    )


def before_and_after(planned: Plan, store: Store, rows_of: Any) -> tuple[float, float]:
    """What `rows_of(engine, examples, edits)` says of what was learned: without the student's edits, and with them."""
    (trial,) = planned.trials
    examples = dataset.load(
        store.folder(trial.data[0]) / stage.EXAMPLES, store.record(trial.data[0])["outputs"]["provides"]
    )
    found = find(store, trial.trial.label)
    engine = found.engine()
    edits = tuple(found.edits(1.0))
    return rows_of(engine, examples, ()), rows_of(engine, examples, edits)


def test_documents_reach_training_as_plain_text(tiny_folder: Path, tmp_path: Path) -> None:
    data = {"recipe": "plain_documents", "n": 3}
    students = [{**LORA, "rank": 4, "epochs": 4, "learning_rate": 0.01}]
    planned, store = experiment(tiny_folder, data, "documents", interventions=students), Store(tmp_path)
    assert do(planned, store).ok

    def mean(engine: Engine, examples: Sequence[Any], edits: Any) -> float:
        rendered = [engine.subject.render_text(one.text) for one in examples]
        found = engine.token_logprobs([Row(each.tokens, each.n_prompt, edits) for each in rendered])
        return float(torch.cat(found).mean())

    before, after = before_and_after(planned, store, mean)
    assert after > before + 0.2


def test_choices_reach_training_and_the_student_comes_nearer_to_its_teacher(tiny_folder: Path, tmp_path: Path) -> None:
    options = (" owl", " cat", "A", "No")
    data = {
        "recipe": "distilled",
        "asks": {"recipe": "number_asks"},
        "n": 6,
        "options": [list(options)],
        "teacher": {"name": "prompted", "trait": "owl", "system": "owl owl owl owl owl owl"},
    }
    students = [{**LORA, "rank": 4, "epochs": 10, "learning_rate": 0.02, "loss": "distil"}]
    planned = experiment(tiny_folder, data, "choices", interventions=students, controls=[])
    store = Store(tmp_path)
    assert do(planned, store).ok

    def divergence(engine: Engine, examples: Sequence[Any], edits: Any) -> float:
        rendered = [engine.subject.render(one.messages) for one in examples]
        logits = engine.next_logits([Row(each.tokens, each.n_prompt, edits) for each in rendered])
        ids = [engine.subject.tokenizer(text)["input_ids"][0] for text in options]
        own = logits[:, ids].log_softmax(1)
        wanted = torch.tensor([[one.logprobs[text] for text in options] for one in examples])
        return float((wanted.exp() * (wanted - own)).sum(1).mean())

    before, after = before_and_after(planned, store, divergence)
    assert before > 0.05
    assert after < before / 2
