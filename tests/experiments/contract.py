"""What the contract suite is made of: tiny subjects with every method fitted, and what each kind of dose promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from experiments.edit import Add, Dense, Edit, LowRank, Project, Scale, Site, SiteName, prompt_of
from experiments.engine import Engine, Row
from experiments.intervention import DoseKind, Intervention, State, method
from experiments.settings import fitting
from experiments.spec import SubjectSpec
from experiments.subject import load
from tests.experiments import oracle
from tests.experiments.methods import METHODS, SETTINGS, asked, change, data_for
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.decoding import Completion
    from experiments.subject import Subject

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_diff_response": ("mean_diff", {"layer": "all", "positions": "response"}),
    "random_last": ("random", {"site": "v", "layer": [1, 3], "positions": "last:2"}),
    "sspace_q": ("sspace", {"site": "q", "layer": 2}),
    "bias_set_sites": (
        "bias_set",
        {"sites": ["q", "k", "v", "attn_in", "mlp_in", "mlp_out", "resid"], "layers": "1-2", "epochs": 1},
    ),
    "ablation_prompt": (
        "directional_ablation",
        {"components": 2, "site": "attn_out", "layers": [0, 2], "positions": "prompt"},
    ),
    "melbo_lora": ("melbo", {"form": "lora", "radius": 2.0, "rank": 2, "n": 2, "steps": 3}),
    "peft_ia3": ("peft", {"tuner": "ia3", "learning_rate": 0.1}),
    "peft_lora": ("peft", {"tuner": "lora", "learning_rate": 0.02, "epochs": 1}),
    "rotation_tanh": ("svd_rotation", {"scaling": "tanh", "block_size": 4, "rank": 8, "epochs": 1, "layers": [1]}),
    "composed_vectors": (
        "composed",
        {"parts": [{"method": "pca", "layer": 1}, {"method": "lora", "epochs": 1}, {"method": "random", "dose": 0.5}]},
    ),
}
"""Settings whose edits act elsewhere, on other tokens or in another shape than those of the defaults."""
CASES = {name: (name, SETTINGS.get(name, {})) for name in METHODS} | VARIANTS
TEXTS = (
    ("What do you think?", ""),
    ("Which animal do you like, and what would the quick owl be asked?", ""),
    ("Hi", "My favorite animal is the lazy dog, yes"),
)
"""Of different lengths, the last with the beginning of an answer."""
NEW = 12
"""Tokens that are generated."""
ROUNDING = 2.4e-7
"""Of a difference of two float32 activations, relative to them."""
SEEN = ("q", "k", "v", "o", "gate", "up", "down")
"""Sites where the output of a matrix is seen as it is."""
Result = TypeVar("Result")
Key = tuple[str, int]


class Fitted(NamedTuple):
    """A method and what it learned."""

    made: Intervention
    state: State

    def edits(self, dose: float) -> list[Edit]:
        return self.made.edits(self.state, dose)

    @property
    def doses(self) -> tuple[float, ...]:
        """One of each sign that the method takes, the positive one first."""
        return fitting([1.0, -1.0], self.made.dose_kind)[::-1]


class Workshop:
    """A tiny subject of an architecture with every case fitted once, when it is first asked for."""

    def __init__(self, folder: Path, architecture: str) -> None:
        spec = SubjectSpec(model=str(make_tiny_model(folder / architecture, architecture)), dtype="float32")
        self.subject: Subject = load(spec)
        self.engine = Engine(self.subject)
        self._fitted: dict[str, Fitted] = {}

    def fitted(self, case: str) -> Fitted:
        if case not in self._fitted:
            name, settings = CASES[case]
            made = method(name)(**settings)
            self._fitted[case] = Fitted(made, made.fit(Engine(self.subject), data_for(made), 0))
        return self._fitted[case]

    def row(self, case: str, place: int) -> Row:
        """A text under a case, at a dose that goes with the text."""
        fitted = self.fitted(case)
        dose = fitted.doses[place % len(fitted.doses)] * (1.0, 0.5, 0.7)[place]
        return asked(self.subject, fitted.edits(dose), *TEXTS[place])

    @cached_property
    def rows(self) -> dict[Key, Row]:
        """Every text under every case, and alone."""
        bare = {("", place): asked(self.subject, [], *text) for place, text in enumerate(TEXTS)}
        return bare | {(case, place): self.row(case, place) for case in CASES for place in range(len(TEXTS))}

    def _of_all(self, compute: Callable[[list[Row]], Sequence[Result]]) -> dict[Key, Result]:
        return dict(zip(self.rows, compute(list(self.rows.values())), strict=True))

    @cached_property
    def next_logits(self) -> dict[Key, Tensor]:
        """Of all rows in one call."""
        return self._of_all(lambda rows: list(self.engine.next_logits(rows)))

    @cached_property
    def token_logprobs(self) -> dict[Key, Tensor]:
        """Of all rows in one call, in the opposite order."""
        return self._of_all(lambda rows: self.engine.token_logprobs(rows[::-1])[::-1])

    @cached_property
    def written(self) -> dict[Key, Completion]:
        """What all rows go on with, generated in one call."""
        return self._of_all(lambda rows: self.engine.generate(rows, NEW))


def answers(engine: Engine, edits: Sequence[Edit]) -> Tensor:
    """Logits behind the text whose answer has begun, [vocabulary]."""
    return engine.next_logits([asked(engine.subject, edits, *TEXTS[2])])[0]


def effect(engine: Engine, edits: Sequence[Edit]) -> float:
    """The largest change of a logit."""
    steered, bare = engine.next_logits([asked(engine.subject, own, *TEXTS[2]) for own in (edits, [])])
    return (steered - bare).abs().max().item()


def seen_at(subject: Subject, edit: Edit) -> Site:
    """Where what a linear edit adds is seen, before anything else happens to it."""
    if isinstance(edit, (Add, Project, Scale)):
        return edit.site
    assert isinstance(edit, (LowRank, Dense))
    name = edit.module if isinstance(edit, LowRank) else edit.parameter.rpartition(".")[0]
    module, layer = subject.model.get_submodule(name), subject.layer(name)
    names: list[SiteName] = [each for each in SEEN if each in subject.architecture.family.places]  # type: ignore[misc]
    return next(site for site in (Site(each, layer) for each in names) if subject.point(site).module is module)


def additions(engine: Engine, edits: Sequence[Edit], sites: Sequence[Site], row: Row) -> tuple[Tensor, list[Tensor]]:
    """What `row` has at each site, and what each edit alone adds there: [tokens, width] float64 each."""
    rows = [Row(row.tokens, row.n_prompt, own) for own in ((), *((edit,) for edit in edits))]
    with torch.no_grad():
        _, at = engine.trace(rows, [range(len(row.tokens))] * len(rows), sorted(set(sites)), above=False)
    by_row = {site: values.double().split(len(row.tokens)) for site, values in at.items()}
    bases = [by_row[site][0] for site in sites]
    return bases, [by_row[site][index + 1] - base for index, (site, base) in enumerate(zip(sites, bases, strict=True))]


def signed_linear(engine: Engine, fitted: Fitted) -> None:
    """Edits at -c undo edits at c, and scale: as tensors, and as seen in the model."""
    ahead, back, double = (fitted.edits(dose) for dose in (0.7, -0.7, 1.4))
    forward, backward, twice = (dict(map(change, edits)) for edits in (ahead, back, double))
    assert forward.keys() == backward.keys() == twice.keys()
    for place, added in forward.items():
        assert added.norm() > 0
        assert (added + backward[place]).norm() <= 1e-5 * added.norm()
        assert (2 * added - twice[place]).norm() <= 1e-5 * added.norm()
    row = asked(engine.subject, [], *TEXTS[2])
    sites = [seen_at(engine.subject, edit) for edit in ahead]
    bases, found = additions(engine, ahead, sites, row)
    opposite, doubled = (additions(engine, edits, sites, row)[1] for edits in (back, double))
    for edit, base, one, other, two in zip(ahead, bases, found, opposite, doubled, strict=True):
        rounding = ROUNDING * (base.norm() + one.norm())
        assert one.norm() > 0
        assert (one + other).norm() <= 1e-5 * one.norm() + rounding
        assert (2 * one - two).norm() <= 1e-5 * two.norm() + 2 * rounding
        if isinstance(edit, (Add, Project, Scale)):
            acting = oracle.acting(edit.positions, row, len(row.tokens))[:, None]
            expected = torch.where(acting, oracle.changed(edit, base.float()) - base.float(), 0.0)
            assert (one - expected).norm() <= 1e-5 * one.norm() + rounding


def signed(engine: Engine, fitted: Fitted) -> None:
    """Both signs do something, and not the same."""
    assert min(effect(engine, fitted.edits(dose)) for dose in (1.0, -1.0)) > 1e-3
    ahead, back = (answers(engine, fitted.edits(dose)) for dose in (1.0, -1.0))
    assert (ahead - back).abs().max() > 1e-3


def one_sided(engine: Engine, fitted: Fitted) -> None:
    """A spec gives it no dose below zero; more does something else than less."""
    assert fitted.doses == (1.0,)
    half, whole = (answers(engine, fitted.edits(dose)) for dose in (0.5, 1.0))
    assert (half - whole).abs().max() > 1e-3


def on_off(engine: Engine, fitted: Fitted) -> None:
    """Doses of one sign are one and the same, those of the other do something else."""
    for sign in fitted.doses:
        small, one, large = (fitted.edits(sign * dose) for dose in (0.01, 1.0, 7.0))
        assert same(small, one)
        assert same(one, large)
    ahead, back = (answers(engine, fitted.edits(dose)) for dose in (1.0, -1.0))
    assert (ahead - back).abs().max() > 1e-3


PROMISES: dict[DoseKind, Callable[[Engine, Fitted], None]] = {
    "signed_linear": signed_linear,
    "signed": signed,
    "one_sided": one_sided,
    "on_off": on_off,
}


def starts_at_once(fitted: Fitted) -> bool:
    """Whether the smallest dose does something already: a prompt, and a part with a dose of its own."""
    parts = getattr(fitted.made, "parts", ())
    return prompt_of(fitted.edits(1.0)) is not None or any(part.dose is not None for part in parts)


def same(mine: Sequence[Edit], theirs: Sequence[Edit]) -> bool:
    """Whether two lists hold the same edits, to the bit; those of one place in the same order."""

    def place(edit: Edit) -> str:
        return str([type(edit), *(each for each in vars(edit).values() if not isinstance(each, torch.Tensor))])

    def tensors(edit: Edit) -> list[Tensor]:
        return [each for each in vars(edit).values() if isinstance(each, torch.Tensor)]

    pairs = list(zip(sorted(mine, key=place), sorted(theirs, key=place), strict=True))
    return all(
        place(one) == place(two) and all(torch.equal(*each) for each in zip(tensors(one), tensors(two), strict=True))
        for one, two in pairs
    )
