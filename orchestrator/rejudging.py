"""Judge an experiment's stored answers again: by other judges or rubrics, without asking the subject anything.

The graph is made from the records behind the experiment's comparison. Its keys are those that a spec with these judges
would have, so both ways of asking meet in the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.plugin import nearest
from experiments.spec import SubjectSpec
from orchestrator import bench, preflight
from orchestrator.gather import eval_names
from orchestrator.plan import STAGE_VERSIONS, Node, judged_score, judges
from orchestrator.versions import scores

if TYPE_CHECKING:
    from agents.judge import Judge
    from orchestrator.artifact import Store
    from orchestrator.bench import Bench
    from orchestrator.preflight import Identify
    from orchestrator.registry import Registry

COMPLETE = """
with named as (select key, complete, coalesce(answers, key) as answers, submitted_at from experiments where name = ?)
select key from named
where complete and answers = (select answers from named order by submitted_at desc, key limit 1)
order by submitted_at desc, key limit 1
"""


class RejudgeError(ValueError):
    """Answers that cannot be judged again as it was asked for."""


@dataclass(frozen=True)
class Wish:
    """Who is to judge, and how. What is not given stays as it was when the answers were judged last."""

    models: Sequence[str] = ()
    rubrics: Mapping[str, Path] = field(default_factory=dict)
    """Role -> file."""
    combine: str | None = None
    allow_self: bool = False


@dataclass(frozen=True)
class Rejudged:
    """The graph of an experiment under other judges: a `plan.Graph`."""

    name: str
    question: str
    nodes: Mapping[str, Node]
    trials: Sequence[Mapping[str, Any]]
    compare: str
    bench: Bench


def rejudged(
    name: str, wish: Wish, store: Store, registry: Registry, identify: Identify = preflight.identify
) -> Rejudged:
    """The latest complete version of the experiment `name`, its judged evals read as `wish` says.

    Raises RejudgeError, StoreError where results are gone, and what rubrics and subjects raise.
    """
    record = store.record(complete(name, registry))
    before = list(judged(record, store))
    if not before:
        names = ", ".join(eval_names(record["params"]["evals"]))
        raise RejudgeError(f"none of the evals of {name!r} is judged ({names}); there are no verdicts to give again")
    roles = {each.task: each.roles for each in before}
    judge = wished(name, wish, before[0].judge, {role for found in roles.values() for role in found})
    return _Graph(record, store, appointed(judge, before[0], roles, identify)).rejudged()


def complete(name: str, registry: Registry) -> str:
    """Key of the experiment's latest version that has all its scores. Raises RejudgeError."""
    found = registry.query(COMPLETE, [name])
    if found:
        return str(found[0]["key"])
    known = [row["name"] for row in registry.query("select distinct name from experiments order by name")]
    if name in known:
        raise RejudgeError(
            f"{name!r} is not complete: some of its scores are missing; submit its spec again (its answers are kept, "
            "and another judge can be written into it)"
        )
    raise RejudgeError(
        f"no experiment {name!r}{nearest(name, known)} in {registry.path}; known: {', '.join(known) or 'none'}"
    )


@dataclass(frozen=True)
class Before:
    """How one eval was judged."""

    task: str
    roles: tuple[str, ...]
    judge: Mapping[str, Any]
    """The settings."""
    subject: Mapping[str, Any]
    """Identity of the experiment's subject, without any system prompt of an eval's own."""
    subject_spec: SubjectSpec


def judged(record: Mapping[str, Any], store: Store) -> Iterator[Before]:
    """How each judged eval of a `compare` record was judged. Raises RejudgeError for a task that is another by now."""
    from evals.task import load_task

    for index, each in enumerate(record["params"]["evals"]):
        if "judge" not in each:
            continue
        score, task = store.record(record["inputs"][f"base/{index}"]), load_task(each["task"])
        then = score["params"]["task_version"]
        if then != task.VERSION:
            raise RejudgeError(
                f"eval {each['task']} is version {task.VERSION} now, and its answers are of version {then}; submit the "
                "spec again"
            )
        runtime, fit = store.record(score["inputs"]["judged"])["runtime"], _fit(record, store)
        spec = SubjectSpec.model_validate(fit["runtime"]["subject"])
        yield Before(each["task"], task.RUBRICS, runtime["judge"], fit["params"]["subject"], spec)


def _fit(record: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """The record of a fit: fits know the experiment's own subject."""
    key = next(key for role, key in scores(record["inputs"]).items() if not role.startswith("base/"))
    answer = store.record(store.record(key)["inputs"]["answer"])
    return store.record(answer["inputs"]["state"])


def wished(name: str, wish: Wish, before: Mapping[str, Any], roles: set[str]) -> Judge:
    """The judge's settings. Raises RejudgeError."""
    from pydantic import ValidationError

    from agents.judge import Judge

    for role in wish.rubrics:
        if role not in roles:
            raise RejudgeError(
                f"no eval of {name!r} is judged by a rubric {role!r}{nearest(role, sorted(roles))}; allowed: "
                f"{', '.join(sorted(roles))}"
            )
    changes: dict[str, Any] = {
        "rubrics": {**before["rubrics"], **{role: str(path) for role, path in wish.rubrics.items()}}
    }
    if wish.models:
        changes["models"] = list(wish.models)
    if wish.combine is not None:
        changes["combine"] = wish.combine
    if wish.allow_self:
        changes["allow_self"] = True
    try:
        return Judge.model_validate({**before, **changes})
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RejudgeError(f"{name!r} cannot be judged by {', '.join(wish.models)}: {said}") from error


def appointed(judge: Judge, before: Before, roles: Mapping[str, tuple[str, ...]], identify: Identify) -> Bench:
    """The judges, checked. Raises RejudgeError where one has no known provider or is the subject, RubricError,
    SubjectError.
    """
    from agents.judge import SUBJECT, is_subject
    from evals import RUBRICS

    for _, text in bench.strangers(judge.models):
        raise RejudgeError(text)
    model = before.subject_spec.model
    same = [name for name in judge.models if is_subject(name, model)]
    if same and not judge.allow_self:
        raise RejudgeError(
            f"the judge {same[0]!r} is the subject {model!r}, and would judge itself; choose another judge, or give "
            "--allow-self (every row will say so)"
        )
    used = bench.residents(judge, before.subject_spec)
    known = {name: dict(before.subject) if name == SUBJECT else identify(spec) for name, spec in used.items()}
    rubrics = {
        task: {role: one.digest for role, one in judge.rubrics_for(wanted, RUBRICS).items()}
        for task, wanted in roles.items()
    }
    return bench.Bench(bench.identity(judge, known), rubrics, bench.runtime(judge, used, model), bool(same))


class _Graph:
    """Recorded nodes, and new ones where the judges make a difference."""

    def __init__(self, record: Mapping[str, Any], store: Store, found: Bench) -> None:
        self.record = record
        self.store = store
        self.bench = found
        self.nodes: dict[str, Node] = {}

    def rejudged(self) -> Rejudged:
        params, evals = self.record["params"], self.record["params"]["evals"]
        inputs = {}
        for role, key in self.record["inputs"].items():
            where = role.split("/")
            of_eval = None if where[0] == "detect" else evals[int(where[1])]
            inputs[role] = self.again(key) if of_eval is not None and "judge" in of_eval else self.kept(key)
        changed = [{**each, **judges(self.bench, each["task"])} if "judge" in each else each for each in evals]
        runtime = self.record["runtime"]
        compare = self.add("compare", {**params, "evals": changed}, inputs, self.record["label"], runtime)
        name, question = self.record["label"], runtime.get("question", "")
        return Rejudged(name, question, self.nodes, params["trials"], compare, self.bench)

    def again(self, key: str) -> str:
        """Key of the score of the same answer under the new judges."""
        score = self.store.record(key)
        answer = self._recorded(score["inputs"]["answer"])
        return judged_score(self.add, self.bench, answer, score["label"], score["params"], score["runtime"])

    def kept(self, key: str) -> str:
        """Key of a score, or of what a detector said, that no judge has touched; with the answer behind it."""
        answer = self.store.record(key)["inputs"].get("answer")
        if answer is not None:
            self._recorded(answer)
        return self._recorded(key)

    def _recorded(self, key: str) -> str:
        found = self.store.record(key)
        about = (found["params"], found["inputs"], found["label"], found["runtime"])
        self.nodes.setdefault(key, Node(found["stage"], found["version"], *about))
        return key

    def add(
        self, stage: str, params: Mapping[str, Any], inputs: Mapping[str, str], label: str, runtime: Mapping[str, Any]
    ) -> str:
        node = Node(stage, STAGE_VERSIONS[stage], params, inputs, label, runtime)
        self.nodes.setdefault(node.key, node)
        return node.key
