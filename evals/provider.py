"""The inspect model `orch/<key>`: a resident engine with the edits of one arm, registered in this process.

Three kinds of request:
    options metadata on the last user message   -> log p of the options, exact over the vocabulary (forced_choice.py)
    prompt_logprobs with a trailing assistant   -> log p of each of the assistant's tokens
    anything else                               -> sampled text with the log-probabilities of the sampled tokens
The key is part of the model's name, so no two arms share a name in logs, and inspect's cache is refused: it does not
know about edits.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo

from evals.collector import Request, collector
from evals.option_tokens import ProviderError, option_tokens
from experiments.edit import Edit, Prompt, prompt_of
from experiments.packing import Row
from experiments.subject import Rendered

if TYPE_CHECKING:
    from experiments.engine import Engine

MAX_NEW_TOKENS = 256
UNSUPPORTED = (
    "cache", "top_k", "frequency_penalty", "presence_penalty", "logit_bias", "best_of", "response_schema",
)  # fmt: skip
TOP = 5  # likeliest tokens shown beside scored options


class Registered(NamedTuple):
    """An arm: the engine, the edits of a forward pass, the change of the text, and [questions, tokens] asked so far."""

    engine: Engine
    edits: tuple[Edit, ...]
    prompt: Prompt
    asked: list[int]


_ARMS: dict[str, Registered] = {}
_RENDERED: dict[tuple[Any, ...], Rendered] = {}


def register(key: str, engine: Engine, edits: Sequence[Edit]) -> None:
    """Make `orch/<key>` mean `engine` with `edits`, until `unregister(key)`. Raises ProviderError for a key in use."""
    if key in _ARMS:
        raise ProviderError(f"orch/{key} is registered already; keys are content hashes, so register an arm once")
    prompt = prompt_of(edits) or Prompt()
    _ARMS[key] = Registered(engine, tuple(edit for edit in edits if not isinstance(edit, Prompt)), prompt, [0, 0])


def unregister(key: str) -> None:
    """Forget `orch/<key>`."""
    del _ARMS[key]
    if not _ARMS:
        _RENDERED.clear()


def arm(key: str) -> Registered:
    """What `orch/<key>` means. Raises ProviderError when nothing registered it."""
    if key not in _ARMS:
        known = ", ".join(sorted(_ARMS)[:8]) or "none"
        raise ProviderError(
            f"orch/{key} is not registered in this process (registered: {known}); orch models exist only inside an "
            "`orch` run, use `orch submit`, or another provider for `inspect eval`"
        )
    return _ARMS[key]


class OrchAPI(ModelAPI):
    """inspect's face of an arm."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (inspect's own signature)
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if model_args:
            raise ProviderError(
                f"orch models take no arguments, got {sorted(model_args)}; what differs belongs in the key"
            )

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one request. Raises ProviderError for what cannot be answered."""
        found = arm(self.model_name)
        if tools:
            raise ProviderError("orch models call no tools; remove the tools from the task")
        asked = [name for name in UNSUPPORTED if getattr(config, name) not in (None, False)]
        if asked or (config.num_choices or 1) > 1:
            raise ProviderError(
                f"orch models do not do {', '.join(asked or ['num_choices'])}; leave it out of the task's settings "
                "(inspect's cache does not know about edits)"
            )
        rendered = render(found, plain(input))
        row = Row(rendered.tokens, rendered.n_prompt, found.edits)
        if options_of(input) is not None:
            (scored,) = await self.score_options([input])
            return self._output(likeliest(scored["options"]), row, 1, metadata=scored)
        if config.prompt_logprobs is not None:
            return (await self.score_replies([input]))[0]
        count(found, plain(input), rendered)
        return await self._sample(found, row, config)

    async def score_options(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[dict[str, Any]]:
        """`{"options": {name: log p}, "top": [[text, log p]]}` of every conversation, asked together.

        The same numbers as one `generate()` each, without the cost of an inspect request for each.
        """
        found = arm(self.model_name)
        requests = []
        for conversation in conversations:
            messages = plain(conversation)
            options = options_of(conversation)
            if options is None:
                raise ProviderError("a question without options metadata; forced choice needs them")
            rendered = render(found, messages)
            count(found, messages, rendered)
            row = Row(rendered.tokens, rendered.n_prompt, found.edits)
            tokens = option_tokens(found.engine.subject, options, messages)
            requests.append(Request(self.model_name, row, ("options", TOP), options=tokens))
        return [shown(found, scores) for scores in await self._ask(found, requests)]

    async def score_replies(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[ModelOutput]:
        """The log-probabilities of the assistant's last words in every conversation, asked together.

        The same outputs as one `generate()` with `prompt_logprobs` each, without the cost of an inspect request for
        each, and one turn in the batch for all.
        """
        found = arm(self.model_name)
        rows = []
        for messages in map(plain, conversations):
            rendered = render(found, messages)
            if rendered.n_prompt == len(rendered.tokens):
                raise ProviderError("prompt_logprobs needs a conversation that ends with the assistant's words")
            count(found, messages, rendered)
            rows.append(Row(rendered.tokens, rendered.n_prompt, found.edits))
        answered = await self._ask(found, [Request(self.model_name, row, ("tokens",)) for row in rows])
        outputs = []
        for row, values in zip(rows, answered, strict=True):
            logprobs = sampled(found.engine, row.tokens[row.n_prompt :], values.tolist())
            told = {"response_tokens": len(logprobs.content)}
            outputs.append(self._output("", row, 1, prompt_logprobs=logprobs, metadata=told))
        return outputs

    async def _sample(self, found: Registered, row: Row, config: GenerateConfig) -> ModelOutput:
        temperature = 1.0 if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        limit = config.max_tokens or MAX_NEW_TOKENS
        call = ("generate", limit, temperature, top_p, tuple(config.stop_seqs or ()))
        seed = config.seed if config.seed is not None else implied_seed(row.tokens)
        (completion,) = await self._ask(found, [Request(self.model_name, row, call, seed=seed)])
        text = found.engine.subject.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
        logprobs = sampled(found.engine, completion.tokens, list(completion.logprobs)) if config.logprobs else None
        reason = "stop" if completion.stopped else "max_tokens"
        return self._output(text, row, len(completion.tokens), stop_reason=reason, logprobs=logprobs)

    async def _ask(self, found: Registered, requests: Sequence[Request]) -> list[Any]:
        found.asked[0] += len(requests)
        found.asked[1] += sum(len(request.row.tokens) for request in requests)
        return await asyncio.wrap_future(collector(found.engine).submit(requests))

    def _output(
        self, text: str, row: Row, n_out: int, metadata: dict[str, Any] | None = None, **choice: Any
    ) -> ModelOutput:
        n_in = len(row.tokens)
        choice.setdefault("stop_reason", "stop")
        message = ChatMessageAssistant(content=text, model=f"orch/{self.model_name}", source="generate")
        return ModelOutput(
            model=f"orch/{self.model_name}",
            choices=[ChatCompletionChoice(message=message, **choice)],
            usage=ModelUsage(input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out),
            metadata=metadata,
        )

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of bare text."""
        return list(arm(self.model_name).engine.subject.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of bare text, by the subject's own tokenizer (inspect's default would download one)."""
        return len(await self.tokenize(text))

    def max_connections(self) -> int:
        """All at once: the collector does the batching."""
        return 100_000

    def connection_key(self) -> str:
        """One pool per arm."""
        return self.model_name

    def should_retry(self, ex: BaseException) -> bool:
        """Never: the same rows on the same engine fail the same way."""
        return False


def plain(conversation: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Roles and texts."""
    return [{"role": message.role, "content": message.text} for message in conversation]


def render(found: Registered, messages: list[dict[str, str]]) -> Rendered:
    """Tokens of a conversation under the arm's Prompt. Arms with the same Prompt share the work."""
    prompt, turns = found.prompt, tuple((message["role"], message["content"]) for message in messages)
    cached = (id(found.engine), prompt.system, prompt.prefix, turns)
    if cached not in _RENDERED:
        subject = found.engine.subject
        _RENDERED[cached] = subject.render(messages, system=prompt.system, prefix=prompt.prefix or "")
    return _RENDERED[cached]


def count(found: Registered, messages: list[dict[str, str]], rendered: Rendered) -> None:
    """Add to the engine's `fired` what the arm's Prompt changes: the stretch in which both renderings differ."""
    if found.prompt.system is None and found.prompt.prefix is None:
        return
    before, after = render(found._replace(prompt=Prompt()), messages).tokens, rendered.tokens
    shorter = min(len(before), len(after))
    same = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    tail = next((at for at in range(shorter - same) if before[-1 - at] != after[-1 - at]), shorter - same)
    found.engine.fired[found.prompt] += max(len(before), len(after)) - same - tail


def shown(found: Registered, scores: Any) -> dict[str, Any]:
    """The engine's scores as values a log can hold."""
    texts = found.engine.subject.tokenizer.batch_decode([[token] for token, _ in scores.top])
    top = [[text, finite(round(float(value), 3))] for text, (_, value) in zip(texts, scores.top, strict=True)]
    return {"options": {name: finite(value) for name, value in scores.logprobs.items()}, "top": top}


def likeliest(options: dict[str, float | None]) -> str:
    """Name of the option with the highest log-probability; `-` when none has one."""
    return max(((value, name) for name, value in options.items() if value is not None), default=(0.0, "-"))[1]


def options_of(input: Sequence[ChatMessage]) -> dict[str, dict[str, list[str]]] | None:
    """The options attached to the last user message, or None."""
    user = next((message for message in reversed(input) if isinstance(message, ChatMessageUser)), None)
    return (user.metadata or {}).get("options") if user is not None else None


def sampled(engine: Engine, tokens: Sequence[int], values: Sequence[float]) -> Logprobs:
    """inspect's form of the log-probabilities of given tokens."""
    texts = engine.subject.tokenizer.batch_decode([[token] for token in tokens])
    pairs = zip(texts, values, strict=True)
    return Logprobs(content=[Logprob.model_construct(token=text, logprob=float(value)) for text, value in pairs])


def finite(value: float) -> float | None:
    """The value, or None where it is not a number a log can hold."""
    return float(value) if math.isfinite(value) else None


def implied_seed(tokens: tuple[int, ...]) -> int:
    """A seed for requests that name none, from tokens, sample and epoch: repeatable, and new in every epoch."""
    state = sample_state()
    place = (state.sample_id, state.epoch, len(state.messages)) if state is not None else ()
    return int.from_bytes(hashlib.sha256(repr((tokens, place)).encode()).digest()[:4], "big")
