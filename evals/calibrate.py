"""The dose that does a given damage: what makes interventions comparable.

Two measures. `kl`: at every position of the steered subject's own greedy answers to neutral prompts, KL(steered ||
untouched) = sum_t p_s(t) (log p_s(t) - log p_0(t)); the damage is a percentile over all positions of all answers, both
signs of a signed method together (steering-lite's iso-KL: 95th percentile of 20 tokens = 1 nat). `delta_nll`: the mean
rise of the neutral passages' NLL over the untouched subject, development families only, mean of both signs.

The search starts at the geometric middle of the allowed doses. The next one is where a straight line in log dose and
log damage, through the nearest two doses tried, meets the target; after one alone, where a damage that goes with the
dose's square does, as KL does near 0. It ends within the tolerance. Damage rises with the dose only roughly, so the
record says what was achieved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from evals import stats
from evals.tasks import neutral_nll
from experiments.dataset import Message
from experiments.datasets._bank import draw_prompts
from experiments.edit import Prompt, prompt_of
from experiments.parts import Calibrate

if TYPE_CHECKING:
    from experiments.dataset import Pair
    from experiments.edit import Edit
    from experiments.engine import Engine, Row
    from experiments.intervention import DoseKind

STEP = 8.0
"""The largest factor between a dose and the next while no bracket is found."""
TRIES = 16
ORIENTED_BY = 2
"""Fewest pairs that a sign is taken from."""
ROWS = 64
"""Answers whose distributions are held at once."""

EditsOf = Callable[[float], "Sequence[Edit]"]
Damage = Callable[[float], float]


class CalibrationError(ValueError):
    """A damage that no dose in reach does: what was found, and what to change."""


@dataclass(frozen=True)
class Calibrated:
    """`unit` is the dose that a dose of 1 in the spec means; `achieved` the damage it does.

    `met` is False where no dose came within the tolerance, or where the method has only one strength. `tried` are all
    doses with their damage.
    """

    unit: float
    achieved: float
    met: bool
    tried: list[tuple[float, float]] = field(default_factory=list)
    margin: float | None = None
    """Mean over pairs of how much a dose of +1 moves log p(positive) - log p(negative) against a dose of -1, nats, as
    the dose was before it was turned."""
    pairs: int = 0
    """How many pairs that is the mean of."""
    margin_se: float | None = None
    """Its standard error over pairs."""

    def facts(self) -> dict[str, Any]:
        """What a record keeps; damage that is not finite is None."""
        tried = [[dose, damage if math.isfinite(damage) else None] for dose, damage in self.tried]
        flipped = self.unit < 0
        return {
            "unit": self.unit,
            "achieved": self.achieved,
            "met": self.met,
            "flipped": flipped,
            "margin": self.margin,
            "margin_se": self.margin_se,
            "pairs": self.pairs,
            "tried": tried,
        }


def calibrate(
    engine: Engine, edits_of: EditsOf, kind: DoseKind, wanted: Calibrate, dev: float, pairs: Sequence[Pair] = ()
) -> Calibrated:
    """The dose at which `edits_of(dose)` does the damage that is `wanted`. `pairs` are needed to orient.

    Raises CalibrationError for damage out of reach, and for fewer than two pairs or pairs whose sides say the same.
    """
    signs = (1.0,) if kind == "one_sided" else (1.0, -1.0)
    kl = wanted.measure == "kl"
    damage = _kl(engine, edits_of, signs, wanted) if kl else _rise(engine, edits_of, signs, dev)
    if kind == "on_off":
        found = damage(1.0)
        near = abs(found - wanted.target) <= wanted.tolerance * wanted.target
        return Calibrated(1.0, found, near, [(1.0, found)])
    unit, tried = solve(damage, wanted)
    achieved = dict(tried)[unit]
    met = abs(achieved - wanted.target) <= wanted.tolerance * wanted.target
    if not wanted.orient or kind == "one_sided":
        return Calibrated(unit, achieved, met, tried)
    margins = _margins(engine, edits_of, unit, pairs)
    margin, error = float(margins.mean()), float(margins.std(ddof=1) / len(margins) ** 0.5)
    if not math.isfinite(margin):
        raise CalibrationError(f"orient: log-probabilities at dose {unit:g} are not finite; lower calibrate.target")
    return Calibrated(-unit if margin < 0 else unit, achieved, met, tried, margin, len(pairs), error)


def solve(damage: Damage, wanted: Calibrate) -> tuple[float, list[tuple[float, float]]]:
    """The dose whose damage is nearest to the target (in log), and all doses tried, ascending.

    Raises CalibrationError where even the largest dose does less, or the smallest does more.
    """
    tried: dict[float, float] = {}
    dose = math.sqrt(wanted.least * wanted.most)
    for _ in range(TRIES):
        dose = float(f"{dose:.6g}")
        tried[dose] = damage(dose)
        best = _nearest(tried, wanted.target)
        if abs(tried[best] - wanted.target) <= wanted.tolerance * wanted.target:
            break
        dose = _next(tried, wanted)
        if dose in tried:
            break
    return _nearest(tried, wanted.target), sorted(tried.items())


def _next(tried: dict[float, float], wanted: Calibrate) -> float:
    """The dose to try behind those tried. Raises CalibrationError at the ends of what is allowed."""
    doses = sorted(tried)
    above = next((index for index, dose in enumerate(doses) if not tried[dose] < wanted.target), len(doses))
    if 0 < above < len(doses):
        return _between(doses[above - 1], doses[above], tried, wanted.target)
    dose = doses[-1] if above else doses[0]
    found, end = tried[dose], wanted.most if above else wanted.least
    if dose == float(f"{end:.6g}"):
        least_or_most, position = ("most", "below") if above else ("least", "above")
        already, verb, other = ("", "raise", "lower") if above else (" already", "lower", "raise")
        raise CalibrationError(
            f"{wanted.measure} is {found:.3g} at dose {dose:g}, {position} the target {wanted.target:g}{already}; "
            f"{verb} calibrate.{least_or_most}, or {other} calibrate.target"
        )
    factor = _factor(tried, doses[-2:] if above else doses[1::-1], wanted.target)
    factor = min(STEP, max(1.25, factor)) if above else max(1 / STEP, min(0.8, factor))
    return min(wanted.most, dose * factor) if above else max(wanted.least, dose * factor)


def _factor(tried: dict[float, float], last: Sequence[float], target: float) -> float:
    """By how much to multiply the last of the doses, if damage goes on as between them, or with the square of one."""
    found = tried[last[-1]]
    if not 0 < found < math.inf:
        return STEP if found <= 0 else 1 / STEP
    power = 2.0
    if len(last) == 2 and 0 < tried[last[0]] < math.inf:
        power = max(0.5, math.log(found / tried[last[0]]) / math.log(last[1] / last[0]))
    return float((target / found) ** (1 / power))


def _between(low: float, high: float, tried: dict[float, float], target: float) -> float:
    """Where the line through both points meets the target, in logarithms; off the ends, so that every try helps."""
    under, over = tried[low], tried[high]
    share = 0.5
    if 0 < under < over < math.inf:
        share = (math.log(target) - math.log(under)) / (math.log(over) - math.log(under))
    share = min(0.9, max(0.1, share))
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def _nearest(tried: dict[float, float], target: float) -> float:
    def distance(dose: float) -> float:
        found = tried[dose]
        return abs(math.log(found / target)) if 0 < found < math.inf else math.inf

    return min(sorted(tried), key=distance)


def _kl(engine: Engine, edits_of: EditsOf, signs: Sequence[float], wanted: Calibrate) -> Damage:
    """Percentile of KL(steered || untouched) along the steered answers, of both signs together."""
    prompts = draw_prompts(wanted.prompts, None, seed=0)

    def damage(dose: float) -> float:
        arms = [tuple(edits_of(sign * dose)) for sign in signs]
        asked = [_asked(engine, text, edits) for edits in arms for text in prompts]
        answers = engine.generate([steered for steered, _ in asked], wanted.tokens)
        found: list[float] = []
        for at in range(0, len(asked), ROWS):
            values = answer_kl(engine, asked[at : at + ROWS], [answer.tokens for answer in answers[at : at + ROWS]])
            found += [value for each in values for value in each]
        return percentile(found, wanted.percentile)

    return damage


def answer_kl(engine: Engine, asked: Sequence[tuple[Row, Row]], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """KL(steered || untouched), nats, of the distributions in front of every token of each answer.

    `asked[i]` are the same question as the steered and as the untouched subject sees it. inf where a number is not
    finite: a broken forward pass is no small damage.
    """
    import torch

    from experiments.engine import Row

    rows, where = [], []
    for both, answer in zip(asked, answers, strict=True):
        for row in both:
            tokens = (*row.tokens, *answer)
            rows.append(Row(tokens, row.n_prompt, row.edits))
            where.append(range(len(row.tokens) - 1, len(tokens) - 1))
    found = []
    with torch.no_grad():
        states = engine.forward(rows, where).split([len(each) for each in where])
        for steered, untouched in zip(states[0::2], states[1::2], strict=True):
            log_s, log_0 = (engine.subject.head(each).log_softmax(-1) for each in (steered, untouched))
            kl = (log_s.exp() * (log_s - log_0)).sum(-1)
            found.append([value if math.isfinite(value) else math.inf for value in kl.tolist()])
    return found


def _asked(engine: Engine, text: str, edits: Sequence[Edit]) -> tuple[Row, Row]:
    """A neutral prompt under the arm's own system prompt, if it has one, and as the untouched subject sees it."""
    from experiments.engine import Row

    messages = [{"role": "user", "content": text}]
    prompt = prompt_of(edits) or Prompt()
    steered = engine.subject.render(messages, system=prompt.system, prefix=prompt.prefix or "")
    untouched = engine.subject.render(messages)
    inside = tuple(edit for edit in edits if not isinstance(edit, Prompt))
    return Row(steered.tokens, steered.n_prompt, inside), Row(untouched.tokens, untouched.n_prompt)


def percentile(values: Sequence[float], share: float) -> float:
    """numpy's linear percentile; inf when it falls on a value that is, NaN never."""
    return float(np.percentile(values, share, method="higher" if math.inf in values else "linear"))


def _rise(engine: Engine, edits_of: EditsOf, signs: Sequence[float], dev: float) -> Damage:
    """Mean rise of the neutral passages' NLL over both signs, nats per token."""
    texts = _development_passages(dev)
    base = _nll(engine, texts, [()])[0]

    def damage(dose: float) -> float:
        found = _nll(engine, texts, [tuple(edits_of(sign * dose)) for sign in signs])
        return float(np.mean(found)) - base

    return damage


def _development_passages(dev: float) -> list[str]:
    """The passages whose families choose doses in `neutral_nll`."""
    texts = neutral_nll.passages(neutral_nll.Settings())
    names = [f"passage-{number:03d}" for number in range(1, len(texts) + 1)]
    side = stats.split(names, dev)
    return [text for name, text in zip(names, texts, strict=True) if side[name] == "dev"]


def _nll(engine: Engine, texts: Sequence[str], arms: Sequence[Sequence[Edit]]) -> list[float]:
    """For each arm the mean over passages of nats per token; inf where a number is not finite."""
    request = Message(role="user", content=neutral_nll.REQUEST)
    rows = [_said(engine, [request], text, edits) for edits in arms for text in texts]
    each = [-float(values.double().mean()) for values in engine.token_logprobs(rows)]
    means = [float(np.mean(each[at : at + len(texts)])) for at in range(0, len(each), len(texts))]
    return [mean if math.isfinite(mean) else math.inf for mean in means]


def _margins(engine: Engine, edits_of: EditsOf, unit: float, pairs: Sequence[Pair]) -> np.ndarray:
    """For each pair half of what +unit instead of -unit adds to log p(positive) - log p(negative), nats per token.

    Both sides' words are read as answers to the neutral prompt, in the subject's own context.
    """
    if len(pairs) < ORIENTED_BY:
        raise CalibrationError(
            f"orient: a sign is not taken from {len(pairs)} pairs; give the trial data.pairs with at least "
            f"{ORIENTED_BY}, better many, or leave `orient` out"
        )
    if all(pair.positive.response == pair.negative.response for pair in pairs):
        raise CalibrationError(
            "orient: the pairs' sides say the same words, so nothing tells which way is positive; use pairs with "
            "responses of their own, or leave `orient` out"
        )
    margins = []
    for dose in (unit, -unit):
        edits = tuple(edits_of(dose))
        sides = [(pair, side) for pair in pairs for side in (pair.positive, pair.negative)]
        rows = [_said(engine, pair.messages, side.response, edits) for pair, side in sides]
        logs = np.array([float(values.double().mean()) for values in engine.token_logprobs(rows)])
        margins.append(logs[0::2] - logs[1::2])
    return np.asarray((margins[0] - margins[1]) / 2)


def _said(engine: Engine, asked: Sequence[Message], answer: str, edits: Sequence[Edit]) -> Row:
    """An answer as the assistant's words, under the arm's own system prompt, if it has one."""
    from experiments.engine import Row

    prompt = prompt_of(edits) or Prompt()
    messages = [*asked, Message(role="assistant", content=answer)]
    rendered = engine.subject.render(messages, system=prompt.system, prefix=prompt.prefix or "")
    return Row(rendered.tokens, rendered.n_prompt, tuple(edit for edit in edits if not isinstance(edit, Prompt)))
