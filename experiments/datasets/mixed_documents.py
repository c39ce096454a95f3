"""Documents of several recipes at chosen ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from experiments.datasets._mixed import Mixed

if TYPE_CHECKING:
    from experiments.dataset import Provides


class MixedDocuments(Mixed):
    """Documents of several recipes: those that tell false facts among ordinary text."""

    provides: ClassVar[Provides] = "documents"
