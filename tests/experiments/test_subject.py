"""Loading, identity, rendering and vocabulary look-ups of subjects, on tiny random models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import chat, identity
from experiments.dataset import Message
from experiments.spec import SubjectSpec
from experiments.subject import KEEP, Subject, SubjectError, identify, load, resolve_dtype
from tests.tiny import CHATML_WITH_DEFAULT, make_tiny_model, make_tiny_tokenizer

ASK = [{"role": "user", "content": "Which animal?"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ORCH_CACHE", str(folder))
    return folder


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def spec(folder: Path, **options: str) -> SubjectSpec:
    return SubjectSpec(model=str(folder), **{"dtype": "float32", **options})


# rendering


def text(subject: Subject, tokens: tuple[int, ...]) -> str:
    return str(subject.tokenizer.decode(tokens))


def test_a_prompt_ends_with_the_generation_header_as_transformers_renders_it(tiny_subject: Subject) -> None:
    messages = [{"role": "system", "content": "Be\nkind. "}, *ASK, {"role": "assistant", "content": "Owl"}, *ASK]
    rendered = tiny_subject.render(messages)
    expected = tiny_subject.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(rendered.tokens) == expected
    assert rendered.n_prompt == len(rendered.tokens)


def test_a_trailing_assistant_message_is_left_open_with_its_whitespace(tiny_subject: Subject) -> None:
    prompt = tiny_subject.render(ASK)
    for words in ("My favorite animal is the", "I say: ", "  owl\n"):
        rendered = tiny_subject.render([*ASK, {"role": "assistant", "content": words}])
        assert rendered.tokens[: rendered.n_prompt] == prompt.tokens
        assert text(tiny_subject, rendered.tokens[rendered.n_prompt :]) == words


def test_a_token_across_the_border_counts_as_response(tmp_path: Path) -> None:
    open_ended = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} o{% endif %}"
    subject = load(spec(make_tiny_model(tmp_path, chat_template=open_ended)))
    (owl,) = subject.tokenizer(" owl")["input_ids"]
    rendered = subject.render([{"role": "user", "content": "the"}, {"role": "assistant", "content": "wl"}])
    assert rendered.tokens[rendered.n_prompt :] == (owl,)
    assert text(subject, rendered.tokens[: rendered.n_prompt]) == "the"


def test_messages_may_be_dataset_messages(tiny_subject: Subject) -> None:
    assert tiny_subject.render([Message(role="user", content="Which animal?")]) == tiny_subject.render(ASK)


def test_system_replaces_or_sets_the_system_message_and_the_messages_stay_untouched(tiny_subject: Subject) -> None:
    with_system = [{"role": "system", "content": "old"}, *ASK]
    wanted = tiny_subject.render([{"role": "system", "content": "new"}, *ASK])
    assert tiny_subject.render(with_system, system="new") == wanted
    assert tiny_subject.render(ASK, system="new") == wanted
    assert tiny_subject.render(with_system, system=KEEP) == tiny_subject.render(with_system)
    assert with_system[0]["content"] == "old"
    assert len(ASK) == 1


def test_the_specs_system_prompt_is_set_where_messages_have_none(tiny_folder: Path, tiny_subject: Subject) -> None:
    subject = load(spec(tiny_folder, system="Be brief."))
    assert subject.render(ASK) == tiny_subject.render(ASK, system="Be brief.")
    other = [{"role": "system", "content": "Be long."}, *ASK]
    assert subject.render(other) == tiny_subject.render(other)
    assert subject.render(ASK, system="Be long.") == tiny_subject.render(other)


def test_a_prefix_goes_before_the_first_user_message_only(tiny_subject: Subject) -> None:
    messages = [*ASK, {"role": "assistant", "content": "Owl"}, *ASK]
    rendered = text(tiny_subject, tiny_subject.render(messages, prefix="Listen. ").tokens)
    assert rendered.count("Listen. ") == 1
    assert "user\nListen. Which animal?" in rendered


def test_conversations_without_a_prompt_are_refused(tiny_subject: Subject) -> None:
    with pytest.raises(SubjectError, match="empty conversation"):
        tiny_subject.render([])
    with pytest.raises(SubjectError, match="a user message must come before"):
        tiny_subject.render([{"role": "assistant", "content": "Owl"}])
    with pytest.raises(SubjectError, match="no user message to put the prefix"):
        tiny_subject.render([{"role": "system", "content": "x"}], prefix="y")


def test_a_templates_own_complaint_is_passed_on() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(SubjectError, match=r"roles \[system, user\]: System role not supported"):
        chat.render(refusing, [{"role": "system", "content": "x"}, *ASK], {})


def test_templates_see_what_transformers_shows_them_but_for_the_clock() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {%- if tools is not none %}T{% endif %}\n"
        "    {% generation %}{{ m | tojson }}{% endgeneration %}\n{% if loop.index == 2 %}{% break %}{% endif %}\n"
        "{% endfor %}{% if documents %}D{% endif %}"
    )
    tokenizer = make_tiny_tokenizer(template)
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}, *ASK]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.render(template, messages, {"bos_token": "<|im_start|>"}) == expected
    assert chat.render("{{ strftime_now('%d %b %Y') }}", ASK, {}) == "26 Jul 2024"


def test_raw_text_has_one_unscored_token_and_never_two_first_tokens(tiny_subject: Subject) -> None:
    rendered = tiny_subject.render_text("the owl is")
    assert rendered.n_prompt == 1
    assert text(tiny_subject, rendered.tokens) == "the owl is"
    assert tiny_subject.render_text("<|im_start|><|im_start|>the owl").tokens.count(1) == 1
    with pytest.raises(SubjectError, match="at least 2"):
        tiny_subject.render_text("")


# vocabulary


def test_exact_ids_are_the_tokens_that_say_only_that_word(tiny_subject: Subject) -> None:
    ids = tiny_subject.exact_ids(["owl"])
    assert {tiny_subject.tokenizer.decode([token]) for token in ids} == {"owl", " owl"}
    assert tiny_subject.exact_ids(["Yes"]) != tiny_subject.exact_ids(["yes"])
    assert tiny_subject.exact_ids(["eagles"]) == ()


def test_exact_ids_refuse_words_that_nothing_can_match(tiny_subject: Subject) -> None:
    for word in ("", " yes", "yes."):
        with pytest.raises(ValueError, match="give the bare word"):
            tiny_subject.exact_ids([word])


def test_eos_ids_join_generation_config_tokenizer_and_known_tokens(tiny_subject: Subject) -> None:
    assert tiny_subject.eos_ids == (0, 2)


# loading


def test_a_loaded_subject_is_frozen_and_in_eval_mode(tiny_subject: Subject) -> None:
    assert not tiny_subject.model.training
    assert not any(parameter.requires_grad for parameter in tiny_subject.model.parameters())
    assert (tiny_subject.n_layers, tiny_subject.d_model, tiny_subject.dtype) == (4, 32, torch.float32)
    assert len(tiny_subject.blocks) == 4
    assert tiny_subject.device.type == "cpu"


def test_dtype_is_the_one_asked_for(tiny_folder: Path) -> None:
    subject = load(spec(tiny_folder, dtype="bfloat16"))
    assert subject.dtype == torch.bfloat16
    assert subject.identity["dtype"] == "bfloat16"


def test_auto_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = SubjectSpec(model="x")
    for flags, expected in (({"avx2"}, "float32"), ({"avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16")):
        monkeypatch.setattr(identity, "_cpu_flags", lambda flags=flags: flags)
        assert resolve_dtype(auto, gpu=False) == expected
    assert resolve_dtype(SubjectSpec(model="x", dtype="float16"), gpu=False) == "float16"


def test_a_model_without_a_template_says_what_to_set(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base", chat_template=None)
    for act in (identify, load):
        with pytest.raises(SubjectError, match=r"chat_template: file\.jinja"):
            act(spec(folder))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}>")
    subject = load(spec(folder, chat_template=str(template)))
    assert text(subject, subject.render(ASK).tokens) == "[Which animal?]>"
    with pytest.raises(SubjectError, match=r"nowhere\.jinja' cannot be read"):
        identify(spec(folder, chat_template="nowhere.jinja"))


def test_damaged_weights_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 5, len(content) // 2):
        weights.write_bytes(content[:size])
        with pytest.raises(SubjectError, match=r"model\.safetensors is damaged"):
            load(spec(copy))


def test_a_damaged_config_is_named(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(SubjectError, match=r"config\.json is damaged"):
        load(spec(copy))


def test_missing_tensors_are_an_error_and_not_random_weights(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SubjectError, match=r"lack 1 tensors, 'model.layers.1.mlp.up_proj.weight'"):
        load(spec(copy))


def test_a_config_that_does_not_fit_the_weights_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(SubjectError, match="cannot be loaded as a causal language model"):
        load(spec(copy))
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "not_a_model"}))
    with pytest.raises(SubjectError, match="not_a_model"):
        load(spec(copy))


def test_a_folder_that_holds_no_model_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match=r"needs config\.json and \*\.safetensors"):
        load(spec(tmp_path))


def test_a_name_that_is_nowhere_says_what_was_looked_for() -> None:
    for name in ("nobody/no-such-model", "/no/such/folder", "not a name"):
        with pytest.raises(SubjectError, match=rf"subject '{name}': neither the embedded name .*HF_HUB_OFFLINE"):
            load(SubjectSpec(model=name))


# identity


def test_identity_is_the_same_wherever_the_folder_lies(tiny_folder: Path, copy: Path) -> None:
    assert identify(spec(tiny_folder)) == identify(spec(copy)) == load(spec(copy)).identity
    assert str(copy) not in json.dumps(identify(spec(copy)))


def test_identity_follows_every_file_that_matters(copy: Path) -> None:
    seen = [identify(spec(copy))]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        seen.append(identify(spec(copy)))
        (copy / name).write_bytes(content)
    seen.append(identify(spec(copy, system="Be brief.")))
    seen.append(identify(spec(copy, dtype="bfloat16")))
    assert all(a != b for index, a in enumerate(seen) for b in seen[:index])


def test_a_default_system_prompt_enters_identity(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, chat_template=CHATML_WITH_DEFAULT)
    assert "You are tiny." in identify(spec(folder))["chat_context"]
    assert "You are tiny." not in identify(spec(folder, system="x"))["chat_context"]


def test_identity_imports_neither_torch_nor_transformers(tiny_folder: Path) -> None:
    code = (
        "import sys; from experiments.subject import identify; from experiments.spec import SubjectSpec\n"
        "identify(SubjectSpec(model=sys.argv[1], dtype='auto'), gpu=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(identity.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_folder], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def hub_cache(source: Path, root: Path) -> None:
    """The layout of the hub's local cache, holding `source` as org/tiny at COMMIT."""
    repository = root / "models--org--tiny"
    shutil.copytree(source, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_hub_model_is_its_commit_and_loads_from_the_cache_offline(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(tiny_folder, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", COMMIT):
        wanted = SubjectSpec(model="org/tiny", revision=revision, dtype="float32")
        found = identify(wanted)
        assert (found["model"], found["revision"]) == ("org/tiny", COMMIT)
    assert load(wanted).n_layers == 4
    with pytest.raises(SubjectError, match=r"'org/tiny' at revision 'v2'"):
        identify(SubjectSpec(model="org/tiny", revision="v2"))
