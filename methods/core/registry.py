"""Finds methods: files of this package, plug-in files, and entry points. Names come without importing torch."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic

from methods.core.contract import Method

ENTRY_POINTS = "sparse_vit_bench.methods"
BASELINE = ("dense", {})  # trained from scratch; start and teacher of the others
REFERENCE = ("dense", {"continued": True})  # "dense+": what every accuracy difference refers to

LONGEST_LIST = 40  # names that an error message lists

_FOLDER = Path(__file__).parent.parent
_registered: dict[str, type[Method]] = {}
_plug_ins: dict[Path, list[str]] = {}  # names by file, of those that were loaded


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a Method subclass known under its name. ValueError where the name is taken."""
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"register takes a subclass of methods.Method, not {cls!r}")
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise ValueError(f"{cls.__name__} needs a class attribute `name`")
    if cls.name in _builtin_files() and not cls.__module__.startswith("methods."):
        raise ValueError(f"the name {cls.name!r} is taken by a built-in method")
    taken = _registered.get(cls.name)
    if taken is not None and _source(taken) != _source(cls):
        raise ValueError(f"the name {cls.name!r} is taken by {_source(taken)}")
    _registered[cls.name] = cls
    return cls


def available() -> list[str]:
    """Names of all methods that can be created, sorted."""
    return sorted({*_builtin_files(), *_entry_points(), *_registered})


def find(name: str) -> type[Method]:
    """The class of a method, imported when first asked for. ValueError for a name that nobody has."""
    if name not in _registered:
        if name in _builtin_files():
            importlib.import_module(f"methods.{name}")
        elif name in _entry_points():
            _load_entry_point(name)
        else:
            raise ValueError(unknown("method", name, available()))
    if name not in _registered:
        raise ValueError(f"method {name!r}: its module was imported but registers no method of that name")
    return _registered[name]


def create(name: str, **settings: Any) -> Method:
    """A method with validated settings. ValueError naming the setting at fault, what is allowed, the nearest match."""
    cls = find(name)
    try:
        return cls(**settings)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(cls, error)) from None


def describe(name: str) -> str:
    """The first line of a method's docstring; built-in methods are read, not imported."""
    if name in _builtin_files() and name not in _registered:
        tree = ast.parse(_builtin_files()[name].read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
    elif name in _registered:
        text = _registered[name].__doc__ or inspect.getmodule(_registered[name]).__doc__
    else:
        text = f"entry point {_entry_points()[name].value}"
    return (text or "").strip().split("\n")[0]


def load_plugin(path: str | Path) -> list[str]:
    """Runs a Python file and returns the names of the methods that it registers.

    FileNotFoundError where there is no such file, ValueError where it fails or registers nothing."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"plug-in {path}: no such file")
    module_name = f"_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if path in _plug_ins:
        return _plug_ins[path]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plug-in {path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    before = dict(_registered)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"plug-in {path}{_line_in(path, error)}: {type(error).__name__}: {error}") from error
    names = [name for name, cls in _registered.items() if before.get(name) is not cls]
    if not names:
        raise ValueError(
            f"plug-in {path}: registers no method (decorate a methods.Method subclass with @methods.register)"
        )
    _plug_ins[path] = names
    return names


def loaded_plugins() -> tuple[str, ...]:
    """The plug-in files that this process has loaded, for another process that is to know the same methods."""
    return tuple(map(str, _plug_ins))


def is_builtin(name: str) -> bool:
    """Whether the method belongs to this package."""
    return name in _builtin_files()


def source_files(name: str) -> tuple[Path, ...]:
    """The files that define a method: of a built-in one without importing it, of another once it is loaded; none otherwise."""
    if is_builtin(name):
        return (_builtin_files()[name],)
    files = [path for path, names in _plug_ins.items() if name in names]
    with contextlib.suppress(KeyError, TypeError, OSError):  # not loaded, or not made from a file
        files.append(Path(inspect.getfile(_registered[name])).resolve())
    return tuple(dict.fromkeys(files))


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """One line for a name that does not exist: what is allowed (unless that is a very long list), and the nearest match."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = (
        f"; allowed: {', '.join(allowed) or 'none'}" if len(allowed) <= LONGEST_LIST else f"; {len(allowed)} are known"
    )
    return f"unknown {what} {name!r}{listed}{hint}"


def _explain(cls: type[Method], error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{cls.name}: {unknown('setting', where, cls.Settings.model_fields)}"
    place = f"{cls.name}.{where}" if where else cls.name
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" or not where else f" (got {first['input']!r})"
    return f"{place}: {message[:1].lower()}{message[1:]}{value}"


def _builtin_files() -> dict[str, Path]:
    """Name -> file: every module or package directly in methods/, apart from `core`, is a method of that name."""
    found = {}
    for path in _FOLDER.iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            found[path.stem] = path
        elif path.name != "core" and (path / "__init__.py").is_file():
            found[path.name] = path / "__init__.py"
    return found


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_entry_point(name: str) -> None:
    point = _entry_points()[name]
    try:
        loaded = point.load()
    except Exception as error:
        raise ValueError(f"method {name!r} (entry point {point.value}): {type(error).__name__}: {error}") from error
    if isinstance(loaded, type) and loaded.name not in _registered:
        register(loaded)


def _source(cls: type[Method]) -> str:
    try:
        return f"{inspect.getfile(cls)}:{cls.__qualname__}"
    except (TypeError, OSError):
        return f"{cls.__module__}:{cls.__qualname__}"


def _line_in(path: Path, error: BaseException) -> str:
    """':LINE' of the deepest frame inside the plug-in file, so that the author knows where to look."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f":{line}" if line else ""
