"""Vectors without labels, against the published loop around plain transformers, dense linear algebra and hand sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.behaviours import clusters, deduplicated, effects
from experiments.contrast import FitError
from experiments.dataset import recipe
from experiments.depth import DepthError
from experiments.directions import own_seed
from experiments.downstream import Cell, Downstream, downstream
from experiments.edit import Add, LowRank, Site
from experiments.intervention import State, method
from experiments.interventions.dct import Factors
from experiments.outline import Outline
from experiments.radius import calibrate
from experiments.spheres import Sphere, ascend, drawn, orthogonal
from experiments.training import read_aloud
from experiments.unsupervised import prompts_of

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine

PAIRS: list[Any] = list(
    recipe("persona_pairs")(positive="You are a wizard.", negative="You are a clerk.", n=6, responses="shared").build(
        None, 0
    )
)
SOURCE, D = 1, 32
BRIEF = {"radius": 2.0, "n": 3, "controls": 1, "prompts": 1, "held_out": 1}


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def cosine(a: Any, b: Any) -> float:
    return float(a.double() @ b.double() / (a.norm() * b.norm()).double())


def plain(engine: Engine, tokens: tuple[int, ...], theta: Tensor | None, targets: tuple[int, ...]) -> list[Tensor]:
    """Outputs [tokens, d] of the target blocks with `theta` added to the source layer's MLP, by transformers alone."""
    blocks = engine.subject.model.model.layers
    found: dict[int, Tensor] = {}
    handles = [
        blocks[t].register_forward_hook(
            lambda _, __, out, t=t: found.__setitem__(t, (out[0] if isinstance(out, tuple) else out)[0])
        )
        for t in targets
    ]
    if theta is not None:
        handles.append(blocks[SOURCE].mlp.register_forward_hook(lambda _, __, out: out + theta))
    try:
        engine.subject.model(torch.tensor([tokens]))
    finally:
        for handle in handles:
            handle.remove()
    return [found[t] for t in targets]


def mean_change(engine: Engine, rows: list[Any], theta: Tensor, target: int, last: int) -> Tensor:
    """D(theta) by transformers alone."""
    found: Tensor = torch.zeros(())
    for row in rows:
        moved = plain(engine, row.tokens, theta, (target,))[0] - plain(engine, row.tokens, None, (target,))[0].detach()
        found = found + moved[-last:].mean(0) / len(rows)
    return found


def rows_of(engine: Engine, n: int) -> list[Any]:
    return [row for _, row in prompts_of(engine, PAIRS, n)]


def effect_of(engine: Engine, n: int, tokens: str | int = "last:3", target: int = 3) -> Downstream:
    return downstream(engine, rows_of(engine, n), [Site("resid", target)], tokens)


def dense(engine: Engine, rows: list[Any], target: int, last: int) -> Tensor:
    """J(0) [D, d] by transformers alone."""
    return torch.autograd.functional.jacobian(
        lambda theta: mean_change(engine, rows, theta, target, last), torch.zeros(D)
    )


# the sphere


def test_norms_are_exact_and_vectors_orthogonal(engine: Engine) -> None:
    made: Any = method("melbo")(orthogonal=True, steps=12, **BRIEF | {"n": 6, "radius": 3.7})
    state = made.fit(engine, PAIRS, 0)
    for each in (state.tensors["vectors"], state.tensors["random.vectors"]):
        torch.testing.assert_close(each.double().norm(dim=1), torch.full((len(each),), 3.7).double(), rtol=1e-6, atol=0)
    units = state.tensors["vectors"].double() / 3.7
    assert (units @ units.T - torch.eye(6).double()).abs().max() <= 1e-5
    apart = method("melbo")(steps=12, **BRIEF | {"radius": 3.7}).fit(engine, PAIRS, 0).tensors["vectors"]
    assert cosine(state.tensors["vectors"][0], apart[0]) >= 0.99999  # the first has none before it
    assert cosine(state.tensors["vectors"][1], apart[1]) < 0.999


def test_gram_schmidt_keeps_order_and_sides() -> None:
    vectors = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    found = orthogonal(vectors)
    expected: list[Tensor] = []
    for vector in vectors.double():
        rest = vector - sum((each * (each @ vector) for each in expected), torch.zeros(9).double())
        expected.append(rest / rest.norm())
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(FitError, match="10 orthogonal vectors do not fit into 9 dimensions"):
        orthogonal(torch.randn(10, 9))


def published(objective: Any, start: Tensor, radius: float, steps: int, rate: float) -> tuple[Tensor, list[float]]:
    """The published loop for one vector, written out: tangent gradient, AdamW, back to the sphere."""
    theta = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([theta], lr=rate, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    values = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = objective(theta)
        (-value).backward()
        assert theta.grad is not None
        theta.grad -= (theta.grad @ theta.data) * theta.data / radius**2
        optimiser.step()
        theta.data = torch.nn.functional.normalize(theta.data, dim=0) * radius
        values.append(value.item())
    return theta.detach(), values


def test_on_a_toy_mlp_the_objective_rises_and_every_vector_is_that_of_the_published_loop() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(16, 16, generator=random) / 4 for _ in range(2))
    at = torch.randn(5, 16, generator=random)

    def z(theta: Tensor) -> Tensor:
        return torch.tanh((at + theta) @ first) @ second

    def worth(theta: Tensor) -> Tensor:
        return (z(theta) - z(torch.zeros(16))).norm(dim=1).pow(2).sum().sqrt()

    starts = drawn([16], 1.5, [3, 4, 5])
    leaf = starts.clone().requires_grad_()

    def objective() -> Tensor:
        values = torch.stack([worth(theta) for theta in leaf])
        (-values.sum()).backward()
        return values.detach()

    curve = ascend([Sphere(leaf, 1.5, 1e-3)], objective, 60)
    assert (curve.diff(dim=0) > 0).all()
    for index, start in enumerate(starts):
        alone, values = published(worth, start, 1.5, 60, 1e-3)
        assert cosine(leaf[index].detach(), alone) >= 1 - 1e-6
        torch.testing.assert_close(curve[:, index], torch.tensor(values), rtol=1e-5, atol=1e-6)


class Toy:
    """Prompts and targets of a toy map theta -> Z [tokens, width] each, as `Downstream` gives them."""

    def __init__(self, maps: list[list[Callable[[Tensor], Tensor]]]) -> None:
        self.maps = maps
        self.engine: Any = SimpleNamespace(
            subject=SimpleNamespace(device="cpu", point=lambda _: SimpleNamespace(width=16))
        )

    def changes(self, arms: Sequence[Any]) -> Iterator[list[Cell]]:
        zero = torch.zeros(16)
        for index, targets in enumerate(self.maps):
            yield [
                Cell(arm, index, tuple(z(edit.vector) - z(zero) for z in targets)) for arm, (edit,) in enumerate(arms)
            ]

    def search(self, seed: int = 0, **settings: Any) -> Any:
        made: Any = method("melbo")(radius=1.5, **settings)
        return made.search(self.engine, self, Site("mlp_out", 0), seed)


def layer(seed: int, tokens: int) -> Callable[[Tensor], Tensor]:
    """A toy MLP whose input of `tokens` rows is shifted by theta."""
    random = torch.Generator().manual_seed(seed)
    first, second, at = (torch.randn(n, 16, generator=random) / 4 for n in (16, 16, 4 * tokens))
    return lambda theta: torch.tanh((4 * at[:tokens] + theta) @ first) @ second


@pytest.mark.parametrize(("p", "q"), [(2.0, None), (2.0, 1.0), (4.0, None), (3.0, 1.5), (1.0, 2.0)])
def test_on_a_toy_mlp_a_search_maximises_the_formula_for_every_exponent(p: float, q: float | None) -> None:
    maps = [[layer(1, 3), layer(2, 3)], [layer(3, 5), layer(4, 5)]]  # two prompts, two targets

    def worth(theta: Tensor) -> Tensor:
        total = torch.zeros(())
        for targets in maps:
            for z in targets:
                change = z(theta) - z(torch.zeros(16))
                lengths = [sum(number**2 for number in token) ** 0.5 for token in change]
                total = total + sum(length**p for length in lengths) ** (1 / (q or p))
        return total

    found = Toy(maps).search(n=2, controls=3, steps=25, learning_rate=2e-3, p=p, q=q)
    objective = torch.tensor(found.facts["objective"])
    assert (objective.diff() > 0).all()
    for index in range(2):
        start = drawn([16], 1.5, [own_seed(0, index)])[0]
        alone, values = published(worth, start, 1.5, 25, 2e-3)
        assert cosine(found.vectors["vectors"][index], alone) >= 1 - 1e-6
        assert cosine(start, alone) < 0.9999
        assert found.facts["first"][index] == pytest.approx(values[0], rel=1e-4)
    norms = torch.cat([found.vectors["vectors"], found.controls["vectors"]]).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((5,), 1.5))


def test_where_the_map_is_linear_orthogonal_vectors_are_its_singular_vectors_in_order() -> None:
    random = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(16, 16, generator=random))[0] for _ in range(2))
    values = torch.tensor([5.0, 4, 3, 2] + [0.5] * 12)
    matrix = left @ values.diag() @ right.T
    toy = Toy([[lambda theta, n=n: (matrix @ theta).expand(n, 16)] for n in (3, 7)])
    found = toy.search(n=3, steps=400, orthogonal=True, learning_rate=0.02)
    vectors = found.vectors["vectors"]
    assert (vectors.double() @ vectors.double().T / 1.5**2 - torch.eye(3).double()).abs().max() <= 1e-5
    for index in range(3):
        assert abs(cosine(vectors[index], right[:, index])) >= 0.999
    best = 1.5 * (3**0.5 + 7**0.5) * values[:3].mean().item()  # R s_k sqrt(tokens), over prompts, a vector on average
    assert found.facts["objective"][-1] == pytest.approx(best, rel=1e-3)
    free = toy.search(n=3, steps=400, learning_rate=0.02).vectors["vectors"]
    assert all(abs(cosine(vector, right[:, 0])) >= 0.999 for vector in free)  # each for itself: all find the first


def test_a_value_that_is_not_finite_is_told_with_its_step() -> None:
    leaf = drawn([4], 1.0, [0]).requires_grad_()

    def objective() -> Tensor:
        leaf.grad = torch.full((1, 4), torch.nan)
        return torch.ones(1)

    with pytest.raises(FitError, match="step 1 of 3: the objective or its gradient is not finite"):
        ascend([Sphere(leaf, 1.0, 0.1)], objective, 3)


# the objective


def test_the_strength_of_a_change_is_the_formula_and_token_norm_the_published_value() -> None:
    change = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])  # norms 5, 2, 10 over the hidden dimension
    melbo = method("melbo")
    assert melbo(p=4).strength(change) == pytest.approx((5**4 + 2**4 + 10**4) ** 0.25)
    assert melbo(p=4, token_norm=True).strength(change) == pytest.approx(((9 + 36) ** 2 + (16 + 4 + 64) ** 2) ** 0.25)
    assert melbo(p=2, q=1).strength(change) == pytest.approx(25 + 4 + 100)
    assert melbo(p=2, q=1, token_norm=True).strength(change) == pytest.approx(25 + 4 + 100)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": 3, "target_tokens": "all"},
        {"targets": (2, 3), "target_tokens": -3, "p": 4.0, "q": 1.0},
        {"targets": 2, "target_tokens": "last:5", "p": 4.0, "token_norm": True},
    ],
)
def test_vectors_trained_together_are_those_of_the_published_loop_around_plain_transformers(
    engine: Engine, settings: dict[str, Any]
) -> None:
    made: Any = method("melbo")(
        source=SOURCE, steps=12, learning_rate=0.01, **BRIEF | {"n": 2, "prompts": 2, "held_out": 1} | settings
    )
    state = made.fit(engine, PAIRS, 7)
    targets = made.targets if isinstance(made.targets, tuple) else (made.targets,)
    first = {"all": 0, -3: -3, "last:5": -5}[made.target_tokens]
    rows = rows_of(engine, 3)
    base = [[z.detach() for z in plain(engine, row.tokens, None, targets)] for row in rows]

    def worth(theta: Tensor, prompts: list[int]) -> Tensor:
        total = torch.zeros(())
        for i in prompts:
            for z, before in zip(plain(engine, rows[i].tokens, theta, targets), base[i], strict=True):
                norms = (z - before)[first:].norm(dim=0 if made.token_norm else 1)
                total = total + norms.pow(made.p).sum().pow(1 / (made.q or made.p))
        return total

    table = state.facts["generalisation"]
    assert table["held_out"] == [False, False, True]
    for index in range(2):
        start = drawn([D], 2.0, [own_seed(7, index)])[0]
        alone, values = published(lambda theta: worth(theta, [0, 1]), start, 2.0, 12, 0.01)
        assert cosine(start, alone) < 0.999
        assert cosine(state.tensors["vectors"][index], alone) >= 0.999
        assert state.facts["first"][index] == pytest.approx(values[0], rel=1e-4)
        with torch.no_grad():
            for prompt in range(3):
                assert table["vectors"][index][prompt] == pytest.approx(worth(alone, [prompt]).item(), rel=1e-3)
    assert state.facts["objective"][-1] > state.facts["objective"][0]


def test_a_vector_does_not_depend_on_how_many_are_trained_beside_it(engine: Engine) -> None:
    many, one = (method("melbo")(steps=10, **BRIEF | {"n": n}).fit(engine, PAIRS, 0).tensors["vectors"] for n in (5, 1))
    assert cosine(many[0], one[0]) >= 0.99999
    torch.testing.assert_close(many[0], one[0], rtol=1e-3, atol=1e-3)


def test_vectors_are_rows_of_one_batch_that_share_what_is_below_the_source_and_end_at_the_target(
    engine: Engine,
) -> None:
    effect = effect_of(engine, 2, "all", target=2)
    seen: dict[int, list[int]] = {index: [] for index in range(4)}
    handles = [
        block.register_forward_pre_hook(lambda _, inputs, index=index: seen[index].append(inputs[0].shape[1]))
        for index, block in enumerate(engine.subject.blocks)
    ]
    vectors = drawn([D], 1.0, list(range(5))).requires_grad_()
    try:
        (cells,) = effect.changes(method("melbo")().put(Site("mlp_out", SOURCE))(vectors))  # type: ignore[attr-defined]
    finally:
        for handle in handles:
            handle.remove()
    texts = [row.tokens for row in effect.prompts]
    shared = next(index for index, both in enumerate(zip(*texts, strict=False)) if len(set(both)) > 1)
    once = sum(map(len, texts)) - shared  # what both prompts begin with is computed once as well
    assert seen == {0: [once], 1: [once * 5], 2: [once * 5], 3: []}
    assert len(cells) == 5 * 2


def test_passes_of_few_tokens_give_the_same_vectors(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = method("melbo")(steps=5, **BRIEF).fit(engine, PAIRS, 0)
    monkeypatch.setattr("experiments.downstream.TOKENS", 100)
    parts = method("melbo")(steps=5, **BRIEF).fit(engine, PAIRS, 0)
    torch.testing.assert_close(whole.tensors["vectors"], parts.tensors["vectors"], rtol=1e-4, atol=1e-4)
    assert whole.facts["objective"] == pytest.approx(parts.facts["objective"], rel=1e-4)


def test_only_prompts_are_used(engine: Engine) -> None:
    made = method("melbo")(steps=2, **BRIEF)
    first, second = (made.fit(engine, data, 0) for data in (PAIRS, read_aloud(PAIRS)))
    assert torch.equal(first.tensors["vectors"], second.tensors["vectors"])
    again = [pair.model_copy(update={"id": f"again {pair.id}"}) for pair in PAIRS[:1]]
    names = [name for name, _ in prompts_of(engine, [*PAIRS[:1], *again, *PAIRS[1:2]], 3)]
    assert names == [PAIRS[0].id, PAIRS[1].id]


def test_the_lora_form_is_a_change_of_the_weight_with_unit_factors(engine: Engine) -> None:
    made: Any = method("melbo")(form="lora", rank=2, steps=10, source=SOURCE, targets=3, target_tokens="all", **BRIEF)
    state = made.fit(engine, PAIRS, 0)
    for name in ("a", "b", "random.a", "random.b"):
        torch.testing.assert_close(state.tensors[name].norm(dim=-1), torch.ones(state.tensors[name].shape[:-1]))
    assert state.facts["objective"][-1] > state.facts["objective"][0] * 1.1
    (edit,) = made.edits(state, 1.0)
    assert isinstance(edit, LowRank)
    a, b = state.tensors["a"][0], state.tensors["b"][0]
    change = (2.0 / 2) * (torch.outer(b[0], a[0]) + torch.outer(b[1], a[1]))
    torch.testing.assert_close(edit.b @ edit.a, change)
    row = rows_of(engine, 1)[0]
    weight = engine.subject.model.get_submodule(edit.module).weight
    with torch.no_grad():
        before = plain(engine, row.tokens, None, (3,))[0]
        weight += change
        after = plain(engine, row.tokens, None, (3,))[0]
        weight -= change
    assert state.facts["generalisation"]["vectors"][0][0] == pytest.approx((after - before).norm().item(), rel=1e-3)


def test_a_trial_applies_the_vector_it_names(engine: Engine) -> None:
    state = method("melbo")(steps=1, **BRIEF).fit(engine, PAIRS, 0)
    made: Any = method("melbo")(steps=1, vector=2, **BRIEF)
    (edit,) = made.edits(state, -0.5)
    assert isinstance(edit, Add)
    assert edit.site == Site("mlp_out", 1)
    assert torch.equal(edit.vector, -0.5 * state.tensors["vectors"][2])
    (chance,) = method("melbo")(control=True, **BRIEF).edits(state, 1.0)
    assert torch.equal(chance.vector, state.tensors["random.vectors"][0])  # type: ignore[union-attr]
    assert made.label() == "melbo L0.25 v2"


@pytest.mark.parametrize("name", ["melbo", "dct"])
def test_a_fit_does_not_look_at_which_vector_is_applied(name: str, engine: Engine) -> None:
    brief = BRIEF | ({"steps": 2} if name == "melbo" else {"iterations": 1})
    assert method(name).applied == {"vector", "control"}
    one = method(name)(**brief).fit(engine, PAIRS, 0)
    for applied in ({"vector": 2}, {"control": True}):
        other = method(name)(**brief | applied).fit(engine, PAIRS, 0)
        assert one.facts == other.facts
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


# derivatives, radius, factors


def test_derivatives_are_those_of_dense_differentiation(engine: Engine) -> None:
    effect, rows = effect_of(engine, 2), rows_of(engine, 2)
    put = method("dct")().put(Site("mlp_out", SOURCE))  # type: ignore[attr-defined]
    v, u = drawn([D], 1.0, [1, 2]), drawn([D], 1.0, [3, 4])
    j = dense(engine, rows, 3, 3)
    torch.testing.assert_close(effect.push(put, v), v @ j.T, rtol=1e-3, atol=1e-5)
    changes, pulled = effect.pull(put, torch.zeros(2, D), u)
    torch.testing.assert_close(pulled, u @ j, rtol=1e-3, atol=1e-5)
    assert changes.abs().max() <= 1e-5
    outer, inner = effect.bend(put, v, u)
    for index in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            hessian = torch.autograd.functional.hessian(
                lambda theta, index=index: u[index] @ mean_change(engine, rows, theta, 3, 3), torch.zeros(D)
            )
        torch.testing.assert_close(inner[index], hessian @ v[index], rtol=1e-3, atol=1e-4)
        assert u[index] @ outer[index] == pytest.approx((v[index] @ hessian @ v[index]).item(), rel=1e-3, abs=1e-4)


def test_the_radius_is_where_a_brute_force_search_finds_the_ratio(engine: Engine) -> None:
    made: Any = method("melbo")(source=SOURCE, targets=3, target_tokens="last:2", steps=1, prompts=1, held_out=0, n=1)
    state = made.fit(engine, PAIRS, 5)
    rows = rows_of(engine, 1)
    base = plain(engine, rows[0].tokens, None, (3,))[0].detach()
    probes = drawn([D], 1.0, [own_seed(5, 2_000_000 + i) for i in range(30)])
    linear = probes @ dense(engine, rows, 3, 2).T

    def ratio(radius: float) -> float:
        with torch.no_grad():
            read = [plain(engine, rows[0].tokens, radius * probe, (3,))[0] - base for probe in probes]
        moved = torch.stack([each[-2:].mean(0) for each in read])
        apart = (moved - radius * linear).norm(dim=1) / (radius * linear).norm(dim=1)
        return float(apart.square().mean().sqrt())

    found = state.facts["radius"]
    assert ratio(found) == pytest.approx(0.5, abs=2e-3)
    low, high = found / 64, found * 2
    assert ratio(low) < 0.5 < ratio(high)
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 0.5 else (low, middle)
    assert low * 0.99 <= found <= high * 1.01
    assert state.tensors["vectors"].norm().item() == pytest.approx(found, rel=1e-6)


class Rounded:
    """A map with D(theta) = (1 + |theta| / 10) theta, each reading off by fresh noise and by the base's."""

    def __init__(self, noise: float) -> None:
        self.noise, self.random = noise, torch.Generator().manual_seed(0)
        self.base = noise * torch.randn(64, generator=self.random)

    def push(self, _: Any, vectors: Tensor) -> Tensor:
        return vectors

    def mean_changes(self, thetas: Tensor) -> Tensor:
        fresh = self.noise * torch.randn(thetas.shape, generator=self.random)
        return (1 + thetas.norm(dim=1, keepdim=True) / 10) * thetas + fresh - self.base


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_rounding_does_not_move_the_radius(noise: float) -> None:
    probes = drawn([64], 1.0, list(range(30)))
    assert noise == 0 or (Rounded(noise).mean_changes(5 * probes) / 5 - probes).norm(dim=1).mean() > 0.7
    found = calibrate(Rounded(noise), lambda thetas: thetas, probes, 3.0)  # type: ignore[arg-type, return-value]
    assert found.radius == pytest.approx(5.0, rel=0.1 if noise else 0.01)


def test_a_map_without_curvature_has_no_radius() -> None:
    class Linear(Rounded):
        def mean_changes(self, thetas: Tensor) -> Tensor:
            return thetas

    with pytest.raises(FitError, match="never rises through"):
        calibrate(Linear(0.0), lambda thetas: thetas, drawn([64], 1.0, [0]), 1.0)  # type: ignore[arg-type, return-value]


def test_linear_factors_are_the_singular_vectors_of_the_dense_jacobian(engine: Engine) -> None:
    made: Any = method("dct")(
        kind="linear", projection=None, source=SOURCE, targets=2, **BRIEF | {"n": 4, "prompts": 2}
    )
    state = made.fit(engine, PAIRS, 0)
    left, values, right = torch.linalg.svd(dense(engine, rows_of(engine, 2), 2, 3))
    assert state.facts["scores"] == pytest.approx(values[:4].tolist(), rel=1e-3)
    for index in range(4):
        v, u = state.tensors["vectors"][index], state.tensors["outputs"][index]
        assert abs(cosine(v, right[index])) >= 0.9999
        assert cosine(u, left[:, index]) * cosine(v, right[index]) >= 0.9998  # the same side of both
    projected = made.model_copy(update={"projection": 8}).fit(engine, PAIRS, 0)
    pushed = projected.tensors["vectors"] @ dense(engine, rows_of(engine, 2), 2, 3).T
    for index in range(4):
        assert cosine(projected.tensors["outputs"][index], pushed[index]) >= 0.9999
    seen = method("dct")(kind="linear", projection=3, radius=1.0, n=4)
    with pytest.raises(FitError, match="4 linear factors of 3 projections; raise projection or lower n"):
        seen.fit(engine, PAIRS, 0)


@pytest.mark.parametrize("published", [False, True])
def test_exponential_factors_are_those_of_the_formula_around_plain_transformers(
    engine: Engine, published: bool
) -> None:
    made: Any = method("dct")(
        source=SOURCE, targets=2, iterations=3, published=published, **BRIEF | {"n": 2, "radius": 1.5}
    )
    effect, rows, put = effect_of(engine, 1, target=2), rows_of(engine, 1), made.put(Site("mlp_out", SOURCE))
    v = orthogonal(drawn([D], 1.0, [8, 9]))
    u = drawn([D], 1.0, [10, 11])
    factors = Factors(u, v)
    made.iterate(effect, put, factors, 1.5)
    for _ in range(3):
        first = v[0] / v[0].norm()
        rest = v[1] - first * (first @ v[1])
        v = torch.stack([first, rest / rest.norm()])
        leaves = [(1.5 * each).requires_grad_() for each in v]
        moved = torch.stack([mean_change(engine, rows, leaf, 2, 3) for leaf in leaves])
        out = moved.detach() / moved.detach().norm(dim=1, keepdim=True)
        ((u if published else out) * moved).sum().backward()
        grads = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
        u, v = out, grads / grads.norm(dim=1, keepdim=True)
    if not published:
        v = orthogonal(v)
    for index in range(2):
        assert cosine(factors.v[index], v[index]) >= 0.999
        if published:
            assert cosine(factors.u[index], u[index]) >= 0.999


def test_power_iteration_raises_what_the_factors_explain(engine: Engine) -> None:
    made = method("dct")(iterations=6, **BRIEF)
    state = made.fit(engine, PAIRS, 0)
    objective = state.facts["objective"]
    assert objective[-1] > objective[0] * 1.05
    vectors = state.tensors["vectors"].double() / 2.0
    assert (vectors @ vectors.T - torch.eye(3).double()).abs().max() <= 1e-5
    chance = effect_of(engine, 1).mean_changes(made.put(Site("mlp_out", SOURCE))(state.tensors["random.vectors"]))  # type: ignore[attr-defined]
    assert objective[-1] / 3 > chance.norm(dim=1).mean()


def test_factors_are_ranked_by_the_weights_that_fit_what_they_do(engine: Engine) -> None:
    made: Any = method("dct")(n=3)
    u, v = (drawn([6], 1.0, seeds) for seeds in ([1, 2, 3], [4, 5, 6]))
    weights = torch.tensor([0.5, -2.0, 1.0])
    changes = (weights[None] * torch.expm1(v @ v.T)) @ u  # the model itself: D(v_m) = sum_l w_l u_l expm1(<v_l, v_m>)
    torch.testing.assert_close(made.rank(Factors(u, v), changes).float(), weights.square(), rtol=1e-3, atol=1e-4)
    state = made.model_copy(update={"towards": ("yes", "no")}).fit(engine, PAIRS, 0)
    rows = engine.subject.model.get_output_embeddings().weight
    aim = rows[engine.subject.tokenizer("yes").input_ids[0]] - rows[engine.subject.tokenizer("no").input_ids[0]]
    told = [
        float(aim @ mean_change(engine, rows_of(engine, 2), vector, 3, 3).detach())
        for vector in state.tensors["vectors"]
    ]
    assert told == pytest.approx(state.facts["scores"], rel=1e-3, abs=1e-3)
    assert told == sorted(told, reverse=True)


def test_quadratic_factors_satisfy_their_own_equations(engine: Engine) -> None:
    made: Any = method("dct")(kind="quadratic", iterations=12, **BRIEF | {"n": 1})
    state = made.fit(engine, PAIRS, 0)
    v, u = state.tensors["vectors"] / 2.0, state.tensors["outputs"]
    outer, inner = effect_of(engine, 1).bend(made.put(Site("mlp_out", SOURCE)), v, u)
    assert cosine(outer[0], u[0]) >= 0.9999
    assert abs(cosine(inner[0], v[0])) >= 0.99


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_is_differentiated_in_bfloat16_is_the_fused_one(masked: bool) -> None:
    from experiments.attention import Rule, attend, slow_to_differentiate, visible

    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, heads, 24, 8, generator=random) for heads in (4, 2, 2)]
    mask = visible(torch.arange(24).repeat(2, 1), 24, 7, torch.float32) if masked else None
    fused = [part.clone().requires_grad_() for part in parts]
    expected = attend(*fused, mask, Rule(0.3))
    expected.square().sum().backward()
    leaves = [part.bfloat16().requires_grad_() for part in parts]
    assert slow_to_differentiate(*leaves[:2])
    assert not slow_to_differentiate(*fused[:2])
    found = attend(*leaves, None if mask is None else mask.bfloat16(), Rule(0.3))
    found.square().sum().backward()
    assert (found - expected).norm() <= 0.01 * expected.norm()
    for leaf, exact in zip(leaves, fused, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        assert (leaf.grad - exact.grad).norm() <= 0.02 * exact.grad.norm()


# behaviours


def test_distances_are_jensen_shannon_and_equal_effects_are_one_behaviour(engine: Engine) -> None:
    from experiments.engine import Row

    vector, other = drawn([D], 6.0, [1, 2])
    site = Site("mlp_out", SOURCE)
    arms = [(Add(site, each),) for each in (vector, vector.clone(), other, torch.zeros(D))]
    rows = rows_of(engine, 2)
    found = effects(engine, rows, [(), *arms])
    square = 0.0
    for row in rows:
        p = engine.next_logits([Row(row.tokens, row.n_prompt, arm) for arm in (arms[0], arms[2])]).softmax(-1)
        square += jensenshannon(p[0].double(), p[1].double(), base=2) ** 2 / 2
    assert found.distances[1, 3].item() == pytest.approx(square**0.5, rel=1e-3)
    told = deduplicated(engine, rows, arms[:3], arms[3:], [1.0, 2.0, 3.0, 0.0], 0.05)
    groups = [(each["vectors"], each["random"], each["base"]) for each in told["behaviours"]]
    assert groups == [([], [0], True), ([0, 1], [], False), ([2], [], False)]
    assert told["n_behaviours"] == 2
    assert clusters(torch.zeros(1, 1), 0.1) == [[0]]


# bad input


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("melbo", {"radius": 0.0}, "greater than 0"),
        ("melbo", {"radius": -1.0}, "greater than 0"),
        ("melbo", {"n": 2, "vector": 2}, "vector 2: the fit holds vectors 0 to 1"),
        ("dct", {"controls": 1, "vector": 1, "control": True}, "the fit holds random vectors 0 to 0"),
        ("melbo", {"positions": "response"}, "reads prompts only"),
        ("melbo", {"target_tokens": "first:3"}, "is no slice of tokens; allowed: all, last:N"),
        ("melbo", {"form": "lora"}, "form lora needs a radius"),
        ("melbo", {"form": "lora", "radius": 1.0, "orthogonal": True}, "form lora cannot be orthogonal"),
        ("melbo", {"form": "lora", "radius": 1.0, "site": "resid"}, "site resid and positions all would mean nothing"),
        ("melbo", {"form": "lora", "radius": 1.0, "positions": "last:1"}, "positions last:1 would mean nothing"),
        ("melbo", {"controls": 0}, "greater than or equal to 1"),
        ("dct", {"controls": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(name)(**settings)


def test_places_that_do_not_exist_are_refused_in_the_plan_and_in_the_fit(engine: Engine) -> None:
    sites = ("resid", "mlp_out")
    for settings, where in (
        ({"source": 3, "targets": 3}, "source"),
        ({"source": "0-1"}, "source"),
        ({"targets": 9}, "targets"),
    ):
        made = method("melbo")(**settings)
        assert list(made.misplaced(Outline(4, sites))) == [where]
        with pytest.raises(DepthError):
            made.fit(engine, PAIRS, 0)
    assert method("melbo")().misplaced(Outline(4, sites)) == {}
    assert "no 'mlp_out'" in method("melbo")().misplaced(Outline(4, ("resid",)))["site"]


def test_data_and_sizes_that_do_not_fit_are_refused(engine: Engine) -> None:
    with pytest.raises(FitError, match="no prompts"):
        method("melbo")().fit(engine, [], 0)
    with pytest.raises(FitError, match="tokens 400: a prompt has only"):
        method("melbo")(target_tokens=400).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="33 orthogonal vectors do not fit into 32 dimensions"):
        method("melbo")(n=33, orthogonal=True, radius=1.0, prompts=1).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="33 factors do not fit into the 32 dimensions of mlp_out@1"):
        method("dct")(n=33, radius=1.0).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="towards 'a wizard' is"):
        method("dct")(towards=("a wizard", "no"), radius=1.0).fit(engine, PAIRS, 0)


def test_a_state_outlives_saving(engine: Engine, tmp_path: Any) -> None:
    made = method("dct")(iterations=1, **BRIEF)
    state = made.fit(engine, PAIRS, 0)
    state.save(tmp_path / "state.safetensors")
    assert State.load(tmp_path / "state.safetensors").facts == state.facts
