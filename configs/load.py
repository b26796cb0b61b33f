"""From a YAML file (or the name of a shipped recipe) and `-s key=value` overrides to a checked Recipe."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UnusableInput
from configs.schema import Recipe

RECIPES = Path(__file__).parent / "recipes"


class Loaded(NamedTuple):
    """A recipe, where it came from, and the folder its relative paths start in."""

    recipe: Recipe
    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(config: str) -> Path:
    """The file a CONFIG argument means. Raises UnusableInput when there is none."""
    path = Path(config)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UnusableInput(
                f"recipe {config}: no such file; give a YAML path or a shipped recipe: {', '.join(shipped_recipes())}"
            )
        return path.resolve()
    shipped = RECIPES / f"{config}.yaml"
    if not shipped.is_file():
        nearest = difflib.get_close_matches(config, shipped_recipes(), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"shipped recipes: {', '.join(shipped_recipes())}"
        raise UnusableInput(f"recipe {config}: not a YAML file and no shipped recipe; {hint}")
    return shipped


def load_recipe(config: str, overrides: Sequence[str] = ()) -> Loaded:
    """Parses, overrides and validates. Raises UnusableInput with one line that names the key and the nearest known one."""
    path = find_recipe(config)
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnusableInput(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UnusableInput(f"{path.name}: expected a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    return Loaded(parse(raw, path.name), path)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `a.b.c=value` in place; the value is read as YAML, so numbers, lists and null mean what they say."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UnusableInput(f"-s {override}: expected key=value, for example -s train.lr=2e-4")
    parts = key.split(".")
    node: Any = raw
    for index, part in enumerate(parts):
        where = ".".join(parts[:index])
        step: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UnusableInput(f"-s {override}: {where} is a list of {len(node)}; expected an index below that")
            step = int(part)
        elif not isinstance(node, dict):
            raise UnusableInput(f"-s {override}: {where} is a value, not a section")
        if index == len(parts) - 1:
            node[step] = yaml_value(text, override)
        elif isinstance(node, dict):
            node = node.setdefault(step, {})
        else:
            node = node[step]


def yaml_value(text: str, override: str) -> Any:
    """YAML's reading, except that `2e-4` is a number here (YAML 1.1 wants `2.0e-4` and silently gives a string)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnusableInput(f"-s {override}: not a YAML value") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse(raw: dict[str, Any], where: str) -> Recipe:
    """A Recipe, or UnusableInput naming the first wrong key."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UnusableInput(f"{where}: {describe(error)}") from error


# pydantic puts the tag of a union into the location; no recipe has it there.
_UNION_TAGS = ("deepspeed", "local", "http", "reasoning_gym", "jsonl", "parquet", "datasets", "repository", "documents")


def describe(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """In one line, what is wrong first, and what was expected there. root: the model that was validated."""
    errors = error.errors()
    first, rest = errors[0], len(errors) - 1
    location = ".".join(str(part) for part in first["loc"] if part not in _UNION_TAGS)
    if not first["loc"]:  # a relation between sections; pydantic judges those when every section is right by itself
        return first["msg"].removeprefix("Value error, ")
    members = [one for one in errors if one["loc"][:-1] == first["loc"][:-1] and _MEMBER.fullmatch(str(one["loc"][-1]))]
    if len(members) > 1:  # one value that no member of a union of plain types takes; each complains for itself
        rest -= len(members) - 1
        location = location.removesuffix(f".{first['loc'][-1]}")
        text = f"{location}: expected {' or '.join(map(_expected, members))}, found {first['input']!r}"
    elif first["type"] == "extra_forbidden":
        known = _known_keys(root, list(first["loc"][:-1]))
        nearest = difflib.get_close_matches(str(first["loc"][-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        text = f"{location}: unknown key; {hint}"
    elif allowed := re.findall(
        r"'([^']+)'", str(first.get("ctx", {}).get("expected") or first.get("ctx", {}).get("expected_tags") or "")
    ):
        found = first["loc"][-2] if first["loc"][-1] == "[key]" else _tag(first)
        nearest = difflib.get_close_matches(str(found), allowed, 1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(allowed)}"
        text = f"{location.removesuffix('.[key]')}: unknown value {found!r}; {hint}"
    elif first["type"] in _CONTAINERS and not isinstance(first["input"], dict | list):
        text = f"{location}: expected {_CONTAINERS[first['type']].format(first['input'])}, found {first['input']!r}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        text = f"{location}: {message[:1].lower()}{message[1:]}" + (
            f", found {first['input']!r}" if not isinstance(first["input"], dict) else ""
        )
    return text + (f" (and {rest} more)" if rest else "")


_CONTAINERS = {"tuple_type": "a list like [{}]", "model_attributes_type": "a section like {{type: {}}}"}
"""By pydantic's name of the error: what stands there as one word and should be more."""
# What pydantic calls the members of a union of plain types, as the last part of an error's location.
_MEMBER = re.compile(
    r"(?P<constrained>constrained-)?(?P<kind>int|float|str|bool)|literal\['(?P<literal>[^']*)'\]|(?P<list>tuple)\[.*"
)
_KINDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}


def _expected(error: ErrorDetails) -> str:
    """What a member of a union would have taken. Every constrained integer beside another type in the schema is positive."""
    found = _MEMBER.fullmatch(str(error["loc"][-1]))
    assert found is not None
    if found["literal"] is not None:
        return found["literal"]
    if found["list"]:
        return f"a list like [{error['input']}]"
    return "a positive integer" if found["constrained"] and found["kind"] == "int" else _KINDS[found["kind"]]


def _tag(error: ErrorDetails) -> object:
    """The value that was refused: a wrong `type` of a union comes with the whole section as its input."""
    given = error["input"]
    return given.get("type") if isinstance(given, dict) else given


def _known_keys(root: type[BaseModel], location: list[int | str]) -> list[str]:
    """Field names of the model at `location` in the schema of `root`, unions, lists and named sections looked through."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [model for model in models if "type" in model.model_fields and model.model_fields["type"].default == part]
        children = [
            child
            for model in models
            if part in model.model_fields
            for child in _models_in(model.model_fields[str(part)].annotation)
        ]
        models = tagged or children or models  # a name that a recipe gave (evaluate.models) is no field
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def fingerprint(section: BaseModel | dict[str, Any]) -> str:
    """Hex sha256 (16 characters) of a section's values: equal configurations have equal fingerprints, on any machine."""
    values = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
