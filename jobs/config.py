"""From a preset, a YAML file and `key=value` overrides to one validated configuration.

Later layers win: the preset that ships with the package, then the user's file, then the
overrides of the command line. Whatever is wrong is one line that names the key, its value, where
the value came from, the reason and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from jobs.schema_keys import dotted_keys, keys_at
from streamdit.errors import UserError

T = TypeVar("T", bound=BaseModel)

SIMILARITY = 0.75
"""How alike two keys are, by difflib's ratio, for one to be offered for the other."""


@dataclass(frozen=True)
class Layer:
    """One source of values, and what to call it in a message.

    Its values are merged into those before it, or, if it is `whole`, its top-level keys take the
    place of theirs.
    """

    name: str
    values: DictConfig
    whole: bool = False


def preset_folder(stage: str) -> Traversable:
    """Where the presets of `stage` lie in the installed package."""
    return resources.files("configs") / stage


def available_presets(stage: str) -> list[str]:
    """Names of the presets that ship for `stage` (ingest, autoencoder, train, distill)."""
    folder = preset_folder(stage)
    if not folder.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(
    schema: type[T],
    *,
    stage: str,
    preset: str | None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] = (),
    more: Sequence[Layer] = (),
) -> T:
    """Merge preset, file and overrides, and validate the result.

    Args:
        schema: pydantic model of the stage's configuration.
        stage: folder of presets: ingest, autoencoder, train, distill or demo.
        preset: name of a preset of that stage; None begins with nothing.
        file: YAML file merged over the preset; lists in it replace the preset's.
        overrides: `dotted.key=value` each, the value in YAML (`lr=1e-4`, `sizes=[1, 2]`,
            `buckets.0.frames=16`).
        sections: stages whose preset of the same name becomes the value of the key named like
            the stage, for a schema that holds several stages.
        more: further values over the preset, under the file.

    Raises:
        UserError: for anything wrong with any of them, in one line.
    """
    layers = [Layer(f"preset {preset}", read_preset(stage, preset))] if preset else []
    for section in sections:
        values = OmegaConf.create({section: read_preset(section, preset)})
        layers.append(Layer(f"preset {preset} of {section}", values))
    layers += more
    if file is not None:
        layers.append(Layer(str(file), read_yaml(file)))
    merged = OmegaConf.create()
    for layer in layers:
        for key in layer.values if layer.whole else ():
            merged.pop(key, None)
        merged.merge_with(layer.values)
    for override in overrides:
        layers.append(Layer("the command line", _apply_override(merged, override)))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key}: {_first_line(error)}; write a plain value, or quote a literal $"
        ) from None
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, schema, layers)) from None


def read_preset(stage: str, preset: str) -> DictConfig:
    """The preset's values, over those of the preset that its key `base` names, if it has one.

    Raises:
        UserError: if there is no such preset, with the list of those that exist.
    """
    presets = available_presets(stage)
    if preset not in presets:
        raise UserError(
            f"preset {preset!r} does not exist for {stage}: choose one of "
            f"{', '.join(presets) or '(none is installed)'}, or pass your own with --config FILE"
        )
    with resources.as_file(preset_folder(stage) / f"{preset}.yaml") as path:
        values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    assert base != preset, f"preset {stage}/{preset} names itself as its base"
    merged = read_preset(stage, base)
    merged.merge_with(values)
    return merged


def read_yaml(path: Path) -> DictConfig:
    """Values of one YAML file, which must be a mapping."""
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError:
        siblings = sorted(sibling.name for sibling in path.parent.glob("*.y*ml"))
        there = f"{path.parent}/ has {', '.join(siblings)}" if siblings else "check the path"
        raise UserError(f"config file {path} does not exist: {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config file {path} cannot be read ({_first_line(error)}): give a YAML text file"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}{_yaml_problem(error)}") from None
    if not isinstance(values, DictConfig):
        raise UserError(f"config file {path} is a list: write `key: value` pairs at the top level")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    """`, line n: reason; remedy` of a syntax error."""
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or _first_line(error)
    return f"{line}: not valid YAML ({problem}); mend the syntax there or just above"


def _apply_override(merged: DictConfig, override: str) -> DictConfig:
    """Apply one `dotted.key=value` in place; returns it as a layer of its own."""
    key, separator, text = override.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise UserError(
            f"override {override!r} is not of the form dotted.key=value: "
            "write for example steps=100 or optimizer.learning_rate=1e-4"
        )
    try:
        merged.merge_with_dotlist([override])
        return OmegaConf.from_dotlist([override])
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(
            f"override {override!r}: {text!r} is not a valid YAML value ({problem}); "
            "quote it for the shell, for example 'sizes=[1, 2]'"
        ) from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(
            f"override {override!r} does not fit ({_first_line(error)}): lists take an index that "
            "exists, as in buckets.0.frames=16, or a whole new list in [..]"
        ) from None


def _describe(error: ValidationError, schema: type[BaseModel], layers: Sequence[Layer]) -> str:
    """The first problem in one line, and how many more there are."""
    # An unknown key first: a misspelt key also shows up as a missing one.
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    line = _describe_problem(problems[0], schema, layers)
    if len(problems) > 1:
        more = len(problems) - 1
        line += f" (and {more} more problem{'s' if more > 1 else ''})"
    return " ".join(line.split())


def _describe_problem(
    problem: Mapping[str, Any], schema: type[BaseModel], layers: Sequence[Layer]
) -> str:
    path = tuple(str(part) for part in problem["loc"])
    key = ".".join(path)
    if problem["type"] == "missing":
        return f"{key} is missing: pass {key}=VALUE, or set it in a file given with --config"
    shown = f"{key}={_show(problem['input'])}" if _is_short(problem["input"]) else key
    origin = f" (from {_origin(path, layers)})"
    if problem["type"] == "extra_forbidden":
        return f"{shown}{origin} is not a known key: {_suggest(path, schema)}"
    if problem["type"] in ("value_error", "assertion_error"):
        reason = str(problem["ctx"]["error"])
        return f"{shown}{origin}: {reason}" if key else reason
    reason = problem["msg"].replace("Input should be", "it should be")
    return f"{shown}{origin} does not fit: {reason}; set {key}=VALUE accordingly"


def _suggest(path: Sequence[str], schema: type[BaseModel]) -> str:
    """What may have been meant by an unknown key."""
    *parent, name = path
    prefix = "".join(f"{part}." for part in parent)
    siblings = keys_at(schema, parent)
    keys = dotted_keys(schema)
    close = [prefix + near for near in _near(name, siblings)]
    close = close or [key for key in keys if key.split(".")[-1] == name]
    close = close or _near(".".join(path), keys)
    if close:
        return f"did you mean {' or '.join(close[:2])}?"
    if siblings:
        return f"known {f'keys of {prefix[:-1]}' if prefix else 'keys'} are {', '.join(siblings)}"
    return "remove it"


def _near(word: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `word` may be a slip of."""
    return difflib.get_close_matches(word, known, n=2, cutoff=SIMILARITY)


def _origin(path: Sequence[str], layers: Sequence[Layer]) -> str:
    """Name of the last layer that speaks about `path`, or about the nearest thing that holds it."""
    depth, name = 0, layers[0].name
    for layer in layers:
        found = _depth(OmegaConf.to_container(layer.values), path)
        if found >= depth:
            depth, name = found, layer.name
    return name


def _depth(values: Any, path: Sequence[str]) -> int:
    """How many leading parts of `path` exist in nested `values`."""
    for depth, part in enumerate(path):
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, Mapping) and part in values:
            values = values[part]
        else:
            return depth
    return len(path)


def _is_short(value: Any) -> bool:
    """Whether a value helps in a one-line message."""
    return not isinstance(value, Mapping) and len(_show(value)) <= 60


def _show(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) and value else repr(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
