"""Reads a YAML file into a pydantic model; every error is one line with the file, the line and the nearest match."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from harness.errors import UserError
from methods.core.registry import unknown

Model = TypeVar("Model", bound=pydantic.BaseModel)
Loc = tuple[str | int, ...]


class Strict(pydantic.BaseModel):
    """Base of everything that people write: an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


def read(path: Path, what: str) -> tuple[Any, dict[Loc, int]]:
    """The file's content and the line of every key and item in it. UserError for a missing or malformed file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not a text file") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _lines(node, ()) if node else {}
        content = yaml.safe_load(text)
    except (RecursionError, TypeError):
        raise UserError(f"{what} {path}: not valid: keys must be words, and nothing may contain itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{what} {path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except _Repeated as error:
        raise UserError(f"{what} {path}:{error.line}: the key {error.key!r} appears twice") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} {path}: must be a mapping of keys to values")
    return content, lines


def validate(model: type[Model], content: dict, source: str, lines: dict[Loc, int] | None = None) -> Model:
    """`content` as `model`. UserError naming the key at fault, its line in `source`, what is allowed, the nearest match."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise UserError(_explain(model, error, source, lines or {})) from None


def _explain(model: type, error: pydantic.ValidationError, source: str, lines: dict[Loc, int]) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = tuple(part for part in first["loc"] if not _is_type_tag(part))
    place = source
    for length in range(len(loc), 0, -1):
        if loc[:length] in lines:
            place = f"{source}:{lines[loc[:length]]}"
            break
    dotted = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        parent = ".".join(map(str, loc[:-1]))
        return f"{place}: {parent + ': ' if parent else ''}{unknown('key', str(loc[-1]), fields_at(model, loc[:-1]))}"
    if first["type"] == "missing":
        return f"{place}: {dotted} is missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{place}: {dotted + ': ' if dotted else ''}{message[:1].lower()}{message[1:]}{got}"


def fields_at(model: Any, loc: Loc) -> list[str]:
    """Names of the keys that `model` allows at a place inside it ([] where any are)."""
    for part in loc:
        model = _field_type(model, part)
    model = _model_in(model)
    return list(model.model_fields) if model else []


def _field_type(model: Any, part: str | int) -> Any:
    if isinstance(part, int):
        arguments = [a for a in typing.get_args(_strip_optional(model)) if a is not Ellipsis]
        return arguments[0] if arguments else None
    inner = _model_in(model)
    return inner.model_fields[part].annotation if inner and part in inner.model_fields else None


def _strip_optional(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(annotation) if a is not type(None)), annotation)
    return annotation


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    candidates = typing.get_args(annotation) if not isinstance(annotation, type) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)


def _is_type_tag(part: str | int) -> bool:
    """pydantic adds the branch of a union to an error's place; people did not write it."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in {"str", "int", "float", "bool"})


class _Repeated(Exception):
    def __init__(self, key: str, line: int) -> None:
        self.key, self.line = key, line


def _lines(node: yaml.Node, loc: Loc) -> dict[Loc, int]:
    lines = {loc: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*loc, key.value)
            if inner in lines:
                raise _Repeated(key.value, key.start_mark.line + 1)
            lines |= _lines(value, inner) | {inner: key.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _lines(value, (*loc, index))
    return lines
