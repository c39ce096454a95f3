"""Conversations of several recipes at chosen ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from experiments.datasets._mixed import Mixed

if TYPE_CHECKING:
    from experiments.dataset import Provides


class MixedConversations(Mixed):
    """Conversations of several recipes: misaligned here and aligned there, or a teacher's and its control's."""

    provides: ClassVar[Provides] = "conversations"
