"""Directions from contrast pairs against reference libraries, dense linear algebra and a planted answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM

from experiments.contrast import Contrast, Evidence, FitError, contrast, row
from experiments.dataset import Message, Pair, Side, recipe
from experiments.directions import Direction
from experiments.edit import Project, Site
from experiments.gradients import Separation, pair_gradients
from experiments.intervention import method
from experiments.interventions.fisher import FLOOR, natural_gradient
from experiments.interventions.probe import logistic
from experiments.interventions.sspace import weight
from experiments.spec import SubjectSpec
from experiments.subject import load
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from experiments.engine import Engine

SITE = Site("resid", 1)
PAIRS: list[Pair] = list(
    recipe("persona_pairs")(positive="You are a wizard.", negative="You are a clerk.", n=16, responses="shared").build(
        None, 3
    )
)


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Any, b: Any) -> float:
    """Signed."""
    a, b = (torch.as_tensor(each).double() for each in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


def texts(engine: Engine, pairs: list[Pair]) -> list[tuple[str, str]]:
    """Both sides as text that tokenises to what we read."""
    found = []
    for pair in pairs:
        rows = [row(engine.subject, pair.messages, side) for side in (pair.positive, pair.negative)]
        sides = [engine.subject.tokenizer.decode(each.tokens) for each in rows]
        assert [tuple(engine.subject.tokenizer(side).input_ids) for side in sides] == [each.tokens for each in rows]
        found.append((sides[0], sides[1]))
    return found


def test_mean_diff_and_pca_are_those_of_steering_vectors(engine: Engine) -> None:
    from steering_vectors import mean_aggregator, pca_aggregator, train_steering_vector

    subject = engine.subject
    for name, aggregator in (("mean_diff", mean_aggregator()), ("pca", pca_aggregator())):
        theirs = train_steering_vector(
            subject.model, subject.tokenizer, texts(engine, PAIRS), layers=[0, 2], aggregator=aggregator
        ).layer_activations
        ours = method(name)(layer=(0, 2), tokens="last").fit(engine, PAIRS, 0).tensors
        for layer in (0, 2):
            assert cosine(ours[f"resid@{layer}"], theirs[layer]) >= 0.999
            if name == "mean_diff":
                torch.testing.assert_close(ours[f"resid@{layer}"], theirs[layer], rtol=1e-4, atol=1e-5)


def test_weighted_pca_is_the_weighted_singular_vector_and_the_weights_are_the_pairs_likelihoods(engine: Engine) -> None:
    made: Any = method("pca_weighted")(layer=1, temperature=0.5)
    evidence = contrast(engine, PAIRS, "response_mean").at(SITE)
    likely = []
    for pair in PAIRS:
        both = []
        for side in (pair.positive, pair.negative):
            text = row(engine.subject, pair.messages, side)
            with torch.no_grad():
                table = engine.subject.model(torch.tensor([text.tokens])).logits[0].log_softmax(-1)
            answer = torch.tensor(text.tokens[text.n_prompt :])
            both.append(table[text.n_prompt - 1 : -1].gather(1, answer[:, None]).mean())
        likely.append(torch.stack(both).mean())
    torch.testing.assert_close(evidence.logprobs(), torch.stack(likely), rtol=1e-4, atol=1e-4)
    w = torch.softmax(torch.stack(likely).double() / 0.5, 0).numpy()
    differences = evidence.differences.numpy()
    scatter = sum(weight * np.outer(d, d) for weight, d in zip(w, differences, strict=True))
    assert abs(cosine(made.direction(evidence, 0), np.linalg.eigh(scatter)[1][:, -1])) >= 1 - 1e-6
    centred = differences - w @ differences
    scatter = sum(weight * np.outer(d, d) for weight, d in zip(w, centred, strict=True))
    published = method("pca_weighted")(layer=1, temperature=0.5, centred=True)
    assert abs(cosine(published.direction(evidence, 0), np.linalg.eigh(scatter)[1][:, -1])) >= 1 - 1e-6


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_a_probe_is_scikit_learns_logistic_regression(c: float) -> None:
    x = torch.cat([normal(60, 12) + torch.linspace(0, 1, 12), normal(40, 12, seed=1)]) * 3 + 5
    y = np.array([1] * 60 + [0] * 40)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(x.numpy(), y).coef_[0]
    np.testing.assert_allclose(logistic(x, 60, c).numpy(), theirs, rtol=1e-4, atol=1e-6)


def plain_gradient(engine: Engine, pair: Pair, layer: int, target: int) -> list[torch.Tensor]:
    """Gradients of -|h+ - h-| at the target with respect to a vector added to the last token behind `layer`."""
    leaves, ends = [], []
    for side in (pair.positive, pair.negative):
        leaf = torch.zeros(engine.subject.d_model, requires_grad=True)
        tokens = torch.tensor([row(engine.subject, pair.messages, side).tokens])

        def add(_: Any, __: Any, output: Any, leaf: torch.Tensor = leaf) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[0, -1] += leaf
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = engine.subject.blocks[layer].register_forward_hook(add)
        ends.append(engine.subject.model(tokens, output_hidden_states=True).hidden_states[target + 1][0, -1])
        handle.remove()
        leaves.append(leaf)
    (-(ends[0] - ends[1]).norm()).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_gradients_of_a_batch_of_pairs_are_each_pairs_own(engine: Engine) -> None:
    pairs = PAIRS[:4]
    loss = Separation(2)
    found = Contrast(engine, pairs, "last").gradients(SITE, loss)
    for index, pair in enumerate(pairs):
        for side, theirs in zip(found, plain_gradient(engine, pair, SITE.layer, 2), strict=True):
            torch.testing.assert_close(side[index], theirs, rtol=1e-3, atol=1e-5)
    trivial = Contrast(engine, pairs, "last")
    at = Site("resid", 2)
    h = trivial.at(at).differences
    torch.testing.assert_close(
        trivial.gradients(at, loss)[0].double(), -h / h.norm(dim=1)[:, None], rtol=1e-4, atol=1e-5
    )


def test_the_published_hinge_pulls_at_the_untouched_subject(engine: Engine) -> None:
    made = Contrast(engine, PAIRS[:3], "response_mean")
    resting, pulling = (made.gradients(SITE, loss)[0] for loss in (Separation(2), Separation(2, "published")))
    assert (resting - pulling).norm() > 0.1 * resting.norm()


def test_a_layer_above_the_loss_has_no_gradient_and_is_refused(engine: Engine) -> None:
    for name in ("fisher", "svd_gradient"):
        with pytest.raises(FitError, match=r"resid@3 has no gradient: the loss is read at resid@1"):
            method(name)(layer=3, target=1).fit(engine, PAIRS[:3], 0)
        with pytest.raises(FitError, match="target 9: the subject has layers 0 to 3"):
            method(name)(layer=1, target=9).fit(engine, PAIRS[:3], 0)


def test_svd_gradient_is_the_leading_direction_of_the_sides_gradients(engine: Engine) -> None:
    evidence = contrast(engine, PAIRS, "response_mean").at(SITE)
    positive, negative = (each.double().numpy() for each in evidence.gradients(Separation(3)))
    wishes = negative - positive
    expected = np.linalg.eigh(wishes.T @ wishes)[1][:, -1]
    assert abs(cosine(method("svd_gradient")(layer=1, target=3).direction(evidence, 0), expected)) >= 1 - 1e-6


@pytest.mark.parametrize("n", [20, 5, 200])
@pytest.mark.parametrize("kind", ["empirical", "covariance", "improved"])
def test_the_natural_gradient_is_that_of_the_dense_matrix(kind: Any, n: int) -> None:
    d, damping = 20, 0.03
    gradients = normal(n, d) @ normal(d, d, seed=1) + 1
    norms = normal(n, seed=2).abs()
    mean = gradients.mean(0)
    match kind:
        case "empirical":
            dense = gradients.T @ gradients / n
        case "covariance":
            dense = torch.cov(gradients.T)
        case _:
            dense = (gradients.T / (norms**2 + FLOOR)) @ gradients / n
    expected = torch.linalg.solve(dense + damping * dense.trace() / d * torch.eye(d, dtype=torch.float64), mean)
    torch.testing.assert_close(natural_gradient(gradients, kind, damping, norms), expected, rtol=1e-8, atol=1e-10)


def test_without_damping_a_regular_fisher_matrix_is_inverted_and_a_singular_one_is_refused() -> None:
    gradients = normal(40, 8) + 1
    exact = torch.linalg.solve(gradients.T @ gradients / 40, gradients.mean(0))
    torch.testing.assert_close(natural_gradient(gradients, "empirical", 0), exact, rtol=1e-8, atol=1e-10)
    with pytest.raises(FitError, match=r"singular \(rank 4 of 8\) and damping is 0; set damping above 0"):
        natural_gradient(gradients[:4], "empirical", 0)
    with pytest.raises(FitError, match=r"singular \(rank 7 of 8\)"):
        natural_gradient(torch.cat([gradients[:, :7], gradients[:, :1]], 1), "empirical", 0)
    with pytest.raises(FitError, match="the gradients are zero"):
        natural_gradient(torch.zeros(4, 8, dtype=torch.float64), "empirical", 0.1)


def test_much_damping_gives_the_mean_gradient_and_dual_forms_are_made_of_their_sides(engine: Engine) -> None:
    evidence = contrast(engine, PAIRS, "response_mean").at(SITE)
    positive, negative = (each.double() for each in evidence.gradients(Separation(3)))

    def found(**settings: Any) -> torch.Tensor:
        made: Any = method("fisher")(layer=1, target=3, **settings)
        direction: torch.Tensor = made.direction(evidence, 0)
        return direction

    assert cosine(found(damping=1e9), (negative - positive).mean(0)) >= 1 - 1e-9
    ahead, back = found(dual="positive"), found(dual="negative")
    assert cosine(ahead, natural_gradient(-positive, "empirical", 0.01)) >= 1 - 1e-9
    torch.testing.assert_close(found(dual="mean"), ahead + back)
    torch.testing.assert_close(found(dual="difference"), ahead - back)


def test_sspace_keeps_what_the_writers_leading_directions_hold(engine: Engine) -> None:
    evidence = contrast(engine, PAIRS, "response_mean").at(SITE)
    matrix = weight(evidence)
    assert torch.equal(matrix, engine.subject.blocks[1].mlp.down_proj.weight.detach().double())  # type: ignore[union-attr, arg-type, operator]
    basis = torch.linalg.svd(matrix).U[:, :5]
    made: Any = method("sspace")(layer=1, rank=5, select="singular")
    torch.testing.assert_close(made.direction(evidence, 0), basis @ basis.T @ evidence.differences.mean(0))
    whole: Any = method("sspace")(layer=1, rank=matrix.shape[0])
    assert cosine(whole.direction(evidence, 0), evidence.differences.mean(0)) >= 1 - 1e-9
    with pytest.raises(FitError, match="rank 99 at resid@1: the weight has 32 singular directions"):
        method("sspace")(layer=1, rank=99).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="no weight writes there"):
        method("sspace")(layer=1, site="attn_in").fit(engine, PAIRS, 0)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_every_family_has_the_weights_that_sspace_reads(architecture: str, tmp_path: Path) -> None:
    from experiments.engine import Engine

    engine = Engine(load(SubjectSpec(model=str(make_tiny_model(tmp_path, architecture)))))
    shows = contrast(engine, PAIRS[:3], "last")
    for name in ("resid", "attn_out", "mlp_out", "q", "k", "v", "up"):
        evidence = shows.at(Site(name, 1))  # type: ignore[arg-type]
        assert weight(evidence).shape[0] == evidence.positive.shape[1]


def test_ablation_at_dose_one_leaves_nothing_along_the_direction(engine: Engine) -> None:
    from experiments.engine import Row

    made: Any = method("directional_ablation")(layer=1, components=3)
    state = made.fit(engine, PAIRS, 0)
    basis = state.tensors["basis"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-6, rtol=0)
    assert cosine(basis[0], contrast(engine, PAIRS, "response_mean").at(SITE).differences.mean(0)) >= 1 - 1e-6
    edits = made.edits(state, 1.0)
    assert [edit.site for edit in edits if isinstance(edit, Project)] == [Site("resid", layer) for layer in range(4)]
    tokens = row(engine.subject, PAIRS[0].messages, PAIRS[0].positive)
    sites = [Site("resid", layer) for layer in range(4)]
    found = engine.activations([Row(tokens.tokens, tokens.n_prompt, tuple(edits))], sites, "response_mean")
    for site in sites:
        assert (found[site][0] @ basis.T).abs().max() < 1e-4 * found[site][0].norm()


def test_what_ablation_cannot_do_is_told(engine: Engine) -> None:
    for settings, reason in (
        ({"layer": "1-2"}, "means 2 layers; the direction is read at one"),
        ({"components": 17}, "components 17: 16 pairs show at most that many"),
        ({"layers": "7"}, "matches none of the layers 0 to 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            method("directional_ablation")(**settings).fit(engine, PAIRS, 0)


def test_pairs_that_are_the_same_tokens_are_refused_by_name(engine: Engine) -> None:
    words = engine.subject.tokenizer.decode(engine.subject.tokenizer("the owl").input_ids)
    ask = (Message(role="user", content="Hi?"),)
    twin = Pair(
        id="twin",
        messages=ask,
        positive=Side(system=None, response=words),
        negative=Side(system=None, response=words + "x"),
    )
    same = twin.model_copy(update={"negative": twin.positive})
    Contrast(engine, [twin], "last")
    with pytest.raises(FitError, match="pair 'twin': both sides are the same tokens"):
        Contrast(engine, [same], "last")


def test_gradients_that_overflow_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "experiments.gradients._loss", lambda _, __, rows, *rest: rows[0].edits[0].vector.sum() * float("inf")
    )
    rows = [row(engine.subject, PAIRS[0].messages, side) for side in (PAIRS[0].positive, PAIRS[0].negative)]
    with pytest.raises(FitError, match="not finite"):
        pair_gradients(engine, rows, "resid", "last", Separation(2))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, torch.Tensor, list[Pair]]:
    """A subject that says one word with a constant shift along a known direction, and pairs that differ in that word.

    Its layers hardly write, so that what is planted in the embedding is what the middle layers hold.
    """
    from experiments.engine import Engine

    folder = make_tiny_model(tmp_path_factory.mktemp("planted"), "llama", initializer_range=0.02)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = Engine(load(SubjectSpec(model=str(folder))))
    tokenizer = engine.subject.tokenizer
    direction = torch.nn.functional.normalize(normal(32, seed=5), dim=0).float()
    owl, cat = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" owl", " cat"))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(0.5 * normal(*embedding.shape, seed=6))
        embedding[owl] = embedding[cat] + 2 * direction
    model.save_pretrained(folder)
    questions = [
        f"{word} is the lazy {word}" for word in ("dog", "eagle", "animal", "quick", "what", "like", "they", "to")
    ]
    pairs = [
        Pair(
            id=str(n),
            messages=(Message(role="user", content=question),),
            positive=Side(system=None, response="the owl"),
            negative=Side(system=None, response="the cat"),
        )
        for n, question in enumerate(questions)
    ]
    return Engine(load(SubjectSpec(model=str(folder)))), direction, pairs


@pytest.mark.parametrize("name", ["mean_diff", "pca", "pca_weighted", "probe"])
def test_a_planted_constant_shift_is_found(name: str, planted: tuple[Engine, torch.Tensor, list[Pair]]) -> None:
    engine, direction, pairs = planted
    vector = method(name)(layer=2, tokens="last").fit(engine, pairs, 0).tensors["resid@2"]
    assert cosine(vector, direction) >= 0.97


def test_centred_pca_misses_a_planted_constant_shift(planted: tuple[Engine, torch.Tensor, list[Pair]]) -> None:
    engine, direction, pairs = planted
    made = method("pca_centred")(layer=2, tokens="last")
    assert isinstance(made, Direction)
    found = made.direction(contrast(engine, pairs, "last").at(Site("resid", 2)), 0)
    assert abs(cosine(found, direction)) <= 0.5


def test_evidence_without_a_subject_says_so() -> None:
    with pytest.raises(FitError, match="come without pairs and subject"):
        Evidence(SITE, torch.ones(2, 4), torch.zeros(2, 4)).logprobs()
