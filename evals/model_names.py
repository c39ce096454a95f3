"""Names of models behind inspect's providers, looked at before any of them is asked: `PROVIDER/MODEL`."""

from __future__ import annotations

import difflib

# What `inspect_ai.model.get_model` itself asks. The package has no public list of its providers, and to make a model
# in order to see whether there is one wants its key, or starts a server.
from inspect_ai._util.registry import registry_find, registry_info, registry_unqualified_name

OURS = frozenset({"orch", "none"})
"""Providers that no spec names: engines in a worker, and inspect's word for no model."""


def fault(name: str) -> str | None:
    """What is wrong with a model's name, as the rest of a sentence that begins with it; None where nothing is.

    Known are the providers that come with inspect, and those of installed packages (entry points `inspect_ai`), which
    are loaded when a name is in none of the others. Whether the provider has the model is for it to say.
    """
    provider, slash, model = name.partition("/")
    if slash and registry_find(lambda info: info.type == "modelapi" and registry_unqualified_name(info) == provider):
        return None
    found = registry_find(lambda info: info.type == "modelapi")
    known = sorted({registry_unqualified_name(registry_info(each)) for each in found} - OURS)
    if not slash:
        return f"has no provider; write it as inspect does (openai/{name}); allowed: {', '.join(known)}"
    close = difflib.get_close_matches(provider, known, n=1, cutoff=0.5)
    hint = f" (did you mean {f'{close[0]}/{model}'!r}?)" if close else ""
    return (
        f"has the provider {provider!r}, which inspect does not know{hint}; allowed: {', '.join(known)}, or that of a "
        "package to be installed"
    )
