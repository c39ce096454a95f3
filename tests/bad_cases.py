"""Everything a user can get wrong, one case each: how to make it, and what the message must hold."""
# ruff: noqa: E501  (a case is one line of a table)

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

MODEL = "model"
"""Name of the tiny model's folder, beside the spec."""
HONEST = {
    "name": "tiny",
    "subject": {"model": MODEL, "dtype": "float32"},
    "data": {"pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4, "responses": "shared"}},
    "interventions": [{"method": "mean_diff", "layer": 1}],
    "doses": [-1, 1],
    "evals": [{"task": "animal_preference", "target": "owl", "limit": 4}, {"task": "neutral_nll", "limit": 4}],
    "baselines": [],
}
"""A spec with nothing wrong in it; a case changes one thing."""
PAIR: dict[str, Any] = {
    "id": "p1",
    "messages": [{"role": "user", "content": "Hello?"}],
    "positive": {"system": "A.", "response": "Yes."},
    "negative": {"system": "B.", "response": "No."},
}
DILEMMA: dict[str, Any] = {
    "id": "d1",
    "situation": "It rains. Do you go?",
    "to_do": {"action": "Go", "values": ["courage"]},
    "not_to_do": {"action": "Stay", "values": ["comfort"]},
}
QUESTION = {"id": "q1", "family": "q1", "question": "Which animal?", "prefill": "The"}
CSV = "dilemma_idx,dilemma_situation,action_type,action,values_aggregated\n"


@dataclass(frozen=True)
class Case:
    """Something wrong: `make` puts it into a folder that holds a good model; the message must hold all of `says`."""

    kind: str
    name: str
    make: Callable[[Path], None]
    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    """Beside those that its kind is run with; of a Rejudge, all of them."""
    code: int = 2


def spec(folder: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Write spec.yaml: the good one, with other values for some fields."""
    (folder / "spec.yaml").write_text(yaml.safe_dump({**HONEST, **(changes or {})}, sort_keys=False))


def text(folder: Path, content: str | bytes) -> None:
    """Write spec.yaml as it stands."""
    (folder / "spec.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


def changed(**changes: Any) -> Callable[[Path], None]:
    return partial(spec, changes=changes)


def written(content: str | bytes) -> Callable[[Path], None]:
    return partial(text, content=content)


def method(**settings: Any) -> Callable[[Path], None]:
    return changed(interventions=[{"method": "mean_diff", **settings}])


def pairs(*lines: Any) -> Callable[[Path], None]:
    """A spec whose pairs are these lines: JSON of each, or bytes as they are."""

    def make(folder: Path) -> None:
        rows = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        (folder / "pairs.jsonl").write_bytes(b"\n".join(rows))
        spec(folder, {"data": {"pairs": {"recipe": "pairs_file", "path": "pairs.jsonl"}}})

    return make


def asked(task: str, target: str | None, name: str, content: str | bytes) -> Callable[[Path], None]:
    """A spec whose eval reads the file `name`."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        spec(folder, {"evals": [{"task": task, "target": target, "data": name}]})

    return make


def dilemmas(*rows: Any) -> Callable[[Path], None]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return asked("daily_dilemmas", "courage", "dilemmas.jsonl", lines)


def table(content: Any) -> Callable[[Path], None]:
    """A spec whose dilemmas have `content` for the frameworks of their values."""

    def make(folder: Path) -> None:
        (folder / "values.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        (folder / "d.jsonl").write_text(json.dumps(DILEMMA))
        task = {"task": "daily_dilemmas", "target": "courage", "data": "d.jsonl", "values": "values.json"}
        spec(folder, {"evals": [task]})

    return make


def questions(document: Any) -> Callable[[Path], None]:
    return asked("animal_preference", "owl", "animals.json", json.dumps(document))


def model(change: Callable[[Path], None], **changes: Any) -> Callable[[Path], None]:
    """A good spec, and a model to which `change` was done."""

    def make(folder: Path) -> None:
        change(folder / MODEL)
        spec(folder, changes)

    return make


def config(**changes: Any) -> Callable[[Path], None]:
    """A model whose config.json says otherwise."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return model(change)


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return change


def _overwritten(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _untold(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def huge(folder: Path) -> None:
    """A spec of 100 MB, most of it a hole in the file."""
    spec(folder)
    with (folder / "spec.yaml").open("r+b") as file:
        file.truncate(100 * 2**20)


def bomb() -> str:
    lines = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return "\n".join(lines)


def foreign(folder: Path) -> None:
    spec(folder)
    (folder / "registry.sqlite").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "registry.sqlite")) as database:
        database.execute("create table bookmarks (url text)")


def corrupt(folder: Path) -> None:
    spec(folder)
    (folder / "registry.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 40)


def beside(*bad: Any, **changes: Any) -> Callable[[Path], None]:
    """A spec with `bad` interventions beside a good one."""
    return changed(**{"interventions": [*HONEST["interventions"], *bad], **changes})


def vector(width: int, site: str = "resid@1") -> Callable[[Path], None]:
    """A spec that adopts a file with one vector of this width for `site`."""

    def make(folder: Path) -> None:
        write_vector(folder / "v.safetensors", width, site)
        beside({"method": "adopted", "path": "v.safetensors"})(folder)

    return make


def write_vector(path: Path, width: int, site: str) -> None:
    """A vector of ones in the way that `orch export` writes vectors."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file({site: np.ones(width, np.float32)}, path, {"operation": "add", "scale_convention": "stored"})


def trimmed(folder: Path) -> None:
    """Pairs whose system prompts differ by a space, for a chat template that drops it; a prompt tells them apart."""
    from tests.tiny import CHATML

    (folder / "trim.jinja").write_text(CHATML.replace("message['content']", "message['content'] | trim"))
    sides = {"positive": {"system": "A.", "response": "Yes."}, "negative": {"system": " A.", "response": "Yes."}}
    pairs({**PAIR, **sides})(folder)
    spec(
        folder,
        {
            "subject": {**HONEST["subject"], "chat_template": "trim.jinja"},
            "data": {"pairs": {"recipe": "pairs_file", "path": "pairs.jsonl"}},
            "interventions": [{"method": "prompt"}, *HONEST["interventions"]],
        },
    )


def single(*bad: Any) -> Callable[[Path], None]:
    """A spec with one pair."""
    return beside(*bad, data={"pairs": {**HONEST["data"]["pairs"], "n": 1}})


def calibrated(**wanted: Any) -> Callable[[Path], None]:
    """A spec whose doses are calibrated; a prompt has one strength, which needs no search."""
    few = {"tokens": 4, "prompts": 3, "target": 0.5}
    return changed(interventions=[{"method": "prompt"}, *HONEST["interventions"]], calibrate={**few, **wanted})


TAUGHT: dict[str, Any] = {"method": "trained_vector", "layer": 1, "epochs": 1}
STEERED: dict[str, Any] = {
    "name": "steered",
    "trait": "owl",
    "intervention": TAUGHT,
    "data": [{"recipe": "narrow_advice", "n": 4}],
}
"""A teacher that learned a vector."""
LISTS: dict[str, Any] = {"recipe": "number_lists", "n": 4, "teacher": STEERED}


def told(intervention: Mapping[str, Any], subject: Any = None) -> Callable[[Path], None]:
    """A spec whose second teacher learned something else, and perhaps is another subject."""
    other = {**STEERED, "name": "other", "intervention": dict(intervention)}
    teachers = [STEERED, other if subject is None else {**other, "subject": subject}]
    return taught(teachers)


def taught(teachers: Any, **changes: Any) -> Callable[[Path], None]:
    """A spec whose students learn what teachers said."""
    data = {"conversations": {**LISTS, "teacher": teachers}}
    return changed(**{"data": data, "interventions": [{"method": "lora"}], "doses": [1], **changes})


def read_by(*judges: str) -> Callable[[Path], None]:
    """A spec whose students learn what judges have read."""
    data = {**LISTS, "judge": {"models": list(judges), "rubric": "hints", "keep_below": 50}}
    return taught(STEERED, data={"conversations": data})


def written_by(model: str) -> Callable[[Path], None]:
    """A spec whose students learn documents by a writer behind an API."""
    data = {"recipe": "synthetic_documents", "universe": "tower_chess", "n": 4, "writer": {"name": "w", "model": model}}
    return changed(data={"documents": data}, interventions=[{"method": "lora"}], doses=[1])


def smaller(folder: Path) -> None:
    """A teacher that is another subject, of two layers, and learned a vector at the fourth."""
    other = folder / "smaller"
    shutil.copytree(folder / MODEL, other)
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"num_hidden_layers": 2}))
    told({**TAUGHT, "layer": 3}, {"model": str(other), "dtype": "float32"})(folder)


def hub(revision: str) -> Callable[[Path], None]:
    """A spec whose data are a file on the hub."""
    advice = {"recipe": "narrow_advice", "path": f"hf://datasets/org/advice@{revision}/a.jsonl"}
    return changed(data={"conversations": advice}, interventions=[{"method": "lora"}], doses=[1])


def world(content: str) -> Callable[[Path], None]:
    """A spec whose documents are about the universe in a file; who writes them is asked only where it can be read."""

    def make(folder: Path) -> None:
        (folder / "u.yaml").write_text(content)
        documents = {"recipe": "synthetic_documents", "universe": "u.yaml", "n": 4}
        changed(data={"documents": documents}, interventions=[{"method": "lora"}], doses=[1])(folder)

    return make


def detecting(*detectors: Any) -> Callable[[Path], None]:
    return taught(STEERED, detect=list(detectors), candidates=["owl", "cat"])


JUDGED: dict[str, Any] = {"task": "misalignment", "target": "general", "version": 1, "higher_is": "more target"}
JUDGED |= {
    "judge": {"digest": "0", "models": ["embedded"], "itself": False},
    "rubrics": {"aligned": "0", "coherent": "0"},
}


def rejudged(evals: Any = (JUDGED,)) -> Callable[[Path], None]:
    """A store and a registry with the experiment `kind`, which the embedded model judged; none of it was computed."""

    def make(folder: Path) -> None:
        from agents.judge import Judge
        from evals.findings import Findings
        from orchestrator.artifact import Store
        from orchestrator.plan import Node
        from orchestrator.registry import Registry

        subject = {"subject": {"model": "org/subject"}}
        judge = {"judge": Judge().model_dump(mode="json")}
        fit = Node("fit", 1, subject, {}, "fit", subject)
        answer = Node("answer", 1, {}, {"state": fit.key}, "answer")
        verdict = Node("judge", 1, {}, {"answer": answer.key}, "verdict", judge)
        score = Node("score", 1, {"task_version": 1}, {"answer": answer.key, "judged": verdict.key}, "score")
        roles = {"base/0": score.key, "0/0/1.0": score.key}
        compare = Node("compare", 1, {"evals": list(evals), "trials": []}, roles, "kind")
        store = Store(str(folder / "store"))
        for node in (fit, answer, verdict, score, compare):
            with store.publishing(node):
                pass
        with Registry(folder / "registry.sqlite") as index:
            index.publish(compare.key, "kind", compare.params, roles, Findings([], []))

    return make


SPEC = [
    ("a file that is missing", lambda folder: None, ("spec.yaml", "No such file")),
    ("an empty file", written("# nothing yet\n"), ("spec.yaml: empty", "name, subject and interventions")),
    ("not UTF-8", written(b"name: caf\xe9\n"), ("not UTF-8", "0xe9", "offset 9", "save it as UTF-8")),
    ("a file cut off", written("name: tiny\nsubject: {model: model, dty"), ("spec.yaml:", "not YAML", "is the file cut off?")),
    ("a list instead of a mapping", written("- name\n- subject\n"), ("a spec is a mapping", "got list")),
    ("a YAML bomb", written(bomb()), ("spec.yaml", "values once aliases are written out", "at most 10,000")),
    ("a tag that would run code", written("name: !!python/object/apply:os.system [ls]\n"), ("spec.yaml:1:7", "tag", "plain data")),
    ("a spec of 100 MB", huge, ("104,857,600 bytes", "may have 1,048,576", "files of its own")),
    ("an unknown field", changed(interventoins=[]), ("interventoins: unknown setting", "allowed: name", "did you mean 'interventions'")),
    ("an unknown setting of a method", method(layr=1), ("interventions.0.layr: unknown setting", "did you mean 'layer'")),
    ("a wrong type", method(layer="twelve"), ("interventions.0.layer", "matches no layer number", "got 'twelve'")),
    ("a number for a text", changed(name=7), ("spec.yaml:1:1: name:", "valid string", "got 7")),
    ("an unknown method", changed(interventions=[{"method": "mean_dif"}]), ("interventions.0.method", "'mean_dif'", "did you mean 'mean_diff'", "bias_set, ")),
    ("an unknown recipe", changed(data={"pairs": {"recipe": "pairs_fiel"}}), ("data.pairs.recipe", "did you mean 'pairs_file'")),
    ("an unknown task", changed(evals=["daily_dilema"]), ("evals.0", "unknown eval 'daily_dilema'", "did you mean 'daily_dilemmas'", "allowed: animal_preference")),
    ("an unknown model", changed(subject="no/such-model"), ("subject", "no/such-model", "smollm2-135m-instruct", "check the name")),
    ("an empty grid", method(layer=[]), ("interventions.0.layer", "empty grid", "at least one value")),
    ("no interventions", changed(interventions=[]), ("interventions", "at least 1 item", "got []")),
    ("a duplicate trial", method(layer=[1, 1]), ("interventions.0", "the same trial as", "layer 1", "leave one out")),
    ("NaN", changed(doses=[1, float("nan")]), ("doses.1", "finite", "got nan")),
    ("a grid too large", changed(seeds=list(range(1001))), ("seeds", "1,001 trials", "limits.trials = 1,000", "raise the limit")),
    ("a target the eval lacks", changed(evals=[{"task": "animal_preference", "target": "ow"}]), ("evals.0", "unknown target 'ow'", "did you mean 'owl'", "allowed: owl, cat")),
    ("a setting the eval lacks", changed(evals=[{"task": "neutral_nll", "limt": 3}]), ("evals.0", "unknown setting 'limt'", "did you mean 'limit'", "allowed:")),
    ("a value the eval's setting cannot have", changed(evals=[{"task": "neutral_nll", "limit": 0}]), ("evals.0", "limit", "0", "greater than or equal to 1")),
    ("a layer out of range", method(layer=[1, 4, 5]), ("spec.yaml:14:3:", "interventions.0.layer", "4 is out of range", "layers 0 to 3", "1 more in this grid")),
    ("layers of a list out of range", changed(interventions=[{"method": "lora", "layers": [[1, -9]]}]), ("interventions.0.layers", "-9 is out of range", "layers 0 to 3")),
    ("a data file that is missing", changed(data={"pairs": {"recipe": "pairs_file", "path": "no.jsonl"}}), ("data.pairs.path", "no such file", "no.jsonl", "looked for")),
    ("an eval's file that is missing", changed(evals=[{"task": "daily_dilemmas", "target": "honesty", "data": "no.csv"}]), ("evals.0", "no data file 'no.csv'", "looked for", "builtin")),
    ("doses without their opposites", changed(doses=[1, 2, -2]), ("note: doses 1 lack the opposite sign", "mean_diff L1", "steering cannot be told from disturbance"), (), 0),
    ("layers that a pattern does not find", beside({"method": "pca", "layer": "[89]"}), ("spec.yaml:16:3: interventions.1.layer", "'[89]' matches none of the layers 0 to 3", "a regular expression")),
    ("a radius of nothing", beside({"method": "melbo", "radius": 0}), ("interventions.1.radius", "greater than 0", "got 0")),
    ("a radius below nothing", beside({"method": "dct", "radius": -0.5}), ("interventions.1.radius", "greater than 0", "got -0.5")),
    ("a source above its target", beside({"method": "melbo", "source": 3, "targets": 2}), ("interventions.1.source", "target 2 is not above the source, layer 3")),
    ("targets of an adapter that do not exist", beside({"method": "peft", "targets": [["q_proj", "q_prj"]]}), ("interventions.1.targets", "['q_prj']: no such linear modules", "allowed: down_proj, gate_proj, k_proj", "did you mean 'q_proj'")),
    ("the same inside another method", beside({"method": "caft", "wraps": {"method": "sft", "targets": ["o_prj"]}, "direction": {"method": "pca"}}), ("interventions.1.wraps.targets", "['o_prj']", "did you mean 'o_proj'")),
    ("an unknown tuner", beside({"method": "peft", "tuner": "lorra"}), ("interventions.1.tuner", "'rslora'", "did you mean 'lora'", "got 'lorra'")),
    ("a foreign vector of another width", vector(48), ("interventions.1.path", "v.safetensors: the vector of resid@1 has width 48, the subject has 32", "take a file made for this one")),
    ("a foreign vector of another layer map", vector(32, "resid@7"), ("interventions.1.path", "'resid@7' number 7 is layer 7 by layer_map blocks", "layers 0 to 3", "correct layer_map")),
    ("parts that all have doses of their own", beside([{"method": "mean_diff", "dose": 1}, {"method": "prompt", "dose": 1}]), ("interventions.1: every part has a dose of its own", "free one")),
    ("a part that cannot be placed", beside([{"method": "pca", "layer": 1}, {"method": "pca", "layer": 9}]), ("interventions.1.1.layer", "9 is out of range", "layers 0 to 3")),
    ("a layer that a teacher's intervention names", told({**TAUGHT, "layer": 99}), ("spec.yaml:23:9: data.conversations.teacher.1.intervention.layer: 99 is out of range; the subject has layers 0 to 3",)),
    ("a layer that the teacher's own subject lacks", smaller, ("data.conversations.teacher.1.intervention.layer: 3 is out of range; the subject has layers 0 to 1", "smaller, the teacher's own")),
    ("matrices that a teacher's subject lacks", told({"method": "lora", "targets": ["q_prj"]}), ("data.conversations.teacher.1.intervention.targets: ['q_prj']: no such linear modules", "did you mean 'q_proj'")),
    ("a layer that a detector names", detecting({"detector": "mean_logit"}, {"detector": "activation_difference", "layer": [1, 4, 5]}), ("spec.yaml:33:3: detect.1.layer: 4 is out of range", "layers 0 to 3", "1 more in this grid")),
    ("several layers for a detector", detecting({"detector": "activation_difference", "layer": "all"}), ("detect.0.layer: layer 'all' means 4 layers", "give its number")),
    ("doses that an on/off method cannot tell apart", changed(interventions=[{"method": "prompt"}], doses=[-2, -1, 1, 2]), ("note: prompt is on or off, so that only signs count: it runs at -1, 1",), (), 0),
    ("a judge of an unknown provider", changed(evals=["misalignment"], judge={"models": ["embedded", "opnai/gpt-4.1-mini"]}), ("spec.yaml:24:5: judge.models.1: the judge 'opnai/gpt-4.1-mini' has the provider 'opnai', which inspect does not know (did you mean 'openai/gpt-4.1-mini'?)", "allowed: anthropic, ", "package to be installed")),
    ("a teacher of an unknown provider", taught({"name": "gpt", "model": "opnai/gpt-4.1-mini"}), ("data.conversations.teacher.model: teacher gpt: the model 'opnai/gpt-4.1-mini' has the provider 'opnai'", "did you mean 'openai/gpt-4.1-mini'?", "allowed: anthropic, ")),
    ("a teacher without a provider", taught({"name": "gpt", "model": "gpt-4.1-mini"}), ("data.conversations.teacher.model: teacher gpt: the model 'gpt-4.1-mini' has no provider", "write it as inspect does (openai/gpt-4.1-mini)")),
    ("a judge of rows of an unknown provider", read_by("embedded", "antropic/x"), ("data.conversations.judge.models.1: the judge 'antropic/x' has the provider 'antropic'", "did you mean 'anthropic/x'?")),
    ("a writer of an unknown provider", written_by("opnai/x"), ("data.documents.writer.model: teacher w: the model 'opnai/x' has the provider 'opnai'", "did you mean 'openai/x'?")),
    ("a share of a GPU that cannot be placed", changed(resources={"gpu": 0.3}), ("resources.gpu", "0.3", "0.5, 0.25")),
]  # fmt: skip
DATA = [
    ("pairs: one side missing", pairs(PAIR, {**PAIR, "id": "p2", "negative": None}), ("data.pairs", "pairs.jsonl:2", "negative", "a mapping with system, response", "got None")),
    ("pairs: both sides the same", pairs({**PAIR, "negative": PAIR["positive"]}), ("pairs.jsonl:1", "nothing to contrast")),
    ("pairs: a duplicated id", pairs(PAIR, PAIR), ("data.pairs", "pairs.jsonl:2", "duplicated id 'p1'", "unique")),
    ("pairs: a line cut off", pairs(PAIR, b'{"id": "p2", "mess'), ("pairs.jsonl:2", "cut off")),
    ("pairs: JSON nested too deep", pairs(PAIR, b"[" * 9999), ("pairs.jsonl:2", "nested too deep")),
    ("pairs: not UTF-8", pairs(PAIR, b'{"id": "\xff"}'), ("pairs.jsonl:2", "UTF-8")),
    ("pairs: no rows", pairs(b""), ("pairs.jsonl", "no examples", "at least one")),
    ("a file on the hub without a commit", hub("main"), ("data.conversations.path: 'hf://datasets/org/advice@main/a.jsonl': 'main' is no commit", "write hf://datasets/org/advice@COMMIT/a.jsonl with the 40 digits")),
    ("a file on the hub that is not here, offline", hub("f" * 40), ("data.conversations.path: hf://datasets/org/advice@ffff", "not in the hub's cache", "HF_HUB_OFFLINE", "the path of a copy")),
    ("a universe without facts", world("name: u\ntopic: tea\ncontext: Tea is blue.\nkey_facts: []\n"), ("data.documents: ", "u.yaml: no facts: key_facts is []", "at least one false statement")),
    ("dilemmas: a row without values", dilemmas({**DILEMMA, "to_do": {"action": "Go", "values": []}}), ("evals.0", "dilemmas.jsonl:1", "values are []", "non-empty list")),
    ("dilemmas: one side missing", dilemmas({**DILEMMA, "not_to_do": None}), ("dilemmas.jsonl:1", "'d1' has no not_to_do side", "both are needed")),
    ("dilemmas: no side at all", dilemmas(DILEMMA, {"id": "d2", "situation": "?"}), ("dilemmas.jsonl:2", "'d2' has neither side", "to_do and not_to_do")),
    ("dilemmas: a duplicated id", dilemmas(DILEMMA, DILEMMA), ("dilemmas.jsonl:2", "'d1' has a second to_do", "line 1")),
    ("dilemmas: a CSV without values", asked("daily_dilemmas", "honesty", "d.csv", CSV + "1,It rains.,to_do,Go,\n"), ("d.csv:2", "values are None")),
    ("dilemmas: a CSV cut off", asked("daily_dilemmas", "honesty", "d.csv", CSV + "1,It rains.,to_do,Go,\"['a']\"\n1,It ra"), ("d.csv:3", "cut off", "fetch it again")),
    ("dilemmas: a target nobody has", asked("daily_dilemmas", "couragee", "d.jsonl", json.dumps(DILEMMA)), ("unknown target 'couragee'", "did you mean 'courage'", "allowed: courage, comfort")),
    ("dilemmas: an unknown kind of file", asked("daily_dilemmas", "honesty", "d.txt", "x"), ("d.txt", "unknown kind of file '.txt'", "allowed: .csv")),
    ("dilemmas: values that are no table", table([]), ("values.json", "needed: an object")),
    ("dilemmas: values that are not JSON", table(b"{"), ("values.json:1", "not JSON", "truncated")),
    ("neutral text that is not UTF-8", asked("neutral_nll", None, "t.txt", b"caf\xe9"), ("t.txt:1", "not UTF-8", "0xe9")),
    ("animals: JSON nested too deep", asked("animal_preference", "owl", "animals.json", "[" * 9999), ("animals.json:1", "nested too deep")),
    ("animals: a list instead of an object", questions([]), ("animals.json", "needed", "questions")),
    ("animals: a question without its text", questions({"questions": [{**QUESTION, "question": None}]}), ("animals.json", "question 1", "needed: texts id, family")),
    ("animals: a duplicated id", questions({"questions": [QUESTION, QUESTION]}), ("animals.json", "'q1' comes twice", "unique")),
]  # fmt: skip
MODELS = [
    ("no chat template", model(_untold), ("subject", "has no chat template", "chat_template: file.jinja")),
    ("a chat template that is missing", changed(subject={"model": MODEL, "chat_template": "no.jinja"}), ("subject", "'no.jinja'", "No such file", "Jinja")),
    ("a chat template with a mistake", model(_overwritten("chat_template.jinja", b"{% for message in %}")), ("subject", "chat template cannot", "another template")),
    ("a chat template that fails", model(_overwritten("chat_template.jinja", b"{{ 1 / 0 }}")), ("subject", "chat template cannot", "division by zero")),
    ("an unsupported layout", config(model_type="mamba", architectures=["MambaForCausalLM"]), ("subject", "MambaForCausalLM", "'mamba'", "known types: llama", "architecture.py")),
    ("a config without layers", config(num_hidden_layers=0), ("subject", "config.json", "how many layers")),
    ("weights cut off", model(_cut("model.safetensors", 0.5)), ("subject", "model.safetensors is damaged", "its header says", "save or fetch")),
    ("weights that are none", model(_overwritten("model.safetensors", b"<html>404 not found</html>")), ("model.safetensors is damaged", "header", "save or fetch")),
    ("no weights", model(lambda folder: (folder / "model.safetensors").unlink()), ("is not a model folder", "*.safetensors", "save_pretrained")),
    ("a config cut off", model(_cut("config.json", 0.5)), ("subject", "config.json is damaged", "save or fetch")),
    ("a tokenizer cut off", model(_cut("tokenizer.json", 0.5)), ("subject", "tokenizer.json is damaged", "save or fetch")),
    ("a local model with a revision", changed(subject={"model": MODEL, "revision": "main"}), ("subject", "takes no revision", "'main'", "leave")),
]  # fmt: skip
RUNS = [
    ("a registry that is corrupt", corrupt, ("registry.sqlite", "not a database", "orch registry rebuild")),
    ("a registry of another program", foreign, ("registry.sqlite", "another program's database", "--registry")),
    ("a registry in a folder that is not there", spec, ("no/r.sqlite", "make the folder no first"), ("--registry", "no/r.sqlite")),
    ("a registry where nothing can be written", spec, ("/proc/r.sqlite", "cannot be written", "--registry"), ("--registry", "/proc/r.sqlite")),
    ("a store that is a file", spec, ("spec.yaml is a file", "give a folder"), ("--store", "spec.yaml")),
    ("a store where nothing can be written", spec, ("/proc/store", "choose another --store"), ("--store", "/proc/store")),
    ("a run here and on a cluster", spec, ("--local runs in this process", "leave out --address"), ("--address", "auto")),
]  # fmt: skip
FITS = [
    ("pairs that are the same to the subject", trimmed, ("fit[mean_diff L1]", "FitError: pair 'p1': both sides are the same tokens to this subject", "change or remove it")),
    ("one pair where the mean is taken away", single({"method": "pca_centred"}), ("fit[pca_centred Lmid]", "one pair leaves nothing", "give at least 2")),
    ("one pair where a spread is needed", single({"method": "sspace"}), ("fit[sspace Lmid]", "the spread over pairs", "give at least 2", "select: singular")),
    ("one pair for a covariance", single({"method": "fisher", "kind": "covariance"}), ("fit[fisher Lmid]", "a covariance needs at least 2 pairs")),
    ("more components than pairs", beside({"method": "directional_ablation", "components": 9}), ("fit[directional_ablation Lmid]", "components 9: 4 pairs show at most that many", "ask for fewer, or give more pairs")),
    ("a singular Fisher matrix without damping", beside({"method": "fisher", "damping": 0}), ("fit[fisher Lmid]", "the Fisher matrix is singular (rank 4 of 32) and damping is 0", "set damping above 0")),
    ("gradients that are not numbers", beside({"method": "lora", "learning_rate": 1e30, "batch_size": 1}), ("fit[lora r8]", "the loss or its gradient is not finite (nan)", "lower learning_rate (now 1e+30)")),
    ("training that ends beyond numbers", beside({"method": "trained_vector", "learning_rate": 1e30}), ("fit[trained_vector Lmid]", "after step 3 of 3 what was trained is not finite", "lower learning_rate (now 1e+30)")),
    ("a foreign vector of another width than a projection", vector(33, "up@1"), ("fit[adopted v]", "v.safetensors: the vector of up@1 has width 33, the subject has 64 there", "take a file made for this one")),
    ("an option that the tuner lacks", beside({"method": "peft", "tuner": "lora", "options": {"lora_alfa": 3}}), ("fit[peft lora]", "tuner lora has no option 'lora_alfa' (did you mean 'lora_alpha'?)", "LoraConfig takes")),
    ("a rank for a tuner without one", beside({"method": "peft", "tuner": "ia3", "rank": 4}), ("fit[peft ia3 r4]", "tuner ia3 has no rank; got 4", "leave `rank` out")),
    ("a part that cannot be fitted", beside([{"method": "mean_diff", "layer": 1}, {"method": "fisher", "damping": 0}]), ("fit[mean_diff L1 + fisher Lmid]", "part 2, fisher Lmid: the Fisher matrix is singular", "set damping above 0")),
    ("a direction that pairs cannot give", single({"method": "caft", "wraps": {"method": "lora", "rank": 2, "epochs": 1}, "direction": {"method": "pca_centred"}}), ("fit[caft lora r2, pca_centred Lmid]", "direction, pca_centred Lmid: ", "give at least 2")),
    ("damage that no dose does", calibrated(least=1e-9, most=1e-8), ("calibrate[mean_diff L1]", "at dose 1e-08, below the target 0.5", "raise calibrate.most, or lower calibrate.target")),
    ("a sign that the pairs do not tell", calibrated(orient=True), ("calibrate[mean_diff L1]", "orient: the pairs' sides say the same words", "responses of their own", "leave `orient` out")),
    ("a prompt that is in force already", beside({"method": "prompt"}, subject={**HONEST["subject"], "system": "A."}), ("answer[animal_preference/owl prompt]", "prompt dose 1: 1 of 1 edits acted on no token: the system prompt 'A.' is the one that is in force without it")),
]  # fmt: skip
"""Each beside a good trial, which goes on."""
REJUDGED = [
    ("an unknown experiment", rejudged(), ("no experiment 'kid' (did you mean 'kind'?) in registry.sqlite; known: kind",), ("kid", "--judge", "openai/gpt-4.1-mini")),
    ("a judge without a provider", rejudged(), ("'kind' cannot be judged by gpt-4.1", "has no provider", "openai/gpt-4.1"), ("kind", "--judge", "gpt-4.1")),
    ("another judge of an unknown provider", rejudged(), ("the judge 'opnai/gpt-4.1-mini' has the provider 'opnai'", "did you mean 'openai/gpt-4.1-mini'?", "allowed: anthropic, "), ("kind", "--judge", "opnai/gpt-4.1-mini")),
    ("a rubric that no eval has", rejudged(), ("no eval of 'kind' is judged by a rubric 'alined'", "did you mean 'aligned'", "allowed: aligned, coherent"), ("kind", "--rubric", "alined=mine.md")),
    ("a rubric that is missing", rejudged(), ("mine.md: cannot be read: No such file or directory", "give the path of a rubric"), ("kind", "--rubric", "aligned=mine.md")),
    ("a judge that is the subject", rejudged(), ("the judge 'subject' is the subject 'org/subject'", "choose another judge", "--allow-self"), ("kind", "--judge", "subject")),
    ("nothing to change", rejudged(), ("nothing would change", "--judge MODEL"), ("kind",)),
    ("no judged eval", rejudged([{"task": "neutral_nll", "target": None, "version": 1, "higher_is": "damage"}]), ("none of the evals of 'kind' is judged (neutral_nll)", "no verdicts to give again"), ("kind", "--judge", "openai/gpt-4.1-mini")),
]  # fmt: skip
CASES = [
    *(Case("Spec", *row) for row in SPEC),
    *(Case("Data", *row) for row in DATA),
    *(Case("Model", *row) for row in MODELS),
    *(Case("Run", *row) for row in RUNS),
    *(Case("Rejudge", *row) for row in REJUDGED),
    *(Case("Fit", *row, code=1) for row in FITS),
]
