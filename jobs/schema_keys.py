"""The dotted keys that a nested pydantic configuration accepts."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Every key of `schema`, leaves and groups; entries of lists are written with index 0."""
    return list(_walk(schema, ""))


def keys_at(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields below `path` (parts are field names, list indices or mapping keys)."""
    annotation: Any = schema
    for part in path:
        model = _model_in(annotation)
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[part].annotation
        elif (entry := _entry_of(annotation)) is not None:
            annotation = entry
        else:
            return []
    model = _model_in(annotation)
    return list(model.model_fields) if model else []


def _walk(annotation: Any, prefix: str) -> Iterator[str]:
    model = _model_in(annotation)
    if model is None:
        return
    for name, field in model.model_fields.items():
        yield prefix + name
        yield from _walk(field.annotation, f"{prefix}{name}.")
        entry = _entry_of(field.annotation)
        if entry is not None and not _is_mapping(field.annotation):
            yield from _walk(entry, f"{prefix}{name}.0.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The configuration class in `annotation`, seen through `X | None` and `Annotated[X, ...]`."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _entry_of(annotation: Any) -> Any:
    """What a sequence or mapping in `annotation` holds, or None."""
    for option in _options(annotation):
        arguments = [a for a in typing.get_args(option) if a is not Ellipsis]
        if arguments and typing.get_origin(option) in (tuple, list, dict):
            return arguments[-1]
    return None


def _is_mapping(annotation: Any) -> bool:
    return any(
        isinstance(origin := typing.get_origin(option), type) and issubclass(origin, Mapping)
        for option in _options(annotation)
    )


def _options(annotation: Any) -> list[Any]:
    """The alternatives of a union; the annotation itself otherwise."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [o for part in typing.get_args(annotation) for o in _options(part)]
    return [annotation]
