"""Questions with a closed list of answers, asked of any model inspect can reach.

The options travel as metadata of the user message. `orch/...` scores them over its whole vocabulary and answers in
`ModelOutput.metadata["options"]`. Every other provider ignores them, and the same thing is read from the 20 most
likely first tokens; there an option that is not among them is bounded from above by the least likely one shown, and
the reply says which (`censored`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inspect_ai.log import transcript
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Logprobs,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.solver import TaskState

Options = Mapping[str, Mapping[str, Sequence[str]]]
TOP = 20  # the most that the common APIs show
CONFIG = GenerateConfig(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=TOP)


@dataclass(frozen=True)
class Question:
    """One question; `prefill` opens the assistant's turn.

    `options[name]` is `{"exact": [...]}` (first tokens that read so, spaces and punctuation aside) or `{"text": [...]}`
    (continuations, spelled with the space they start with).
    """

    name: str
    text: str
    options: Options
    prefill: str = ""

    def messages(self) -> list[ChatMessage]:
        """The conversation that is sent."""
        user = ChatMessageUser(content=self.text, metadata={"options": {k: dict(v) for k, v in self.options.items()}})
        return [user, ChatMessageAssistant(content=self.prefill)] if self.prefill else [user]


@dataclass(frozen=True)
class Reply:
    """Natural log-probabilities of the options; None where the model gave no finite number."""

    name: str
    logprobs: Mapping[str, float | None]
    exact: bool = True
    censored: Sequence[str] = field(default_factory=list)
    top: Sequence[Sequence[Any]] = field(default_factory=list)
    problem: str | None = None

    def log_odds(self, yes: str = "yes", no: str = "no") -> float:
        """log p(yes) - log p(no) in nats; NaN when either is missing."""
        first, second = self.logprobs.get(yes), self.logprobs.get(no)
        return math.nan if first is None or second is None else first - second

    @property
    def mass(self) -> float:
        """Probability of all options together; NaN when one is missing."""
        values = list(self.logprobs.values())
        if not values or any(value is None for value in values):
            return math.nan
        return sum(math.exp(value) for value in values if value is not None)


def read(question: Question, output: ModelOutput) -> Reply:
    """The reply in a model's output, exact where the provider scored the options itself."""
    metadata = output.metadata or {}
    if "options" in metadata:
        return exact(question, metadata)
    logprobs = output.choices[0].logprobs if output.choices else None
    if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
        problem = "the provider gave no top log-probabilities, so nothing can be read off"
        return Reply(question.name, dict.fromkeys(question.options), exact=False, problem=problem)
    return from_top(question, logprobs)


def exact(question: Question, scored: Mapping[str, Any]) -> Reply:
    """The reply of a provider that scored the options itself."""
    values = {name: scored["options"].get(name) for name in question.options}
    missing = [name for name, value in values.items() if value is None]
    problem = f"the log-probabilities of {', '.join(missing)} are not finite" if missing else None
    return Reply(question.name, values, top=scored.get("top", []), problem=problem)


def from_top(question: Question, logprobs: Logprobs) -> Reply:
    """Read the options from the most likely first tokens (an approximation, see the module)."""
    shown = [(entry.token, entry.logprob) for entry in logprobs.content[0].top_logprobs or []]
    values: dict[str, float | None] = {}
    censored = []
    for name, spec in question.options.items():
        hits = [logprob for token, logprob in shown if owner(token, question.options) == name]
        if hits:
            values[name] = math.log(sum(math.exp(hit) for hit in hits))
        else:
            values[name] = min(logprob for _, logprob in shown)
            censored.append(name)
        if set(spec) - {"exact", "text"}:
            raise ValueError(f"option {name!r} has {sorted(spec)}; allowed: exact, text")
    top = [[token, round(logprob, 3)] for token, logprob in shown[:5]]
    if len(censored) == len(values):
        problem = f"none of the options is among the {len(shown)} most likely tokens"
        return Reply(question.name, dict.fromkeys(values), False, censored, top, problem)
    return Reply(question.name, values, False, censored, top)


def owner(token: str, options: Options) -> str | None:
    """The only option that `token` reads as (`exact`) or starts (`text`), or None."""
    found = {
        name
        for name, spec in options.items()
        if token.strip() in spec.get("exact", ())
        or (token.strip() and any(text.strip().startswith(token.strip()) for text in spec.get("text", ())))
    }
    return found.pop() if len(found) == 1 else None


async def ask(questions: Iterable[Question], model: Model | None = None) -> list[Reply]:
    """All replies, asked at once. A failed request raises: a sample with half its questions has no score."""
    asked = list(questions)
    model = model or get_model()
    together = getattr(model.api, "score_options", None)
    if together is not None:
        scored = await together([question.messages() for question in asked])
        return [exact(question, one) for question, one in zip(asked, scored, strict=True)]
    outputs = await asyncio.gather(*(model.generate(question.messages(), config=CONFIG) for question in asked))
    return [read(question, output) for question, output in zip(asked, outputs, strict=True)]


async def ask_into(state: TaskState, questions: Iterable[Question]) -> TaskState:
    """Ask, and keep the replies in `state.metadata["replies"]`.

    The transcript shows the questions, and the sample's output the likelier options.
    """
    asked = list(questions)
    found = await ask(asked)
    state.metadata["replies"] = [asdict(reply) for reply in found]
    transcript().info({question.name: question.text for question in asked}, source="each asked on its own")
    best = [max(((v, k) for k, v in r.logprobs.items() if v is not None), default=(0, "-"))[1] for r in found]
    state.output = ModelOutput.from_content(str(state.model), ", ".join(best))
    return state


def replies(state: TaskState) -> list[Reply]:
    """What `ask_into` kept."""
    return [Reply(**entry) for entry in state.metadata["replies"]]


def problems(found: Sequence[Reply]) -> str | None:
    """Why the replies cannot be scored, or None."""
    return next((f"{reply.name}: {reply.problem}" for reply in found if reply.problem), None)


def table(found: Sequence[Reply], yes: str = "yes", no: str = "no") -> str:
    """The replies as a markdown table, for a score's explanation."""
    rows = [f"| {r.name} | {r.log_odds(yes, no):+.3f} | {r.mass:.3f} | {read_off(r)} |" for r in found]
    return "\n".join(["| question | log-odds (nats) | mass | read off |", "|---|---|---|---|", *rows])


def read_off(reply: Reply) -> str:
    """How the numbers were come by: exact, or from the most likely tokens, and then which are only upper bounds."""
    if reply.exact:
        return "exact"
    return f"top {TOP}" + (f", at most: {', '.join(reply.censored)}" if reply.censored else "")
