"""The engine computes what plain transformers computes for each row alone, however rows are packed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments.edit import Add, Dense, Edit, LowRank, Project, Prompt, Scale, Site
from experiments.engine import Engine, EngineError, Row
from experiments.spec import SubjectSpec
from experiments.subject import Subject, load
from tests.experiments import oracle
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox")
CLOSE = 1e-5
VECTOR = torch.ones(32)


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = make_tiny_model(tmp_path_factory.mktemp("engine") / request.param, request.param, seed=3)
    return load(SubjectSpec(model=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def llama(tiny_subject: Subject) -> Subject:
    return tiny_subject


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(n: int = 6, seed: int = 0, longest: int = 40) -> list[Row]:
    """Rows that share prefixes, one of them the prefix of another, longer than the sliding window of Gemma."""
    rng = random.Random(seed)
    stem = tuple(rng.randrange(4, 300) for _ in range(longest))
    rows = [Row(stem[:20], 12), Row(stem[:30], 20)]
    while len(rows) < n:
        own = tuple(rng.randrange(4, 300) for _ in range(rng.randrange(1, 12)))
        tokens = stem[: rng.randrange(1, longest)] + own
        rows.append(Row(tokens, rng.randrange(1, len(tokens))))
    return rows


def with_arms(rows: list[Row], arms: list[tuple[Edit, ...]]) -> list[Row]:
    return [Row(row.tokens, row.n_prompt, arm) for row in rows for arm in arms]


def activation_edits(subject: Subject) -> dict[str, Edit]:
    """One of each kind, at sites inside a layer, of a part of a projection, and between layers."""
    d, v = subject.d_model, subject.point(Site("v", 2)).width
    basis = torch.linalg.qr(normal(d, 2, seed=5)).Q.T.contiguous()
    return {
        "add": Add(Site("resid", 1), normal(d, seed=1)),
        "add last": Add(Site("resid", 3), normal(d, seed=2)),
        "add prompt": Add(Site("mlp_in", 2), normal(d, seed=3), "prompt"),
        "add response": Add(Site("resid", 0), normal(d, seed=4), "response"),
        "add last two": Add(Site("attn_out", 1), normal(d, seed=6), "last:2"),
        "project": Project(Site("resid", 2), basis, -1.0),
        "project response": Project(Site("attn_in", 1), basis, 0.5, "response"),
        "scale": Scale(Site("v", 2), normal(v, seed=7, scale=0.5)),
        "scale up": Scale(Site("up", 0), normal(subject.point(Site("up", 0)).width, seed=8, scale=0.5), "prompt"),
    }


def weight_edits(subject: Subject) -> dict[str, Edit]:
    names = {id(module): name for name, module in subject.model.named_modules()}
    down = names[id(subject.point(Site("down", 1)).module)]
    matrix = names[id(subject.point(Site("q", 2)).module)]
    norm = names[id(subject.point(Site("attn_in", 1)).module)]
    head = next(
        name for name, module in subject.model.named_modules() if module is subject.model.get_output_embeddings()
    )
    weight = subject.model.get_parameter(matrix + ".weight")
    wide = subject.model.get_submodule(down).weight
    d_out, d_in = (wide.shape[1], wide.shape[0]) if "c_" in down else wide.shape
    embedding = next(name for name, _ in subject.model.named_parameters() if "embed" in name or "wte" in name)
    return {
        "low rank": LowRank(down, normal(3, d_in, seed=9, scale=0.3), normal(d_out, 3, seed=10, scale=0.3)),
        "dense": Dense(matrix + ".weight", normal(*weight.shape, seed=11, scale=0.2)),
        "dense norm": Dense(norm + ".weight", normal(subject.d_model, seed=12, scale=0.3)),
        "dense embedding": Dense(embedding, normal(*subject.model.get_parameter(embedding).shape, seed=13, scale=0.05)),
        "low rank head": LowRank(
            head, normal(2, subject.d_model, seed=14), normal(subject.model.config.vocab_size, 2, seed=15)
        ),
    }


def expected(subject: Subject, rows: list[Row]) -> Tensor:
    return torch.stack([oracle.logits(subject, row)[-1] for row in rows])


def test_packed_rows_equal_each_row_alone_in_transformers(subject: Subject) -> None:
    rows = some_rows(12)
    found = Engine(subject, max_tokens=64).next_logits(rows)
    torch.testing.assert_close(found, expected(subject, rows), atol=CLOSE, rtol=CLOSE)


def test_every_activation_edit_equals_a_naive_hook(subject: Subject) -> None:
    edits = activation_edits(subject)
    arms = [(), *((edit,) for edit in edits.values()), tuple(edits.values()), (edits["scale"], edits["add"])]
    rows = with_arms(some_rows(4), arms)
    found = Engine(subject).next_logits(rows)
    torch.testing.assert_close(found, expected(subject, rows), atol=CLOSE, rtol=CLOSE)


def test_every_weight_edit_equals_a_merged_model(subject: Subject) -> None:
    edits = weight_edits(subject)
    if subject.model.config.tie_word_embeddings:
        del edits["low rank head"]  # merging would change the embedding too
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    add = Add(Site("resid", 1), normal(subject.d_model))
    arms = [(), *((edit,) for edit in edits.values()), (add, *edits.values())]
    rows = with_arms(some_rows(3), arms)
    found = Engine(subject).next_logits(rows)
    torch.testing.assert_close(found, expected(subject, rows), atol=3 * CLOSE, rtol=CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_a_row_alone_equals_the_row_in_a_batch_with_other_edits(subject: Subject) -> None:
    rows = with_arms(some_rows(4), [(), *((edit,) for edit in activation_edits(subject).values())])
    engine = Engine(subject)
    together = engine.next_logits(rows)
    alone = torch.cat([engine.next_logits([row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=CLOSE, rtol=CLOSE)


def test_rows_without_edits_are_bit_equal_within_a_batch_and_close_to_it_alone(llama: Subject) -> None:
    rows = some_rows(6)
    vector = normal(llama.d_model)
    engine = Engine(llama)
    alone = engine.next_logits(rows)
    together = engine.next_logits([*rows, *with_arms(rows, [(Add(Site("resid", 1), vector),), ()])])
    assert torch.equal(together[:6], together[7::2])
    # A matrix product of another height may sum in another order: no kernel promises more across batches.
    torch.testing.assert_close(together[:6], alone, atol=1e-5, rtol=0)


def test_chunks_of_any_size_give_the_same(llama: Subject) -> None:
    rows = with_arms(some_rows(8), [(), *((edit,) for edit in activation_edits(llama).values())])
    whole = Engine(llama, max_tokens=10**6).next_logits(rows)
    for size in (1, 50, 200, 500):
        torch.testing.assert_close(Engine(llama, max_tokens=size).next_logits(rows), whole, atol=CLOSE, rtol=CLOSE)


def tokens_by_layer(subject: Subject, engine: Engine, rows: list[Row]) -> list[int]:
    """Tokens that go through the first projection of every layer's MLP."""
    seen: Counter[int] = Counter()
    handles = [
        subject.point(Site("attn_in", layer)).module.register_forward_hook(
            lambda _, __, output, layer=layer: seen.update({layer: output.shape[1]})
        )
        for layer in range(subject.n_layers)
    ]
    engine.next_logits(rows)
    for handle in handles:
        handle.remove()
    return [seen[layer] for layer in range(subject.n_layers)]


def test_arms_share_the_layers_below_their_edits(llama: Subject) -> None:
    base = [Row(tuple(range(5, 25)), 10), Row((*range(5, 20), 99), 10)]  # 21 states
    vectors = [normal(llama.d_model, seed=seed) for seed in range(3)]
    arms: list[tuple[Edit, ...]] = [(Add(Site("resid", 1), vector),) for vector in vectors]
    engine = Engine(llama)
    assert tokens_by_layer(llama, engine, with_arms(base, [(), *arms])) == [21, 21, 84, 84]
    assert tokens_by_layer(llama, engine, with_arms(base, [(), ()])) == [21, 21, 21, 21]
    inside: list[tuple[Edit, ...]] = [(Add(Site("mlp_out", 1), vector),) for vector in vectors]
    assert tokens_by_layer(llama, engine, with_arms(base, inside)) == [21, 63, 63, 63]


def test_arms_that_act_on_the_response_share_the_prompt_in_all_layers(llama: Subject) -> None:
    base = [Row(tuple(range(5, 25)), 15)]
    arms: list[tuple[Edit, ...]] = [(Add(Site("resid", 0), normal(llama.d_model), "response"),) for _ in range(3)]
    assert tokens_by_layer(llama, Engine(llama), with_arms(base, arms)) == [20, 30, 30, 30]


def test_token_logprobs_are_the_cross_entropy_of_the_response(subject: Subject) -> None:
    rows = with_arms(some_rows(5), [(), (activation_edits(subject)["add"],)])
    for row, found in zip(rows, Engine(subject, max_tokens=100).token_logprobs(rows), strict=True):
        logits = oracle.logits(subject, row)[row.n_prompt - 1 : -1]
        wanted = torch.tensor(row.tokens[row.n_prompt :])
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        torch.testing.assert_close(found, -loss, atol=CLOSE, rtol=CLOSE)


def test_options_are_summed_over_their_sequences(llama: Subject) -> None:
    rows = with_arms(some_rows(3), [(), (activation_edits(llama)["add response"],)])
    options = {"one": [(7,), (8,)], "long": [(7, 9, 11), (7, 9)], "mixed": ((5,), (6, 7)), "none": ()}
    seen: list[int] = []
    found = Engine(llama, max_tokens=60).option_logprobs(
        rows, [options] * len(rows), top=3, on_result=lambda index, _: seen.append(index)
    )
    assert sorted(seen) == list(range(len(rows)))
    for row, scores in zip(rows, found, strict=True):
        for name, sequences in options.items():
            total = [sequence_logprob(llama, row, sequence) for sequence in sequences]
            wanted = torch.tensor(total).logsumexp(0).item() if total else -float("inf")
            assert scores.logprobs[name] == pytest.approx(wanted, abs=CLOSE)
        best = oracle.logits(llama, row)[-1].log_softmax(-1).topk(3)
        assert [token for token, _ in scores.top] == best.indices.tolist()
        assert [value for _, value in scores.top] == pytest.approx(best.values.tolist(), abs=CLOSE)


def sequence_logprob(subject: Subject, row: Row, sequence: tuple[int, ...]) -> float:
    longer = Row(row.tokens + sequence, row.n_prompt, row.edits)
    logprobs = oracle.logits(subject, longer).log_softmax(-1)
    at = len(row.tokens) - 1
    return sum(logprobs[at + step, token].item() for step, token in enumerate(sequence))


@pytest.mark.parametrize("pool", ["last", "prompt_last", "response_mean"])
def test_activations_are_read_at_every_site_in_one_pass(subject: Subject, pool: Any) -> None:
    rows = with_arms(some_rows(3), [(), (activation_edits(subject)["add"],)])
    sites = [Site("resid", 0), Site("resid", 1), Site("attn_out", 2), Site("v", 1), Site("mlp_in", 0)]
    found = Engine(subject).activations(rows, sites, pool)
    for site in sites:
        point = subject.point(site)
        for index, row in enumerate(rows):
            span = {
                "last": slice(-1, None),
                "prompt_last": slice(row.n_prompt - 1, row.n_prompt),
                "response_mean": slice(row.n_prompt, None),
            }[pool]
            h = oracle.hidden(subject, row, point.module)[span].mean(0)
            wanted = h if point.part is None else h[point.part]
            torch.testing.assert_close(found[site][index], wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("pool", ["last", "prompt_last", "response_mean"])
def test_activations_and_logprobs_of_one_pass_are_those_of_two(subject: Subject, pool: Any) -> None:
    rows = with_arms(some_rows(), [(), (activation_edits(subject)["add"],)])
    sites = [Site(name, layer) for name in ("resid", "mlp_out", "attn_in") for layer in range(subject.n_layers)]
    engine = Engine(subject)
    found, logprobs = engine.observe(rows, sites, pool)
    alone = engine.activations(rows, sites, pool)
    assert found.keys() == alone.keys()
    for site in sites:
        torch.testing.assert_close(found[site], alone[site], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(logprobs, engine.token_logprobs(rows), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_trace_reads_every_site_at_the_same_positions_as_the_last_states(subject: Subject) -> None:
    rows = with_arms(some_rows(4), [(activation_edits(subject)["add"],)])
    positions = [range(row.n_prompt, len(row.tokens)) for row in rows]
    sites = [Site("resid", 0), Site("mlp_out", 2), Site("resid", subject.n_layers - 1)]
    engine = Engine(subject)
    with torch.no_grad():
        states, at = engine.trace(rows, positions, sites)
        nothing, below = engine.trace(rows, positions, sites[:2], above=False)
        torch.testing.assert_close(states, engine.forward(rows, positions))
    assert len(nothing) == 0
    for site in sites:
        module = subject.point(site).module
        theirs = torch.cat(
            [oracle.hidden(subject, row, module)[where] for row, where in zip(rows, positions, strict=True)]
        )
        torch.testing.assert_close(at[site], theirs, atol=2e-4, rtol=1e-3)
    for site, found in below.items():
        torch.testing.assert_close(found, at[site])


def test_the_gradient_of_a_trace_equals_that_of_a_naive_hook(llama: Subject) -> None:
    rows = some_rows(4)
    ours, theirs = (normal(llama.d_model).requires_grad_() for _ in range(2))
    edits = (Add(Site("resid", 0), ours),)
    positions = [range(row.n_prompt, len(row.tokens)) for row in rows]
    _, at = Engine(llama).trace(
        [Row(row.tokens, row.n_prompt, edits) for row in rows], positions, [Site("resid", 2)], above=False
    )
    at[Site("resid", 2)].norm(dim=-1).sum().backward()
    for row in rows:
        with oracle.hooked(llama, llama.model, Row(row.tokens, row.n_prompt, (Add(Site("resid", 0), theirs),))):
            hidden = llama.model(torch.tensor([row.tokens]), output_hidden_states=True).hidden_states[3]
        hidden[0, row.n_prompt :].norm(dim=-1).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_activations_do_not_compute_layers_above(llama: Subject) -> None:
    engine = Engine(llama)
    top = Add(Site("resid", 3), normal(llama.d_model))
    calls: list[int] = []
    handle = llama.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    engine.activations([Row((5, 6, 7), 2, (top,))], [Site("resid", 1)], "last")
    handle.remove()
    assert not calls
    assert engine.fired[top] == 0


def test_the_gradient_equals_that_of_a_naive_hook(llama: Subject) -> None:
    rows = some_rows(4)
    positions = [range(row.n_prompt - 1, len(row.tokens) - 1) for row in rows]
    ours, theirs = (normal(llama.d_model, seed=1).requires_grad_() for _ in range(2))
    scale, other = (normal(llama.d_model, seed=2).requires_grad_() for _ in range(2))

    def arm(vector: Tensor, factor: Tensor) -> tuple[Edit, ...]:
        return Add(Site("resid", 1), vector), Scale(Site("mlp_out", 2), factor, "response")

    states = Engine(llama).forward([Row(row.tokens, row.n_prompt, arm(ours, scale)) for row in rows], positions)
    llama.head(states).logsumexp(-1).sum().backward()
    for row in rows:
        edited = Row(row.tokens, row.n_prompt, arm(theirs, other))
        with oracle.hooked(llama, llama.model, edited):
            logits = llama.model(torch.tensor([row.tokens])).logits[0, row.n_prompt - 1 : -1]
        logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scale.grad, other.grad, atol=1e-4, rtol=1e-4)
    assert ours.grad is not None
    assert ours.grad.norm() > 0


def test_gradients_reach_every_kind_of_edit(llama: Subject) -> None:
    d = llama.d_model
    tensors = [
        normal(d, seed=1),
        normal(2, d, seed=2),
        normal(2, d, seed=3),
        normal(d, 2, seed=4),
        normal(d, d, seed=5),
    ]
    vector, basis, a, b, change = [tensor.mul(0.1).requires_grad_() for tensor in tensors]
    name = "model.layers.1.self_attn.o_proj"
    edits = (Add(Site("resid", 0), vector), Project(Site("resid", 2), basis, 0.5), LowRank(name, a, b))
    edits = (*edits, Dense(name + ".weight", change))
    Engine(llama).forward([Row((5, 6, 7, 8), 2, edits)], [range(4)]).sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in (vector, basis, a, b, change))


def test_fired_counts_the_tokens_of_every_row_as_if_alone(llama: Subject) -> None:
    edits = activation_edits(llama)
    dense = weight_edits(llama)["dense norm"]
    engine = Engine(llama)
    everywhere, prompt, response = edits["add"], edits["add prompt"], edits["add response"]
    arm = (everywhere, prompt, response, edits["add last two"], dense, Prompt(system="s"))
    engine.next_logits([Row(tuple(range(5, 15)), 7, arm), Row(tuple(range(5, 15)), 7, arm), Row((5, 6), 1, arm)])
    assert [engine.fired[each] for each in arm] == [22, 15, 7, 5, 22, 0]


def test_equal_edits_in_two_orders_are_refused(llama: Subject) -> None:
    a, b = activation_edits(llama)["project"], Add(Site("resid", 2), normal(llama.d_model))
    with pytest.raises(EngineError, match="different orders"):
        Engine(llama).next_logits([Row((5, 6), 1, (a, b)), Row((5, 6), 1, (b, a))])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Add(Site("resid", 1), torch.zeros(31)), r"Add at resid@1: vector has shape \[31\], must be \[32\]"),
        (Project(Site("q", 1), torch.zeros(32), 1.0), r"Project at q@1: basis has shape \[32\], must be \[k, 32\]"),
        (LowRank("model.layers.0.self_attn.v_proj", torch.zeros(2, 32), torch.zeros(32, 2)), r"\[r, 32\] and \[16, r"),
        (LowRank("model.layers.0.input_layernorm", torch.zeros(2, 32), torch.zeros(32, 2)), "is a LlamaRMSNorm"),
        (Dense("model.norm.weight", torch.zeros(3)), r"model.norm.weight: delta has shape \[3\], must be \[32\]"),
        (Add(Site("resid", 4), torch.zeros(32)), "resid@4: layer out of range"),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_is_refused_by_name(llama: Subject, edit: Edit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(llama).next_logits([Row((5, 6), 1, (edit,))])


def test_rows_that_cannot_be_computed_are_refused(llama: Subject) -> None:
    engine = Engine(llama)
    with pytest.raises(EngineError, match="row 1 is empty"):
        engine.next_logits([Row((5,), 1), Row((), 0)])
    with pytest.raises(EngineError, match="513 tokens; the subject has 512 positions"):
        engine.next_logits([Row((5,) * 513, 1)])
    with pytest.raises(EngineError, match="n_prompt is 3, must be 0 to 2"):
        engine.next_logits([Row((5, 6), 3)])
    with pytest.raises(EngineError, match="at least one prompt token"):
        engine.token_logprobs([Row((5, 6), 0)])
    with pytest.raises(EngineError, match="'response_mean' of a row of 2 tokens"):
        engine.activations([Row((5, 6), 2)], [Site("resid", 0)], "response_mean")
    with pytest.raises(EngineError, match="an empty token sequence"):
        engine.option_logprobs([Row((5, 6), 2)], [{"x": [()]}])


def test_no_rows_give_no_results(llama: Subject) -> None:
    engine = Engine(llama)
    assert engine.option_logprobs([], []) == []
    assert engine.token_logprobs([]) == []
    assert engine.generate([], 4) == []
    assert engine.activations([], [Site("resid", 0)], "last")[Site("resid", 0)].shape == (0, 32)


def test_rows_without_a_response_have_no_logprobs(llama: Subject) -> None:
    found = Engine(llama).token_logprobs([Row((5, 6), 2), Row((5, 6, 7), 2)])
    assert [len(each) for each in found] == [0, 1]
    assert [len(each) for each in Engine(llama).token_logprobs([Row((5, 6), 2)])] == [0]


def test_a_failure_in_the_middle_leaves_model_and_engine_as_they_were(llama: Subject) -> None:
    engine = Engine(llama, max_tokens=8)
    rows = [
        Row((5, 6, at), 2, (weight_edits(llama)["dense norm"], Add(Site("resid", 1), VECTOR))) for at in range(7, 12)
    ]
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    base = engine.next_logits([Row((5, 6), 2)])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        engine.token_logprobs(rows, on_result=fail)
    assert caught.tb is not None  # the frames are still alive
    assert all(torch.equal(value, before[name]) for name, value in llama.model.state_dict().items())
    other = threading.Thread(target=lambda: seen.append(engine.next_logits([Row((5, 6), 2)])))
    seen: list[Tensor] = []
    other.start()
    other.join(timeout=10)
    assert torch.equal(seen[0], base)
    assert llama.model.config._attn_implementation != "orch_packed"


def beside_nan(subject: Subject, clean: list[Row]) -> list[Row]:
    """`clean` behind rows whose states are not numbers, and which come first in every level."""
    wild = (Add(Site("resid", 0), torch.full((subject.d_model,), torch.nan)),)
    return [*(Row((0, *row.tokens[1:]), row.n_prompt, wild) for row in clean), *clean]


def test_an_arm_that_is_not_a_number_leaves_the_other_arms_as_they_are(subject: Subject) -> None:
    arm = (Add(Site("resid", 0), normal(subject.d_model, seed=1)),)
    clean = [Row(row.tokens, row.n_prompt, arm) for row in some_rows(8)]
    beside = beside_nan(subject, clean)
    engine = Engine(subject)
    found = engine.token_logprobs(beside)
    assert all(values.isnan().all() for values in found[: len(clean)])
    for values, alone in zip(found[len(clean) :], engine.token_logprobs(clean), strict=True):
        torch.testing.assert_close(values, alone, atol=CLOSE, rtol=CLOSE)
    told = engine.generate(beside, 8)[len(clean) :]
    for completion, alone_ in zip(told, engine.generate(clean, 8), strict=True):
        assert completion.tokens == alone_.tokens
        assert completion.logprobs == pytest.approx(alone_.logprobs, abs=1e-4)


def test_the_gradient_of_an_arm_is_the_same_beside_one_that_is_not_a_number(llama: Subject) -> None:
    vectors = [normal(llama.d_model, seed=1).requires_grad_() for _ in range(2)]
    for vector, others in zip(vectors, (False, True), strict=True):
        clean = [Row(row.tokens, row.n_prompt, (Add(Site("resid", 0), vector),)) for row in some_rows(8)]
        rows = beside_nan(llama, clean) if others else clean
        positions = [range(row.n_prompt - 1, len(row.tokens) - 1) for row in rows]
        states = Engine(llama).forward(rows, positions)
        wanted = sum(len(span) for span in positions[-len(clean) :])
        llama.head(states[-wanted:]).logsumexp(-1).sum().backward()
    assert vectors[0].grad is not None
    torch.testing.assert_close(vectors[1].grad, vectors[0].grad, atol=1e-4, rtol=1e-4)
