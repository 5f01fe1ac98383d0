"""Pages made from the code: every command with its options, every setting with its meaning."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from jobs.cli import COMMANDS, build_command
from jobs.config import available_presets

CONFIGURATIONS = {
    "ingest": ("pipeline.config", "IngestConfig"),
    "autoencoder": ("training.autoencoder_config", "AutoencoderTrainConfig"),
    "train": ("training.config", "TrainConfig"),
    "distill": ("distillation.config", "DistillConfig"),
}
"""Stage → module and class of its settings."""


def settings_page() -> str:
    """Tables of all dotted keys, a section per stage."""
    parts = [
        "# Settings",
        "Each stage starts from a preset; `--config FILE.yaml` goes over it, and `key=value` on "
        "the command line over both. The keys of each stage, with their defaults and meaning:",
    ]
    for stage, (module, name) in CONFIGURATIONS.items():
        schema = getattr(importlib.import_module(module), name)
        presets = ", ".join(f"`{preset}`" for preset in available_presets(stage))
        parts += [f"## {stage}", f"`{module}.{name}`; presets: {presets}."]
        parts.append(_table(_rows(schema, "")))
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command: what it does, its arguments and options."""
    parts = ["# Commands", "`streamdit COMMAND --help` says the same in the terminal."]
    for name, entry in COMMANDS.items():
        command = build_command(importlib.import_module(entry.module).command, name)
        parts += [f"## streamdit {name}", *_command(command)]
        for sub, inner in getattr(command, "commands", {}).items():
            parts += [f"### streamdit {name} {sub}", *_command(inner)]
    return "\n\n".join(parts) + "\n"


def _command(command: Any) -> Iterator[str]:
    yield inspect.cleandoc(command.help or "")
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "version"):
            continue
        label = " ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        if not parameter.opts[0].startswith("-"):
            label = f"`{parameter.metavar or parameter.name.upper()}`"
        elif parameter.metavar:
            label += f" `{parameter.metavar}`"
        rows.append((_escaped(label), _escaped(parameter.help or ""), _default(parameter.default)))
    if rows:
        yield _markdown_table(("argument or option", "meaning", "default"), rows)


def _default(value: Any) -> str:
    if value is None or value is False or callable(value) or "Sentinel" in type(value).__name__:
        return ""
    return f"`{value}`"


class Row(typing.NamedTuple):
    """One setting."""

    key: str
    kind: str
    default: str
    meaning: str


def _rows(schema: type[BaseModel], prefix: str) -> Iterator[Row]:
    """The keys of a settings class and of the classes below it."""
    meanings = field_docstrings(schema)
    for name, field in schema.model_fields.items():
        inner = _model_in(field.annotation)
        listed = inner is not None and _is_many(field.annotation)
        kind = "settings" if inner is not None else _kind(field.annotation)
        default = "" if inner is not None else _value(field)
        if field.is_required():
            default = "required"
        key = f"{prefix}{name}"
        yield Row(key, f"list of {kind}" if listed else kind, default, meanings.get(name, ""))
        if inner is not None:
            yield from _rows(inner, f"{key}.0." if listed else f"{key}.")


def field_docstrings(schema: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class, its bases included."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if (model := _model_in(argument)) is not None:
            return model
    return None


def _is_many(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, list)


def _kind(annotation: Any) -> str:
    """A type in words that a YAML author understands."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
        return "null" if annotation is type(None) else names.get(annotation.__name__, "value")
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (tuple, list):
        return "[" + ", ".join("…" if a is Ellipsis else _kind(a) for a in arguments) + "]"
    if origin is dict:
        return f"{{{_kind(arguments[0])}: {_kind(arguments[1])}}}"
    return " or ".join(_kind(argument) for argument in arguments)


def _value(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory() if field.default_factory else ""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{'null' if value is None else value}`"


def _table(rows: Iterator[Row]) -> str:
    return _markdown_table(
        ("key", "kind", "default", "meaning"),
        [(f"`{row.key}`", row.kind, row.default, _escaped(row.meaning)) for row in rows],
    )


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown_table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
