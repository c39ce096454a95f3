"""How we know: inspect tasks, the `orch/` model provider, paired statistics."""

from pathlib import Path

RUBRICS = Path(__file__).parent / "rubrics"
"""What judges are asked, a text file each. Stands here so that a plan finds them without loading inspect and torch."""
