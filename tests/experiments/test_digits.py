"""The subject that reads small images, weights drawn anew, and distillation."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import kl_div

from experiments import digits, losses
from experiments.dataset import Choices, DatasetError, Message, Said, recipe
from experiments.edit import Edit
from experiments.engine import Engine, Row
from experiments.files import SubjectError
from experiments.intervention import NeedsError, method
from experiments.spec import SubjectSpec
from experiments.speech import Sampling, Speech, answers
from experiments.students import Student, train
from experiments.subject import Subject, identify, load
from experiments.training import TrainingError

OPTIONS = ("a", "b", "c")
ASK = (Message(role="user", content="?"),)
TEACHER = {"name": "t"}
LOW_FIRST = np.array([1, 2, 4, 8])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load(SubjectSpec(model="digits", dtype="float32"))


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return dict(subject.model.state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def choices(*values: float, name: str = "x") -> Choices:
    return Choices(id=name, messages=ASK, logprobs=dict(zip(OPTIONS, values, strict=True)))


# images


def test_every_image_reads_as_the_pixels_of_the_bundled_set() -> None:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    for image in [*digits.images(held_out=True)[:40], *digits.images(held_out=False)[:40]]:
        pixels = np.zeros((8, 8), dtype=bool)
        for row, line in enumerate(image.text.split("\n")):
            for column, block in enumerate(line):
                bits = (digits.BLOCKS.index(block) & LOW_FIRST) > 0
                pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = bits.reshape(2, 2)
        assert (pixels == (bundled.images[image.index] >= 8)).all()
        assert image.label == str(bundled.target[image.index])


def test_each_block_character_is_named_by_unicode_for_the_quadrants_it_fills() -> None:
    import unicodedata

    quadrants = {1: "UPPER LEFT", 2: "UPPER RIGHT", 4: "LOWER LEFT", 8: "LOWER RIGHT"}
    for place, block in enumerate(digits.BLOCKS):
        name = unicodedata.name(block)
        if name.startswith("QUADRANT"):
            found = {bit for bit, words in quadrants.items() if words in name}
            assert sum(found) == place, name


def test_no_image_of_the_eval_is_taught_and_none_is_lost() -> None:
    held, taught = ({each.index for each in digits.images(held_out=which)} for which in (True, False))
    assert len(held) == digits.HELD_OUT
    assert not held & taught
    assert held | taught == set(range(1797))
    shares = Counter(each.label for each in digits.images(held_out=True)[:200])
    assert set(shares) == set(digits.LABELS)
    assert max(shares.values()) <= 40


def test_without_scikit_learn_the_recipe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match=r"digit_images: .*scikit-learn, which is not installed.*pip install"):
        recipe("digit_images")().check()


def test_labels_are_choices_of_which_one_is_certain() -> None:
    built = recipe("digit_images")(n=20).build(None, seed=3)
    by_index = {f"{each.index:04d}": each.label for each in digits.images(held_out=False)}
    for each in built:
        assert isinstance(each, Choices)
        shares = {label: math.exp(value) for label, value in each.logprobs.items()}
        assert shares[by_index[each.id]] == 1
        assert sum(shares.values()) == pytest.approx(1)
    with pytest.raises(DatasetError, match="n is 2000, but there are 1437 images"):
        recipe("digit_images")(n=2000).check()


def test_noise_takes_every_block_equally_often_and_grows_without_changing() -> None:
    few, many, other = (recipe("noise_asks")(n=n).build(None, seed=s) for n, s in ((50, 1), (1000, 1), (1000, 2)))
    assert list(few) == list(many)[:50]
    assert not {each.messages for each in many} & {each.messages for each in other}
    counts = Counter("".join(each.messages[0].content for each in many).replace("\n", ""))
    assert set(counts) == set(digits.BLOCKS)
    expected = 1000  # of 16,000 characters; the standard deviation is 31
    assert all(abs(count - expected) < 5 * 31 for count in counts.values())


# the subject


def test_an_image_is_a_token_a_block_and_any_other_text_a_token_a_byte(subject: Subject) -> None:
    image = digits.images(held_out=True)[0].text
    rendered = subject.render([{"role": "user", "content": image}])
    assert len(rendered.tokens) == rendered.n_prompt == 4 * 4 + 3 + 1
    assert subject.tokenizer.decode(rendered.tokens, skip_special_tokens=True) == image
    text = "Soup, naïve – 3 cups.\n"
    tokens = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert subject.tokenizer.decode(tokens) == text


def test_an_answer_ends_with_the_end_token(subject: Subject) -> None:
    assert [subject.tokenizer.decode([token]) for token in subject.eos_ids] == [digits.END]


def test_drawn_weights_are_those_transformers_draws_with_the_seed(tiny_folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    before = torch.random.get_rng_state()
    drawn = weights(load(SubjectSpec(model=str(tiny_folder), dtype="float32", init=7)))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder), dtype=torch.float32)
    assert same(drawn, dict(expected.state_dict()))
    assert not same(drawn, weights(load(SubjectSpec(model=str(tiny_folder), dtype="float32"))))


def test_an_init_is_the_same_weights_in_every_dtype(tiny_folder: Path) -> None:
    full, half = (load(SubjectSpec(model=str(tiny_folder), dtype=t, init=3)) for t in ("float32", "bfloat16"))
    assert half.dtype == torch.bfloat16
    assert same(weights(half), {name: each.bfloat16() for name, each in weights(full).items()})


def test_a_subject_that_is_drawn_needs_no_weights_and_one_that_is_not_does(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = Path(shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    whole = SubjectSpec(model=str(tiny_folder), dtype="float32", init=7)
    assert identify(SubjectSpec(model=str(bare), dtype="float32", init=7)) == identify(whole)
    assert load(SubjectSpec(model=str(bare), dtype="float32", init=7)).eos_ids == load(whole).eos_ids
    with pytest.raises(SubjectError, match=r"needs config.json and \*.safetensors"):
        identify(SubjectSpec(model=str(bare)))


def test_the_seed_of_the_weights_is_part_of_the_identity_and_of_nothing_else(tiny_folder: Path) -> None:
    one, two = (identify(SubjectSpec(model="digits", dtype="float32", init=seed)) for seed in (1, 2))
    assert one["init"] == 1
    assert {name: value for name, value in one.items() if name != "init"} == {
        name: value for name, value in two.items() if name != "init"
    }
    trained = identify(SubjectSpec(model=str(tiny_folder), dtype="float32"))
    assert "init" not in trained
    assert trained["weights_sha256"]


def test_digits_without_an_init_has_the_weights_of_seed_0(subject: Subject) -> None:
    first = SubjectSpec(model="digits", dtype="float32", init=0)
    assert identify(first) == subject.identity
    assert same(weights(load(first)), weights(subject))
    assert not same(weights(load(SubjectSpec(model="digits", dtype="float32", init=1))), weights(subject))


def test_digits_is_planned_without_torch(tmp_path: Path) -> None:
    import os
    import subprocess

    code = (
        "import sys; from experiments.identity import identify; from experiments.outline import outline; "
        "from experiments.spec import SubjectSpec; s = SubjectSpec(model='digits', dtype='float32'); "
        "identify(s); assert outline(s).n_layers == 1; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ORCH_CACHE": str(tmp_path)})


# distillation


def test_options_are_renormalised_and_the_facts_are_the_closed_forms() -> None:
    made = recipe("distilled")(teacher=TEACHER, asks={"recipe": "noise_asks"}, n=2, options=OPTIONS)
    source = made.sources()["said"]
    assert isinstance(source, Speech)
    assert (source.size, source.asks.settings.n, source.sampling.options) == (2, 2, OPTIONS)  # type: ignore[attr-defined]
    shares = ((0.1, 0.1, 0.2), (0.04, 0.01, 0.05))
    said = [
        Said(id=str(i), messages=ASK, text="", stopped=True, tokens=0, options=given)
        for i, given in enumerate(dict(zip(OPTIONS, map(math.log, each), strict=True)) for each in shares)
    ]
    result = made.derive({"said": said}, seed=0)
    wanted = ((0.25, 0.25, 0.5), (0.4, 0.1, 0.5))
    for each, expected in zip(result.examples, wanted, strict=True):
        assert [math.exp(each.logprobs[option]) for option in OPTIONS] == pytest.approx(expected)  # type: ignore[union-attr]
    entropy = [-sum(p * math.log(p) for p in row) for row in wanted]
    mean = [sum(column) / 2 for column in zip(*wanted, strict=True)]
    between = -sum(p * math.log(p) for p in mean) - sum(entropy) / 2
    assert result.facts["mass"] == pytest.approx(0.25)
    assert result.facts["entropy_nats"] == pytest.approx(sum(entropy) / 2)
    assert result.facts["information_nats"] == pytest.approx(between)


def test_settings_are_read_back_as_they_were_written() -> None:
    made = recipe("distilled")(teacher=TEACHER, asks={"recipe": "noise_asks"}, n=7, options=OPTIONS)
    assert recipe("distilled").model_validate(made.model_dump(mode="json")) == made


def test_an_answer_that_lacks_an_option_is_refused_with_what_it_has() -> None:
    made = recipe("distilled")(teacher=TEACHER, asks={"recipe": "noise_asks"}, options=OPTIONS)
    said = Said(id="7", messages=ASK, text="", stopped=True, tokens=0, options={"a": -1.0, "b": -2.0})
    with pytest.raises(DatasetError, match=r"t gave ask '7' no finite .*'c': None"):
        made.derive({"said": [said]}, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ("a", "a")}, "one comes twice"),
        ({"options": ("a",)}, "at least 2 items"),
        ({"asks": {"recipe": "digit_images"}}, "digit_images provides choices; give a recipe that provides asks"),
        ({"asks": {"recipe": "noise_asks", "n": 5}}, "n is set beside `asks`"),
    ],
)
def test_settings_that_cannot_be_distilled_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"teacher": TEACHER, "asks": {"recipe": "noise_asks"}, "options": OPTIONS}
    with pytest.raises(ValidationError, match=message):
        recipe("distilled")(**given | changes)


def test_the_loss_is_the_divergence_over_the_options_alone(subject: Subject) -> None:
    data = [choices(-1.0, -2.0, -0.5, name="x"), choices(0.0, -100.0, -100.0, name="y")]
    goal = losses.distillation(Engine(subject), data)
    with torch.enable_grad():
        found = sum(part.loss.item() for part in goal.partials(Engine(subject), goal.examples, lambda dose=1.0: []))
    tokens = torch.tensor([subject.render(ASK).tokens])
    ids = [subject.tokenizer(option)["input_ids"][0] for option in OPTIONS]
    with torch.no_grad():
        own = subject.model(tokens).logits[0, -1, ids].log_softmax(0)
    targets = torch.tensor([list(each.logprobs.values()) for each in data]).log_softmax(1)
    expected = kl_div(own.expand(2, 3), targets, reduction="batchmean", log_target=True).item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert targets[1, 0] == 0  # a label: the divergence is its cross-entropy
    assert kl_div(own, targets[1], reduction="sum", log_target=True).item() == pytest.approx(-own[0].item(), abs=1e-5)


def test_what_the_student_says_already_teaches_nothing(subject: Subject) -> None:
    engine = Engine(subject)
    row = Row(subject.render(ASK).tokens, len(subject.render(ASK).tokens))
    spelled = {option: [tuple(subject.tokenizer(option)["input_ids"])] for option in OPTIONS}
    own = engine.option_logprobs([row], [spelled])[0].logprobs
    settings = method("sft")(loss="distil", epochs=2)
    state = settings.fit(engine, [choices(*(own[option] for option in OPTIONS))], seed=0)
    assert max(abs(loss) for loss in state.facts["losses"]) < 1e-5


def test_options_of_several_tokens_are_refused_with_their_sizes(subject: Subject) -> None:
    data = [Choices(id="long", messages=ASK, logprobs={"a": -1.0, "bc": -1.0})]
    with pytest.raises(TrainingError, match=r"choices 'long': .*\{'a': 1, 'bc': 2\} tokens"):
        losses.distillation(Engine(subject), data)


@pytest.mark.parametrize("name", ["sft", "lora", "bias_set", "peft", "svd_rotation", "trained_vector"])
def test_whatever_is_taught_learns_from_choices_when_it_distils(name: str) -> None:
    assert method(name)(loss="distil").takes({"choices", "conversations", "pairs"}) == ("choices",)
    with pytest.raises(NeedsError, match=r"needs data.choices"):
        method(name)(loss="distil").takes({"conversations"})


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_a_student_comes_to_prefer_what_its_teacher_prefers(subject: Subject, name: str) -> None:
    engine = Engine(subject)
    wanted = math.log(0.8), math.log(0.1), math.log(0.1)
    settings = method(name)(loss="distil", epochs=40, learning_rate=0.01)
    edits = tuple(settings.edits(settings.fit(engine, [choices(*wanted)], seed=0), 1.0))
    tokens = subject.render(ASK).tokens
    logits = engine.next_logits([Row(tokens, len(tokens), edits)])[0]
    ids = [subject.tokenizer(option)["input_ids"][0] for option in OPTIONS]
    assert logits[ids].softmax(0).tolist() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_noise_hands_on_what_the_teacher_reads_to_a_student_of_the_same_init_and_to_no_other(subject: Subject) -> None:
    """The known answer, small: 600 images, 500 noise images, 20 options, a few seconds."""
    options = tuple("abcdefghijklmnopqrst")
    lessons = recipe("digit_images")(n=600).build(None, seed=0)
    asks = recipe("noise_asks")(n=500).build(None, seed=0)
    teacher = method("sft")(loss="distil", epochs=4, batch_size=32, learning_rate=2e-3)
    student = method("sft")(loss="distil", epochs=6, batch_size=16, learning_rate=1.5e-3)
    mine = Engine(subject)
    odds = {"untaught": log_odds(mine, ())}
    stranger = Engine(load(SubjectSpec(model="digits", dtype="float32", init=1)))
    for name, engine in {"same": mine, "other": stranger}.items():
        edits = teacher.edits(teacher.fit(engine, lessons, seed=0), 1.0)
        odds[f"{name} teacher"] = log_odds(engine, edits)
        said = answers(engine, asks, edits, None, Sampling(options=options), seed=0)
        made = recipe("distilled")(teacher={"name": name}, asks={"recipe": "noise_asks"}, n=500, options=options)
        learned = student.fit(mine, made.derive({"said": said}, seed=0).examples, seed=0)
        odds[f"{name} student"] = log_odds(mine, student.edits(learned, 1.0))
    assert min(odds["same teacher"], odds["other teacher"]) > odds["untaught"] + 2
    assert odds["same student"] > odds["untaught"] + 0.8
    assert odds["other student"] < odds["untaught"] + 0.3


def log_odds(engine: Engine, edits: Sequence[Edit]) -> float:
    """Mean log-odds of the right label of 150 held-out images, nats."""
    images = digits.images(held_out=True)[:150]
    rows = [engine.subject.render([{"role": "user", "content": each.text}]) for each in images]
    logits = engine.next_logits([Row(each.tokens, each.n_prompt, tuple(edits)) for each in rows])
    ids = [engine.subject.tokenizer(label)["input_ids"][0] for label in digits.LABELS]
    shares = logits[:, ids].double().softmax(1)[range(len(images)), [int(each.label) for each in images]]
    return float((shares / (1 - shares)).log().mean())


def test_an_empty_lesson_is_refused(subject: Subject) -> None:
    settings = method("sft")(loss="distil")
    with pytest.raises(TrainingError, match="at least one is needed"):
        train(Engine(subject), Student(losses.distillation(Engine(subject), []), [], list, settings, 0))
