"""JSON schema of a spec, so that an editor completes methods, recipes and their settings."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from experiments import dataset, intervention, plugin
from experiments.settings import METHODS, RECIPES
from experiments.spec import EMBEDDED, Experiment

GRID = "A list is a grid axis; a value that is itself a list is written [[...]]."


def schema() -> dict[str, Any]:
    """Draft 2020-12 schema of a whole spec: every method and recipe with its settings, each of which may be a list."""
    whole = TypeAdapter(Experiment).json_schema(mode="validation")
    definitions = whole.setdefault("$defs", {})
    methods = {name: intervention.method(name) for name in plugin.names(METHODS)}
    recipes = {name: dataset.recipe(name) for name in plugin.names(RECIPES)}
    for name, cls in methods.items():
        definitions[f"method {name}"] = _entry("method", name, cls, definitions)
    for name, recipe in recipes.items():
        definitions[f"recipe {name}"] = _entry("recipe", name, recipe, definitions)
    properties = whole["properties"]
    one = [_reference(f"method {name}") for name in methods]
    several = {"type": "array", "minItems": 2, "items": {"type": "object", "required": ["method"]}}
    properties["interventions"]["items"] = {"oneOf": [*one, several]}
    properties["data"] = {
        "type": "object",
        "description": properties["data"].get("description", ""),
        "additionalProperties": False,
        "properties": {role: _data(role, recipes) for role in ("pairs", "conversations", "documents", "choices")},
    }
    properties["subject"] = {
        "description": properties["subject"].get("description", ""),
        "anyOf": [{"type": "string", "examples": [EMBEDDED]}, _reference("SubjectSpec")],
    }
    definitions["EvalSpec"] = {**definitions["EvalSpec"], "additionalProperties": True}
    properties["evals"]["items"] = {"anyOf": [{"type": "string"}, _reference("EvalSpec")]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def _data(role: str, recipes: dict[str, Any]) -> dict[str, Any]:
    """One of the recipes that provide `role`, or a list of them."""
    one = {"oneOf": [_reference(f"recipe {name}") for name, cls in recipes.items() if cls.provides == role]}
    return {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}


def _entry(key: str, name: str, cls: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one method's or recipe's settings, with its name as the constant that tells it from the others."""
    own = TypeAdapter(cls).json_schema(mode="validation", ref_template="#/$defs/{model}")
    definitions.update(own.pop("$defs", {}))
    fields = {field: _or_grid(inner) for field, inner in own.get("properties", {}).items()}
    if key == "recipe":
        told = "Seed of the data, whatever the trial's; left out, the trial's own."
        fields["seed"] = {"description": told, "type": "integer", "minimum": 0}
    return {
        "type": "object",
        "description": own.get("description", ""),
        "additionalProperties": False,
        "properties": {key: {"const": name}, **fields},
        "required": [key, *own.get("required", [])],
    }


def _or_grid(field: dict[str, Any]) -> dict[str, Any]:
    """A setting that may also be a list of its own type."""
    kept: dict[str, Any] = {name: field[name] for name in ("title", "default") if name in field}
    inner = {name: value for name, value in field.items() if name not in ("title", "default", "description")}
    description = " ".join([*field.get("description", "").split(), GRID])
    if _is_list(inner):
        one: list[dict[str, Any]] = [{"type": "array", "items": inner, "minItems": 1}]
        one += [branch for branch in inner.get("anyOf", []) if not _is_list(branch)]
        return {**kept, "description": description, "anyOf": one}
    return {**kept, "description": description, "anyOf": [inner, {"type": "array", "items": inner, "minItems": 1}]}


def _is_list(inner: dict[str, Any]) -> bool:
    return inner.get("type") == "array" or any(branch.get("type") == "array" for branch in inner.get("anyOf", []))
