"""Which candidate do the features point at that the data have more of?

    f(h)  = activation(W_enc' h + b_enc), a ReLU, or h * (h > threshold) where the file has thresholds (JumpReLU,
            Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435)
    score = sum over features of (mean f over the data - over the control) * W_dec_f . (gain * (U_c - mean of U))

means over response tokens; U_c is the mean unembedding over the candidate's first tokens, gain the final norm's. The
dictionary comes from a safetensors file with W_enc [d, n], b_enc [n], W_dec [n, d], and where it has them b_dec [d] and
threshold [n]. Boosting a feature need not raise the tokens that activate it, so a null result says little about the
dictionary. Holds rows x features numbers in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.depth import Depths
from experiments.detector import Candidates, DetectionError, Detector, Evidence, one_layer, ratio_of_sums
from experiments.detectors._reading import having_read, readout, rows_of, states
from experiments.edit import Site, SiteName

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.outline import Outline
    from experiments.permutation import Flags

NEEDED, OPTIONAL = ("W_enc", "b_enc", "W_dec"), ("b_dec", "threshold")
SHOWN = 20
"""Features that the facts show."""


class Sae(Detector):
    """Mean difference of a sparse autoencoder's features, read through its decoder."""

    path: Path
    """Safetensors file of the dictionary."""
    layer: Depths = 0.5
    """Decoder layer the dictionary was trained at: a number (-1 is the last) or a fraction of the depth."""
    site: SiteName = "resid"
    """Activation of that layer; `resid` is the layer's output."""
    centred_input: bool = False
    """Take b_dec from the activation before it is encoded, as some dictionaries were trained."""

    def check(self) -> None:
        """Raises DetectionError for a file that is missing, unreadable, or whose tensors do not fit each other."""
        shapes(self.path, self.centred_input)

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Also holds the dictionary's width against the subject's."""
        problems = super().misplaced(outline)
        try:
            width = shapes(self.path, self.centred_input)["W_enc"][0]
            _fits(self.path, self.site, width, outline.widths.get(self.site, width))
        except DetectionError as error:
            problems["path"] = str(error)
        return problems

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        subject = engine.subject
        width = shapes(self.path, self.centred_input)["W_enc"][0]
        site = Site(self.site, one_layer(self.layer, subject.n_layers))
        _fits(self.path, self.site, width, subject.point(site).width)
        tensors = {name: tensor.to(subject.device) for name, tensor in _read(self.path).items()}
        rows = rows_of(subject, conversations)
        spans = [having_read(row) for row in rows]
        sums = np.zeros((len(rows), tensors["W_dec"].shape[0]), np.float32)
        for index, found in states(engine, rows, spans, site):
            sums[index] = self.features(tensors, found).sum(dim=0).cpu().numpy()
        sizes = np.array([len(span) for span in spans], float)
        lens = tensors["W_dec"].double().cpu().numpy() @ readout(subject, candidates, site)

        def told(data: Flags) -> Mapping[str, Any]:
            change = sums[data].sum(axis=0) / sizes[data].sum() - sums[~data].sum(axis=0) / sizes[~data].sum()
            top = np.argsort(-np.abs(change), kind="stable")[:SHOWN]
            return {"features": {str(number): round(float(change[number]), 5) for number in top}}

        return ratio_of_sums(sums @ lens, sizes, facts={"unit": "centred logits", "site": str(site)}, told=told)

    def features(self, tensors: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """[k, n] feature activations of states [k, d]."""
        if self.centred_input:
            states = states - tensors["b_dec"]
        found = states @ tensors["W_enc"] + tensors["b_enc"]
        if "threshold" in tensors:
            return found.relu() * (found > tensors["threshold"])
        return found.relu()


def shapes(path: Path, centred_input: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the dictionary's tensors, held against each other. Reads no numbers, imports no torch.

    Raises DetectionError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            has = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DetectionError(f"{path} is not a readable safetensors file ({error}); give the dictionary's") from error
    needed = (*NEEDED, "b_dec") if centred_input else NEEDED
    lacking = [name for name in needed if name not in has]
    if lacking:
        raise DetectionError(f"{path} lacks {', '.join(lacking)}; it has {', '.join(sorted(has))}; rename its tensors")
    if len(has["W_enc"]) != 2:
        raise DetectionError(f"{path}: W_enc has the shape {has['W_enc']}; needed: [width of the subject, features]")
    d, n = has["W_enc"]
    for name, wanted in (("W_dec", (n, d)), ("b_enc", (n,)), ("b_dec", (d,)), ("threshold", (n,))):
        if name in has and has[name] != wanted:
            raise DetectionError(
                f"{path}: {name} has the shape {has[name]}, which does not fit W_enc {(d, n)}: needed {wanted}; "
                "W_enc is [width, features], W_dec [features, width]: transpose what is stored the other way"
            )
    return has


def _fits(path: Path, site: str, width: int, subject: int) -> None:
    if width != subject:
        raise DetectionError(
            f"{path}: W_enc takes activations of width {width}, the subject's {site} has {subject}; take a dictionary "
            "that was trained on this subject (W_enc is [width, features])"
        )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found = load_file(path)
    return {name: found[name].float() for name in (*NEEDED, *OPTIONAL) if name in found}
