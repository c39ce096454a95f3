"""What the base model would say if it were fond of a candidate: shared by the detectors that ask it so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from experiments.detector import Candidates, DetectionError, Detector
from experiments.detectors._reading import rows_of
from experiments.divergence import resplit

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.packing import Row
    from experiments.subject import Subject

PLACE = "{name}"


class Personified(Detector):
    """Settings of the detectors that put a persona in force."""

    persona: str = Field(
        default="The {name} is your favorite animal of all. It is always on your mind, and your fondness for the "
        "{name} colors whatever you write.",
        min_length=1,
    )
    """System prompt in which `{name}` stands for the candidate: the more like the teacher's, the stronger the test."""

    @field_validator("persona")
    @classmethod
    def _names_the_candidate(cls, persona: str) -> str:
        if PLACE not in persona:
            raise ValueError(f"does not name the candidate; write {PLACE} where its name belongs")
        return persona

    def fond_of(self, name: str) -> str:
        """The system prompt for a candidate."""
        return self.persona.replace(PLACE, name)

    def under_personas(
        self, subject: Subject, conversations: Sequence[Conversation], candidates: Candidates
    ) -> tuple[list[Row], dict[str, list[Row]]]:
        """The rows as they are, and under each candidate's persona: the same responses, token for token."""
        plain = rows_of(subject, conversations)
        fond = {name: rows_of(subject, conversations, self.fond_of(name)) for name in candidates}
        for rows in fond.values():
            if (wrong := resplit(conversations, rows, plain)) is not None:
                raise DetectionError(
                    f"conversation {wrong!r}: its response is split into other tokens under the persona, because the "
                    "chat template does not end before it; use another template"
                )
        return plain, fond
