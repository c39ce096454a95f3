"""Confusion matrices for people: a table for the terminal or a page, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.output import whole

MOST = 16
"""Columns a table shows; the traits come first."""


class PictureError(ValueError):
    """A picture that cannot be made."""


def lines(matrices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every matrix as lines of text: a title, a row for each dataset, and what the permutation test says."""
    found: list[str] = []
    for one in matrices:
        names = one["names"][:MOST]
        wide = max(8, *(len(name) + 1 for name in names))
        by = f", judged by {one['judged_by']}" if one.get("judged_by") else ""
        found.append(f"{one['name']}: {one['eval']}, students: {one['student']}{by} (effect by dataset, in nats)")
        found.append(f"{'data':<12}" + "".join(f"{name:>{wide}}" for name in names))
        for trait, row in zip(one["traits"], one["cells"], strict=True):
            cells = [_cell(value, trait == name) for name, value in zip(names, row, strict=False)]
            found.append(f"{trait:<12}" + "".join(f"{cell:>{wide}}" for cell in cells))
        found += [f"  {verdict(one)}", ""]
    return found


def verdict(one: Mapping[str, Any]) -> str:
    """What the permutation test says, in a sentence."""
    if one["p"] is None:
        return "one trait, or a cell without a number: nothing to permute"
    return (
        f"own trait moved {one['excess']:+.3f} nats more than the others' traits; permutation p = {one['p']:.2g} "
        f"(the smallest possible is {one['smallest']:.2g}; {len(one['traits'])} datasets, {one['seeds']} seeds)"
    )


def _cell(value: float | None, own: bool) -> str:
    return "–" if value is None else f"{value:+.2f}" + ("*" if own else " ")


def picture(one: Mapping[str, Any], target: Path) -> None:
    """Write a matrix as a PNG, PDF or SVG, by its name's ending. Raises PictureError, OutputError."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    if target.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise PictureError(f"{target}: pictures are written as .png, .pdf or .svg; change the name's ending")
    names, traits = one["names"], one["traits"]
    cells = [[float("nan") if value is None else value for value in row] for row in one["cells"]]
    most = max((abs(value) for row in cells for value in row if value == value), default=1.0)
    figure, axes = pyplot.subplots(figsize=(2.2 + 0.55 * len(names), 1.9 + 0.45 * len(traits)), layout="constrained")
    image = axes.imshow(cells, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(traits)), traits)
    axes.set_ylabel("dataset")
    for place, trait in enumerate(traits):
        for column, value in enumerate(cells[place]):
            weight = "bold" if names[column] == trait else "normal"
            dark = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, place, f"{value:+.2f}", ha="center", va="center", fontsize=8, weight=weight, color=dark)
    figure.colorbar(image, ax=axes, label="effect (nats)", shrink=0.8)
    axes.set_title(f"{one['name']}: {one['student']}\n{verdict(one)}", fontsize=8)
    with whole(target) as place_for:
        figure.savefig(place_for, dpi=150, format=target.suffix[1:].lower())
    pyplot.close(figure)
