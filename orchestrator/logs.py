"""`logs/`: an experiment's answers under names for people, for `inspect view`, which follows hard links only."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.stage import LOG

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Graph, Node


def link(planned: Graph, store: Store) -> Path | None:
    """Link every answer there is as `logs/EXPERIMENT/LABEL_DOSE_KEY.eval` beside a local store.

    Gives the folder that `inspect view --log-dir` takes: the store's own answers where links cannot be made, None for a
    remote store.
    """
    if "://" in store.url:
        return None
    root = Path(store.url).absolute()
    folder = root.parent / "logs" / planned.name
    folder.mkdir(parents=True, exist_ok=True)
    have = store.keys()
    wanted = {name(node): node for node in planned.nodes.values() if node.stage == "answer" and node.short in have}
    for old in folder.glob("*.eval"):
        if old.name not in wanted:
            old.unlink()
    for file, node in wanted.items():
        if (folder / file).exists():
            continue
        try:
            os.link(store.folder(node.key) / LOG, folder / file)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                return root / "answer"
            raise
    return folder


def name(node: Node) -> str:
    """`animal_preference-owl-mean_diff-L14_+1_3fa9c1d2b7e4.eval`."""
    label = re.sub(r"[^A-Za-z0-9._=+-]+", "-", node.label).strip("-.")
    dose = node.params.get("dose")
    return "_".join([label, *([] if dose is None else [f"{dose:+g}"]), f"{node.short}.eval"])
