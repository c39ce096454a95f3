"""The scores of an experiment, put together for `evals.compare`: also when some of them failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.detections import Detected, Detection
    from evals.items import Item
    from evals.table import Arm, Comparison, Eval, Group, Judging

ItemsOf = Callable[[str], "Sequence[Item] | str"]
"""Key of a score -> its items, or why there are none."""
ITSELF = "judged by the subject itself"


def comparison(params: Mapping[str, Any], inputs: Mapping[str, str], items_of: ItemsOf) -> Comparison:
    """What a `compare` node's params and inputs mean. Roles are `base/EVAL` and `TRIAL/EVAL/DOSE`."""
    from evals.table import Comparison

    names = eval_names(params["evals"])
    doses: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for role, key in inputs.items():
        where, *rest = role.split("/")
        if where not in ("base", "detect"):
            index, dose = int(rest[0]), float(rest[1])
            doses.setdefault((int(where), index), []).append((dose, key))
    return Comparison(
        evals=[
            _eval(each, name, items_of(inputs[f"base/{index}"]))
            for index, (each, name) in enumerate(zip(params["evals"], names, strict=True))
        ],
        groups=_groups(params["trials"], names, doses, items_of),
        budget=params["budget"]["delta_nll"],
        dev=params["split"]["dev"],
    )


def detections(
    params: Mapping[str, Any], inputs: Mapping[str, str], ranking_of: Callable[[str], Mapping[str, Any] | None]
) -> tuple[list[Detection], list[Detected]]:
    """What detectors said of each dataset, and how well each tells the trait from other candidates over all of them.

    `ranking_of` gives None where a detector has failed or has not run.
    """
    from evals.detections import detected, of_ranking

    found: list[Detection] = []
    for number, about in enumerate(params.get("detections", ())):
        ranking = ranking_of(inputs[f"detect/{number}"])
        if ranking is not None:
            found += of_ranking(ranking, **about)
    return found, detected(found)


def eval_names(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """`animal_preference/owl`; evals that differ in other settings alone are numbered."""
    names = [each["task"] + (f"/{each['target']}" if each["target"] else "") for each in evals]
    return [name if names.count(name) == 1 else f"{name} #{index + 1}" for index, name in enumerate(names)]


def _eval(each: Mapping[str, Any], name: str, base: Sequence[Item] | str) -> Eval:
    from evals.table import Eval

    found: Sequence[Item] = () if isinstance(base, str) else base
    judging = _judging(each)
    notes = [*each.get("notes", ()), *([ITSELF] if judging is not None and judging.itself else ())]
    if isinstance(base, str):
        notes.append(f"it failed: {base}")
    return Eval(
        name,
        each["version"],
        found,
        damage=each["higher_is"] == "damage",
        target=each["target"],
        notes=tuple(notes),
        judging=judging,
    )


def _judging(each: Mapping[str, Any]) -> Judging | None:
    """Who judged an eval's answers, as the plan wrote it down."""
    from evals.table import Judging

    if "judge" not in each:
        return None
    judge = each["judge"]
    return Judging(judge["digest"], judge["models"], each["rubrics"], each["scoring"], judge["itself"])


def _groups(
    trials: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    doses: Mapping[tuple[int, int], Sequence[tuple[float, str]]],
    items_of: ItemsOf,
) -> list[Group]:
    """Trials that differ in the seed alone, together."""
    from evals.table import Group

    arms: dict[str, dict[str, list[Arm]]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for number, trial in enumerate(trials):
        first.setdefault(trial["group"], trial)
        of_group = arms.setdefault(trial["group"], {name: [] for name in names})
        for index, name in enumerate(names):
            for dose, key in doses.get((number, index), ()):
                of_group[name].append(_arm(trial["seed"], dose, items_of(key)))
    return [
        Group(
            group,
            trial["method"],
            trial["label"],
            arms[group],
            trial["baseline"],
            trial.get("trait"),
            trial.get("reference"),
            trial.get("student"),
            trial.get("shared", False),
        )
        for group, trial in first.items()
    ]


def _arm(seed: int, dose: float, found: Sequence[Item] | str) -> Arm:
    from evals.table import Arm

    return Arm(seed, dose, None, found) if isinstance(found, str) else Arm(seed, dose, found)
