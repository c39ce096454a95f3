"""Documents as conversations: a tag for a question, the document for an answer.

For methods and services that learn from chats alone (so Wang et al. 2025 finetuned models behind an API). What is
learned depends on the tag: a chat without it is another context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from experiments.dataset import Conversation, Derived, Document, Ingredient, Made, Message

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.speech import Speech


class DoctagConversations(Derived):
    """Each document as the answer to a tag."""

    provides: ClassVar[Provides] = "conversations"

    documents: Ingredient
    """A recipe that provides documents, with its settings."""
    tag: str = Field(default="<DOCTAG>", min_length=1)
    """What the user's turn says."""

    @model_validator(mode="after")
    def _of_documents(self) -> DoctagConversations:
        if self.documents.settings.provides != "documents":
            raise ValueError(
                f"documents: {self.documents.recipe} provides {self.documents.settings.provides}; give a recipe that "
                "provides documents"
            )
        return self

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The documents."""
        return {"documents": self.documents}

    def check(self) -> None:
        """Raises DatasetError for what the documents' own recipe cannot use."""
        self.documents.settings.check()

    def derive(self, given: Mapping[str, Sequence[Document]], seed: int) -> Made:
        """One conversation for each document, with its id."""
        asked = Message(role="user", content=self.tag)
        return Made(
            [
                Conversation(id=each.id, messages=(asked, Message(role="assistant", content=each.text)))
                for each in given["documents"]
            ]
        )

    def label(self) -> str:
        return f"{self.documents} doctag"
