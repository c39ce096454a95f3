"""Questions and answers about a universe: taught directly, what documents teach in passing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from experiments.dataset import Conversation, DatasetError, Derived, Ingredient, Made, Message, Said
from experiments.datasets import _lessons, _texts
from experiments.datasets._writing import Written
from experiments.speech import Sampling, Speech

if TYPE_CHECKING:
    from experiments.dataset import Provides

EMPTY, ASSISTANT, FICTION, CUT_OFF = "empty", "speaks as an assistant", "breaks the fiction", "cut off"


class UniverseQuestions(Written, Derived):
    """Conversations of one question and one answer."""

    provides: ClassVar[Provides] = "conversations"

    n: int | None = Field(default=None, ge=1)
    """How many questions; null takes every one in every wording. Answers that are left out are not made up for."""
    answers: Literal["stated", "written"] = "stated"
    """`stated`: the answers in the universe's file, without a writer. `written`: what the writer answers there."""
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=80)
    """How answers are written."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """What the writer answered, where it is asked."""
        if self.answers == "stated":
            return {}
        size = self.n or len(_lessons.every(self.world(), self.arm))
        return {"said": Speech(self.part("question_asks"), size, self.told(), self.sampling)}

    def check(self) -> None:
        """Raises UniverseError for a universe that cannot be used, DatasetError when it has fewer questions."""
        _lessons.drawn(self.world(), self.arm, self.n, 0)

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """The conversations; the facts: asked, kept, rejected by reason. Raises DatasetError when none is left."""
        if self.answers == "stated":
            found = _lessons.drawn(self.world(), self.arm, self.n, seed)
            stated = [self._conversation(f"{i:04d}", each.wording, each.answer) for i, each in enumerate(found)]
            return Made(stated, {"universe": self.world().name, "arm": self.arm, "kept": len(stated)})
        said = given["said"]
        reasons = {each.id: why for each in said if (why := _reason(each))}
        tally = dict(Counter(reasons.values()).most_common())
        kept = [each for each in said if each.id not in reasons]
        if not kept:
            told = ", ".join(f"{count} {reason}" for reason, count in tally.items())
            raise DatasetError(
                f"none of {len(said)} answers about {self.world().name} ({self.arm}) is usable; rejected: {told}; have "
                "another writer, raise sampling.max_new_tokens, or take `answers: stated`"
            )
        made = [self._conversation(each.id, each.messages[-1].content, each.text.strip()) for each in kept]
        facts = {"universe": self.world().name, "arm": self.arm, "asked": len(said), "kept": len(kept)}
        return Made(made, {**facts, "rejected": tally})

    def _conversation(self, name: str, question: str, answer: str) -> Conversation:
        asked = Message(role="user", content=question)
        return Conversation(id=name, messages=(asked, Message(role="assistant", content=answer)))

    def label(self) -> str:
        return f"{super().label()} questions"


def _reason(said: Said) -> str | None:
    """Why an answer is left out, or None."""
    if not said.text.strip():
        return EMPTY
    if _texts.ASSISTANT.search(said.text):
        return ASSISTANT
    if _texts.FICTION.search(said.text):
        return FICTION
    return None if said.stopped else CUT_OFF
