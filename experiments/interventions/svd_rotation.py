"""SVD rotation: the singular directions of weights turned, and their singular values changed, by a signed dose.

The reversible adapter of InnerPiSSA (wassname 2025; later AntiPaSTO, arXiv 2601.07473): formulas and bounds are in
`experiments/rotation.py`. Dose -c turns back what dose c turns, R(-c) = R(c)', without being minus the same difference:
the dose is signed, not linear. It is trained through the engine as low-rank edits, which keep the subject as it is;
`experiments/svd_rotation.py` has the same adapter as a PEFT tuner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from experiments.depth import Depths
from experiments.edit import Edit, LowRank
from experiments.intervention import DoseKind, Needs, State
from experiments.taught import Taught
from experiments.training import TrainingError
from experiments.weights import linear_modules, transposed

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.rotation import Shape
    from experiments.students import Finish, Student
    from experiments.subject import Subject
    from experiments.training import Losses

BASES = ("u", "s", "v")


class SvdRotation(Taught):
    """Rotations within the leading singular directions of weights, trained on a loss of choice."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")
    dose_kind: ClassVar[DoseKind] = "signed"

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak step size of AdamW."""
    rank: int = Field(default=16, ge=1)
    """r: singular directions of each weight, those of the largest values."""
    rotate: Literal["v", "u", "both", "none"] = "both"
    """Which directions turn: those the weight reads (`v`), those it writes (`u`), both, or none."""
    scaling: Literal["exp", "tanh", "add", "none"] = "exp"
    """Singular values at dose c: S exp(c l), S (1 + c tanh l), S + c l, or unchanged."""
    max_angle: float = Field(default=45.0, gt=0, lt=180)
    """Degrees that no direction turns by more at dose 1; at dose c it is 2 atan(c tan(max_angle / 2))."""
    block_size: int | None = Field(default=None, ge=2)
    """Directions that turn among themselves, neighbours by singular value; must divide `rank`; null is all."""
    init_std: float = Field(default=0.002, ge=0)
    """Spread of the random parameters that training starts from."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last names of linear modules to adapt, e.g. [[o_proj, down_proj]]; null is all those of the decoder layers."""
    layers: Depths = "all"
    """Decoder layers: a number (-1 is the last), a fraction of the depth, `all`, a range, a pattern, or several."""

    def begin(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> tuple[Student, Finish]:
        """Bases `MODULE.u` [d_out, r], `MODULE.s` [r] and `MODULE.v` [d_in, r]; parameters `MODULE.theta_u` and
        `MODULE.theta_v` [blocks, size, size] and `MODULE.lambda` [r].

        Raises TrainingError for targets, ranks and blocks that the subject's weights do not have, DepthError for layers
        it lacks.
        """
        from experiments.students import Student

        objective = self.objective(engine, data, seed)
        shape = self._shape_of_core()
        bases, parameters = self._begin(engine.subject, shape, seed)
        leaves = [tensor for own in parameters.values() for tensor in own.values()]

        def edits_of(dose: float = 1.0) -> list[Edit]:
            return _edits(shape, bases, parameters, dose)

        def finish(losses: Losses) -> State:
            kept = {name: bases[name] | parameters[name] for name in bases}
            tensors = {f"{name}.{key}": each.detach().cpu() for name, own in kept.items() for key, each in own.items()}
            angle = max(shape.angle(own) for own in parameters.values())
            return State(tensors, {**losses.facts(), "largest_angle": round(angle, 3)})

        return Student(objective, leaves, edits_of, self, seed), finish

    def _shape_of_core(self) -> Shape:
        from experiments.rotation import RotationError, Shape

        try:
            return Shape(self.rank, self.rotate, self.scaling, self.max_angle, self.block_size)
        except RotationError as error:
            raise TrainingError(str(error)) from error

    def _begin(
        self, subject: Subject, shape: Shape, seed: int
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """Bases and trainable parameters of every module."""
        import torch

        from experiments.rotation import RotationError, initial, singular_basis

        generator = torch.Generator().manual_seed(seed)
        bases, parameters = {}, {}
        for name, module in linear_modules(subject, self.targets, self.layers).items():
            weight = module.get_parameter("weight")
            try:
                found = singular_basis(weight.T if transposed(module) else weight, shape.rank)
            except RotationError as error:
                raise TrainingError(f"{name}: {error}; lower rank, or choose other targets") from error
            bases[name] = dict(zip(BASES, found, strict=True))
            start = initial(shape, self.init_std, generator)
            parameters[name] = {key: value.to(subject.device).requires_grad_() for key, value in start.items()}
        return bases, parameters

    def edits(self, state: State, dose: float) -> list[Edit]:
        bases: dict[str, dict[str, Tensor]] = {}
        parameters: dict[str, dict[str, Tensor]] = {}
        for place, tensor in state.tensors.items():
            name, _, key = place.rpartition(".")
            (bases if key in BASES else parameters).setdefault(name, {})[key] = tensor
        return _edits(self._shape_of_core(), bases, parameters, dose)

    def label(self) -> str:
        return f"svd_rotation r{self.rank} {self.rotate}+{self.scaling}{self.told()}"


def _edits(
    shape: Shape, bases: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Mapping[str, Tensor]], dose: float
) -> list[Edit]:
    """U core V' of every module at `dose`; [] at dose 0. Each has rank r."""
    if dose == 0:
        return []
    cores = {name: shape.core(own["s"], parameters[name], dose) for name, own in bases.items()}
    return [LowRank(name, cores[name] @ own["v"].T, own["u"]) for name, own in bases.items()]
