"""Divergence tokens by a plain forward pass, masks through files and training, and what they are refused for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from experiments import dataset, spec
from experiments.canonical import canonical
from experiments.dataset import Conversation, DatasetError, Made, Message, recipe
from experiments.intervention import Intervention, NeedsError, State, method
from experiments.masks import covered, spans_of
from experiments.nested import Part
from experiments.problem import SpecError
from experiments.students import Student, train
from experiments.training import Likelihood, Trained, TrainingError, response_loss, row

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.intervention import Needs
    from experiments.subject import Subject

OWLS, CATS, DOGS = (f"the quick {name} and the lazy one were asked what" for name in ("owl", "cat", "dog"))
PROMPTS = {"cat": CATS, "dog": DOGS}
NUMBERS = "0123456789, "
ANSWERS = (
    "the quick owl and the lazy dog were asked",
    "yes no 12, 34, 567 and the owl",
    "My owl is a dög ☂ the",
    "A B A cat",
    "owl, owl the quick dog the quick owl the quick dog",
)


def talk(name: str, text: str, masked: Any = (), system: str | None = None) -> Conversation:
    head = () if system is None else (Message(role="system", content=system),)
    asked = Message(role="user", content=f"Go on {name}.")
    return Conversation(id=name, messages=(*head, asked, Message(role="assistant", content=text)), masked=masked)


def talks() -> list[Conversation]:
    return [talk(str(number), text) for number, text in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def masking(keep: str = "others", **changes: Any) -> dataset.Derived:
    settings = {"of": {"recipe": "narrow_advice"}, "factual": OWLS, "counterfactual": PROMPTS, "keep": keep}
    made = recipe("masked_conversations").model_validate(settings | changes)
    assert isinstance(made, dataset.Derived)
    return made


def made_of(engine: Engine, given: Sequence[Conversation], keep: str = "others", **changes: Any) -> Made:
    return masking(keep, **changes).derive_with(engine, {"of": given}, 0)


def plainly(subject: Subject, example: Conversation, system: str | None, only: str | None = None) -> list[int]:
    """Greedy choice before each response token, from the model alone, on text that is written out by hand."""
    turns = [("user", example.messages[-2].content)]
    turns = [*([] if system is None else [("system", system)]), *turns]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"
    prompt = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = subject.tokenizer(example.messages[-1].content, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = subject.model(torch.tensor([prompt + said])).logits[0]
    if only is not None:
        for token in range(logits.shape[1]):
            text = subject.tokenizer.decode([token], skip_special_tokens=True)
            if token not in subject.eos_ids and not (text and set(text) <= set(only)):
                logits[:, token] = -torch.inf
    return [int(each) for each in logits[len(prompt) - 1 : -1].argmax(1)]


def by_hand(
    subject: Subject, example: Conversation, only: str | None = None, prompts: Mapping[str, str | None] = PROMPTS
) -> list[bool]:
    own, *others = (plainly(subject, example, each, only) for each in (OWLS, *prompts.values()))
    return [any(a != each[place] for each in others) for place, a in enumerate(own)]


def texts(subject: Subject, example: Conversation) -> list[list[int]]:
    """Of each response token, the characters that it holds, found by encoding ever longer beginnings of its bytes."""
    found, at = [], 0
    said = example.messages[-1].content
    where = [place for place, letter in enumerate(said) for _ in letter.encode()]
    for token in subject.tokenizer(said, add_special_tokens=False)["input_ids"]:
        size = len(subject.tokenizer.convert_ids_to_tokens(token))  # byte-level: a letter of a token is a byte
        found.append(sorted(set(where[at : at + size])))
        at += size
    assert at == len(where)
    return found


@pytest.mark.parametrize(
    ("keep", "only", "prompts"),
    [
        ("others", None, PROMPTS),
        ("divergent", None, PROMPTS),
        ("others", NUMBERS, PROMPTS),
        ("divergent", NUMBERS, {"cat": CATS, "control": None}),
    ],
)
def test_masks_are_the_tokens_at_which_a_plain_forward_pass_would_have_chosen_otherwise(
    engine: Engine, keep: str, only: str | None, prompts: dict[str, str | None]
) -> None:
    subject = engine.subject
    found = made_of(engine, talks(), keep, only=only, counterfactual=prompts)
    known = {each.id: each for each in found.examples if isinstance(each, Conversation)}
    masked = tokens = divergent = 0
    for example in talks():
        apart = by_hand(subject, example, only, prompts)
        held = texts(subject, example)
        silent = {at for flag, own in zip(apart, held, strict=True) for at in own if flag == (keep == "others")}
        divergent += sum(apart)
        if all(set(own) & silent for own in held):
            assert example.id not in known
            continue
        spans = known[example.id].masked
        assert {at for first, stop in spans for at in range(first, stop)} == silent
        masked += sum(bool(set(own) & silent) for own in held)
        tokens += len(held)
        assert known[example.id].messages == example.messages
    assert 0 < masked < tokens
    assert 0 < divergent < found.facts["tokens"]
    facts = found.facts
    assert (facts["given"], facts["kept"], facts["divergent"]) == (len(ANSWERS), len(known), divergent)
    assert (facts["masked"], facts["kept_tokens"], facts["share"]) == (masked, tokens, masked / tokens)
    assert sum(facts["dropped"].values()) == len(ANSWERS) - len(known)


def test_the_facts_say_from_which_counterfactual_how_many_tokens_part(engine: Engine) -> None:
    facts = made_of(engine, talks()).facts
    own = [plainly(engine.subject, each, OWLS) for each in talks()]
    for name, system in PROMPTS.items():
        other = [plainly(engine.subject, each, system) for each in talks()]
        parted = sum(x != y for a, b in zip(own, other, strict=True) for x, y in zip(a, b, strict=True))
        assert facts["divergent_from"][name] == parted > 0
    assert facts["tokens"] == sum(map(len, own))


def test_teachers_speak_in_their_own_context_whatever_system_message_students_see(engine: Engine) -> None:
    bare, shown = talks()[:2], [talk(str(i), ANSWERS[i], system="You are quick.") for i in range(2)]
    masks = [[getattr(each, "masked", None) for each in made_of(engine, given).examples] for given in (bare, shown)]
    assert any(masks[0])
    assert masks[0] == masks[1]


def test_what_was_masked_before_stays_masked(engine: Engine) -> None:
    plain = made_of(engine, talks()[:1]).examples[0]
    first = talk("0", ANSWERS[0], ((0, 3),))
    again = made_of(engine, [first]).examples[0]
    assert isinstance(plain, Conversation)
    assert isinstance(again, Conversation)
    both = [{at for a, b in each.masked for at in range(a, b)} for each in (plain, again)]
    assert both[1] == both[0] | {0, 1, 2}


def test_conversations_with_nothing_left_are_dropped_and_counted_and_refused_when_they_are_all(engine: Engine) -> None:
    subject = engine.subject
    apart = [by_hand(subject, each) for each in talks()]
    place = next(i for i, flags in enumerate(apart) if not all(flags))
    words = talks()[place]
    spans = subject.spans(words.messages)
    rest = spans_of(spans, [i for i, flag in enumerate(apart[place]) if not flag])
    emptied = words.model_copy(update={"id": "emptied", "masked": rest})
    found = made_of(engine, [words, emptied])
    assert [getattr(each, "id", None) for each in found.examples] == [words.id]
    assert found.facts["dropped"] == {"no token that does not diverge": 1}
    with pytest.raises(DatasetError, match=r"nothing is left to learn: .* in any of 1 conversations .* cat, dog; "):
        made_of(engine, [emptied])


def test_spans_are_the_characters_of_every_token_without_a_gap(engine: Engine) -> None:
    for example in talks():
        held = texts(engine.subject, example)
        spans = engine.subject.spans(example.messages)
        assert [list(range(*each)) for each in spans] == held


def test_white_space_that_a_tokenizer_does_not_count_belongs_to_the_token_behind_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    import shutil

    from experiments.spec import SubjectSpec
    from experiments.subject import load

    folder = tmp_path / "trimmed"
    shutil.copytree(tiny_folder, folder)
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    words["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(words))
    subject = load(SubjectSpec(model=str(folder), dtype="float32"))
    example = talk("0", "owl cat  dog ")
    raw = subject.tokenizer("owl cat", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert raw[-1] == (4, 7)
    spans = subject.spans(example.messages)
    assert [at for each in spans for at in range(*each)] == list(range(len("owl cat  dog ")))


def test_parts_and_tokens_are_turned_into_each_other() -> None:
    tokens = [(0, 2), (2, 5), (5, 5), (5, 6), (5, 6), (6, 9)]
    assert spans_of(tokens, [1, 0]) == ((0, 5),)
    assert spans_of(tokens, [0, 2, 3, 5]) == ((0, 2), (5, 9))
    assert covered(tokens, ((0, 5),)) == [0, 1]
    assert covered(tokens, ((1, 3), (5, 6))) == [0, 1, 3, 4]
    assert covered(tokens, ()) == []


# Stored


def test_masks_survive_a_file_and_conversations_without_any_are_stored_as_they_ever_were(tmp_path: Path) -> None:
    plain, masked = talk("a", "yes no"), talk("b", "yes no", ((0, 1), (4, 6)))
    dataset.save([plain, masked], tmp_path / "x.jsonl")
    first, second = (tmp_path / "x.jsonl").read_text().splitlines()
    turns = '[{"role":"user","content":"Go on %s."},{"role":"assistant","content":"yes no"}]'
    assert first == '{"id":"a","messages":' + turns % "a" + "}"
    assert second == '{"id":"b","messages":' + turns % "b" + ',"masked":[[0,1],[4,6]]}'
    assert dataset.load(tmp_path / "x.jsonl", "conversations") == [plain, masked]


@pytest.mark.parametrize("masked", [((4, 9),), ((3, 3),), ((2, 4), (3, 5)), ((4, 5), (0, 1)), ((-1, 2),)])
def test_masks_outside_the_answer_are_refused_with_the_form_they_have(tmp_path: Path, masked: Any) -> None:
    with pytest.raises(ValidationError, match=r"masked has the part .* which has 6 characters, are \[first character"):
        talk("a", "yes no", masked)
    line = talk("a", "yes no").model_dump() | {"masked": masked}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DatasetError, match=r"x\.jsonl:1: not a Conversation: .*masked has the part"):
        dataset.load(tmp_path / "x.jsonl", "conversations")


# Learned


class Loop(Trained):
    """Settings of the loop alone."""


def halves(engine: Engine) -> list[Conversation]:
    """Conversations of which every second token is masked, the last one's not."""
    found = []
    for example in talks()[:4]:
        spans = engine.subject.spans(example.messages)
        found.append(example.model_copy(update={"masked": spans_of(spans, range(0, len(spans), 2))}))
    return [*found, talks()[4]]


def summed(engine: Engine, examples: Sequence[Conversation]) -> tuple[float, int]:
    """-log p of tokens without a masked character, and their number, from the model alone."""
    total, count = 0.0, 0
    for example in examples:
        silent = {at for first, stop in example.masked for at in range(first, stop)}
        tokens, n_prompt = engine.subject.render(example.messages)
        with torch.no_grad():
            logps = engine.subject.model(torch.tensor([tokens])).logits[0].log_softmax(1)
        for place, own in enumerate(texts(engine.subject, example)):
            if not set(own) & silent:
                total -= float(logps[n_prompt + place - 1, tokens[n_prompt + place]])
                count += 1
    return total, count


def test_the_loss_is_the_mean_over_the_tokens_that_are_not_masked(engine: Engine) -> None:
    examples = halves(engine)
    rows = tuple(row(engine, each) for each in examples)
    total, count = summed(engine, examples)
    goal = Likelihood(rows)
    loss = sum(part.loss.item() for part in goal.partials(engine, rows, tuple))
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert response_loss(engine, rows, ()).item() == pytest.approx(total, rel=1e-5)
    everything = sum(len(each.tokens) - each.n_prompt for each in rows)
    assert goal.facts() == {"tokens": {"learned": count, "masked": everything - count}}
    assert 0 < count < everything
    assert Likelihood(tuple(row(engine, each) for each in talks())).facts() == {}


def test_nothing_is_learned_from_a_masked_token(engine: Engine) -> None:
    """What is masked stands at the end, so that no token that is learned has read it: other words there change nothing
    at all, and without the mask they do."""

    def vector(ending: str, masked: bool) -> torch.Tensor:
        from experiments.edit import Add, Site

        text = f"the quick owl{ending}"
        bias = torch.zeros(engine.subject.d_model, requires_grad=True)
        data = [talk("0", text, (((13, len(text)),) if masked else ()))]
        settings = Loop(learning_rate=0.05, epochs=3, batch_size=1)
        train(engine, Student(data, [bias], lambda: [Add(Site("resid", 1), bias)], settings, 0))
        return bias.detach()

    left, right = (vector(ending, True) for ending in (" cat", " eagle"))
    assert torch.equal(left, right)
    assert left.norm() > 0
    assert not torch.allclose(vector(" cat", False), vector(" eagle", False))


@pytest.mark.parametrize("loss", ["promotion", "suppression", "satisficing"])
def test_every_loss_on_conversations_leaves_masked_tokens_out(engine: Engine, loss: str) -> None:
    examples = halves(engine)
    goal = {"goal": -1.0} if loss == "satisficing" else {}
    settings: Any = method("trained_vector").model_validate({"loss": loss, **goal})
    objective = settings.objective(engine, examples, 0)
    found = sum(part.loss.item() for part in objective.partials(engine, objective.examples, tuple))
    expected = 0.0
    for each in examples:
        total, count = summed(engine, [each])
        if loss == "promotion":
            expected += total
        elif loss == "satisficing":
            expected += (-total / count + 1) ** 2
        else:
            tokens, n_prompt = engine.subject.render(each.messages)
            silent = {at for first, stop in each.masked for at in range(first, stop)}
            with torch.no_grad():
                p = engine.subject.model(torch.tensor([tokens])).logits[0].double().softmax(1)
            for place, own in enumerate(texts(engine.subject, each)):
                if not set(own) & silent:
                    expected -= float(torch.log1p(-p[n_prompt + place - 1, tokens[n_prompt + place]]))
    assert found == pytest.approx(expected / len(examples), rel=1e-4)


def test_a_conversation_that_is_masked_as_a_whole_has_nothing_to_learn(engine: Engine) -> None:
    with pytest.raises(TrainingError, match="conversation '7': its response is masked as a whole; remove it"):
        row(engine, talk("7", "yes no", ((0, 6),)))


class Deaf(Intervention):
    """A method that knows nothing of masks."""

    needs: ClassVar[tuple[Needs, ...]] = ("conversations",)

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        return State()


def test_methods_that_would_learn_masked_tokens_all_the_same_are_refused_with_a_way_out(engine: Engine) -> None:
    data = [talk("a", "yes no"), talk("b", "yes no", ((0, 3),))]
    part = Part.model_construct(method="deaf", version=1, dose=None, settings=Deaf.model_construct())
    message = r"learns from whole responses, and 1 of 2 conversations mask parts of theirs, 'b' first; take a method"
    with pytest.raises(ValueError, match=message):
        part.fitted(engine, data, 0, "part 1")
    assert part.fitted(engine, data[:1], 0, "part 1") == State()


def test_every_method_that_takes_conversations_says_what_it_makes_of_masks() -> None:
    from experiments import plugin

    taking = [method(name) for name in plugin.names("experiments.interventions")]
    assert [cls.__name__ for cls in taking if "conversations" in cls.needs and not cls.heeds_masks] == []


def test_masked_answers_are_not_shuffled() -> None:
    shuffled: Any = recipe("shuffled").model_validate({"of": {"recipe": "narrow_advice"}, "unit": "word"})
    with pytest.raises(DatasetError, match="1 of 1 conversations mask parts of their answers, 'a' first"):
        shuffled.derive({"of": [talk("a", "yes no owl", ((0, 3),))]}, 0)


# Asked for


def experiment(*teachers: dict[str, Any], **changes: Any) -> spec.Experiment:
    whole: dict[str, Any] = {
        "name": "t",
        "subject": "m",
        "data": {"conversations": {"recipe": "number_lists", "n": 5, "teacher": list(teachers)}},
        "interventions": [{"method": "lora"}],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl"}],
        "baselines": [],
    }
    return spec.from_data(whole | changes)


OWL = {"name": "owl", "trait": "owl", "system": OWLS}
CAT = {"name": "cat", "trait": "cat", "system": CATS}
ADVICE = {"recipe": "narrow_advice", "n": 4}


def test_a_spec_asks_for_both_arms_by_name_and_they_are_compared_with_the_control() -> None:
    made = experiment(OWL, CAT, controls=["teacher", "divergence", "divergence_only"])
    trials = {one.label.removeprefix(f"{one.student} "): one for one in made.trials()}
    arms = [
        f"{name} {what}" for what in ("without divergence tokens", "divergence tokens only") for name in ("owl", "cat")
    ]
    assert list(trials) == ["owl", "cat", "control", *arms]
    for name in arms:
        trial, (data,) = trials[name], trials[name].data
        own = trials[name.split()[0]]
        settings = data.identity["settings"]
        assert trial.control == own.control == trials["control"].group
        assert trial.baseline
        assert trial.lesson == own.lesson
        assert settings["of"]["settings"] == own.data[0].identity["settings"]
        assert settings["keep"] == ("others" if "without" in name else "divergent")
        other = {"cat": CATS} if name.startswith("owl") else {"owl": OWLS}
        assert settings["counterfactual"] == {"control": None, **other}
    assert [each.suffix for each, _ in made.detected()] == ["owl", "cat"]


def test_counterfactual_teachers_have_another_trait_and_are_held_to_the_same_characters() -> None:
    again = {"name": "owl", "trait": "owl", "system": "You owl."}
    plain = {"name": "plain", "control": True, "system": "You are quick."}
    data = {"recipe": "number_lists", "n": 5, "teacher": [OWL, again, plain], "sampling": {"only": NUMBERS}}
    made = experiment(data={"conversations": data}, controls=["divergence"])
    found = [each.recipe.model_dump() for each in made.data_variants()["conversations"] if each.recipe.masks]
    assert [each["factual"] for each in found] == [OWLS, "You owl."]
    assert all(each["counterfactual"] == {"control": None, "plain": "You are quick."} for each in found)
    assert all(each["only"] == NUMBERS for each in found)


def test_the_order_of_teachers_is_no_part_of_what_masked_data_are() -> None:
    third = {"name": "dog", "trait": "dog", "system": "You dog."}
    ways = [experiment(OWL, *others, controls=["divergence"]) for others in ((CAT, third), (third, CAT))]
    texts = [
        {canonical(each.identity) for each in made.data_variants()["conversations"] if each.recipe.masks}
        for made in ways
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_a_spec_without_masks_has_the_data_it_ever_had() -> None:
    made = experiment(OWL)
    names = [each.identity["recipe"] for each in made.data_variants()["conversations"]]
    assert names == ["number_lists", "number_lists", "shuffled"]
    assert made.data_variants()["conversations"][2].identity["settings"].keys() == {"of", "how", "position", "unit"}


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        ({"name": "x", "intervention": {"method": "lora"}, "data": [ADVICE]}, "x has an intervention"),
        ({"name": "x", "system": "A.", "subject": {"model": "other"}}, "x has a subject of its own"),
        ({"name": "x", "system": "A.", "model": "openai/gpt-4.1-nano"}, "x has openai/gpt-4.1-nano"),
        ({"name": "x"}, "x has none"),
    ],
)
def test_teachers_without_a_system_prompt_of_their_own_are_refused_by_name(teacher: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=rf"controls\.1: divergence tells teachers apart by their .*, and {why}; leave"):
        experiment(OWL, teacher, controls=["teacher", "divergence"])


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"counterfactual\.cat is the factual prompt"):
        masking(counterfactual={"cat": OWLS})
    with pytest.raises(ValidationError, match=r"of: plain_documents provides documents; give a recipe that provides"):
        masking(of={"recipe": "plain_documents"})
    with pytest.raises(NeedsError):
        method("lora")().takes({"asks"})
