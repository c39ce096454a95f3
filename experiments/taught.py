"""Settings of a trained intervention that may choose its loss, and the objective they mean."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from experiments.dataset import Pair
from experiments.depth import DepthError, Depths, layers
from experiments.intervention import Needs, first_of, method_name
from experiments.training import Likelihood, Objective, Trained, TrainingError, read_aloud, row
from experiments.weights import lacking

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine, Row
    from experiments.outline import Outline
    from experiments.separation import Shape

Loss = Literal["likelihood", "promotion", "suppression", "satisficing", "dpo", "contrastive", "distil"]
Form = Literal["raw", "logsigmoid", "tanh"]
Kind = Literal["mean", "pca", "singular"]


class Taught(Trained):
    """Settings of the loop and of the loss that it lowers. What each loss is: `experiments/losses.py`, `separation.py`.

    A pair's responses are taught in the subject's own context, without the persona; `contrastive` shows each side under
    its own.
    """

    heeds_masks: ClassVar[bool] = True

    loss: Loss = "likelihood"
    """What is lowered: -log p per token of responses (`likelihood`) or per response (`promotion`); `suppression` of
    negative responses; `satisficing`, up to a goal; `dpo`; `contrastive` separation of hidden states; `distil`,
    KL(teacher || student) over the options of choices."""
    goal: float | None = Field(default=None, le=0)
    """satisficing: log-probability to reach, nats per token; null is what each response has under its own persona."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: how much a nat of preference counts; small allows to go far from the untouched subject."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of KL(edited || base) per token on other text, added to any loss; above 0 makes a narrow solution."""
    kl_prompts: Path | None = None
    """kl: text file with one user prompt a line, which the subject answers first; null takes the built-in bank. Prompts
    of the training data are left out."""
    kl_n: int = Field(default=16, ge=1)
    """kl: how many prompts, drawn by the seed."""
    read: Depths | None = None
    """contrastive: layers whose outputs are read; null is the third from the top, but above the middle."""
    last: int = Field(default=3, ge=1)
    """contrastive: tokens at the end of each response that are read."""
    direction: Kind = "mean"
    """contrastive: the frozen direction: the mean difference, the principal direction most in line with it, or the mean
    difference within the singular basis of the weight that writes to the layer's output."""
    direction_rank: int | None = Field(default=None, ge=1)
    """contrastive: principal directions to choose from (null: all, at most 100), or singular ones kept (null: a
    quarter)."""
    separation: Form = "logsigmoid"
    """contrastive: the gain itself (`raw`), a soft margin (`logsigmoid`) or a bound (`tanh`)."""
    margin: float = Field(default=1.0, gt=0)
    """contrastive: gain at which `logsigmoid` has half of its pull, or that bounds `tanh`, in mean differences."""
    sharpness: float = Field(default=1.0, gt=0)
    """contrastive: how sharply `logsigmoid` turns at the margin."""
    raw_units: bool = False
    """contrastive: measure gains in activation units, as published, instead of mean differences."""
    coherence: float = Field(default=4.0, ge=0)
    """contrastive: weight of the hinge on log-probabilities lost; 0 leaves it out."""
    trust: float = Field(default=1.5, ge=0)
    """contrastive: nats that a token's log-probability may lose before the hinge pulls."""

    @property
    def joins(self) -> bool:
        """Only the likelihood of responses is lowered for several students at once."""
        return super().joins and self.loss == "likelihood" and not self.kl

    def takes(self, offered: Collection[str]) -> tuple[Needs, ...]:
        """Choices for `distil`; else conversations where there are any, for losses that raise what is said in them.

        The likelihood may also be that of documents, where there are no conversations.
        """
        if self.loss == "distil":
            return first_of(("choices",), offered, method_name(type(self)))
        spoken = self.loss in ("likelihood", "promotion")
        wanted: tuple[Needs, ...] = ("conversations", "pairs") if spoken else ("pairs", "conversations")
        if self.loss == "likelihood":
            wanted = ("conversations", "documents", "pairs")
        return first_of(wanted, offered, method_name(type(self)))

    def objective(self, engine: Engine, data: Sequence[Any], seed: int) -> Objective:
        """The objective, whose references are read from the subject as it is now: ask before changing it.

        Raises TrainingError for a loss that needs pairs and gets none, DatasetError for prompts that cannot be used,
        DepthError for layers the subject lacks, FitError for pairs without a difference.
        """
        found = self._main(engine, data)
        if not self.kl or not found.examples:
            return found
        from experiments.losses import Narrow

        return Narrow(found, self._others(engine, data, seed), self.kl)

    def _main(self, engine: Engine, data: Sequence[Any]) -> Objective:
        if self.loss == "likelihood":
            return Likelihood(tuple(row(engine, each) for each in read_aloud(data)))
        from experiments import losses

        if self.loss == "distil":
            return losses.distillation(engine, data)
        if self.loss == "satisficing":
            return losses.satisficing(engine, data, self.goal)
        if self.loss == "dpo":
            return losses.preference(engine, self._pairs(data), self.beta)
        if self.loss == "contrastive":
            from experiments.separation import contrastive

            depths = self._read_at(engine.subject.n_layers)
            return contrastive(engine, self._pairs(data), depths, self.direction, self.direction_rank, self._shape())
        if self.loss == "suppression":
            said = [each.negative.response if isinstance(each, Pair) else None for each in data]
            return losses.Suppression(tuple(losses.answer(engine, *each) for each in zip(data, said, strict=True)))
        return losses.Promotion(tuple(losses.answer(engine, each) for each in data))

    def _pairs(self, data: Sequence[Pair | Conversation]) -> list[Pair]:
        pairs = [each for each in data if isinstance(each, Pair)]
        if len(pairs) < len(data):
            raise TrainingError(f"loss {self.loss} learns from pairs and got conversations; give data.pairs")
        return pairs

    def _read_at(self, n_layers: int) -> tuple[int, ...]:
        if self.read is None:
            return (min(n_layers - 1, max(n_layers - 3, n_layers // 2 + 1)),)
        return layers(self.read, n_layers)

    def _shape(self) -> Shape:
        from experiments.separation import Shape

        return Shape(
            self.separation, self.margin, self.sharpness, self.raw_units, self.last, self.coherence, self.trust
        )

    def _others(self, engine: Engine, data: Sequence[Any], seed: int) -> tuple[Row, ...]:
        """The subject's own answers to prompts that are not in `data`."""
        from experiments.datasets import _bank
        from experiments.losses import unrelated

        avoid = {message.content for each in data for message in getattr(each, "messages", ())}
        return unrelated(engine, _bank.lines(self.kl_prompts or _bank.PROMPTS), self.kl_n, avoid, seed)

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Also the layers a loss reads, and the matrices that `targets` name."""
        problems = super().misplaced(outline)
        try:
            layers(self.read, outline.n_layers)
        except DepthError as error:
            problems["read"] = str(error)
        targets = getattr(self, "targets", None) or ()
        if outline.linears and (problem := lacking(targets, outline.linears)):
            problems["targets"] = problem
        return problems

    def told(self) -> str:
        """The loss as part of a label; nothing for the default."""
        return ("" if self.loss == "likelihood" else f" {self.loss}") + (f" kl{self.kl:g}" if self.kl else "")
