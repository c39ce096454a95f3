"""How we know: inspect tasks, the `orch/` model provider, paired statistics."""
