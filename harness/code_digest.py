"""Digests of source code over what it does: comments, docstrings and layout do not count. No torch, nothing is imported."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from harness.spec import ROOT

PACKAGE = ROOT / "methods"
NATIVE = {
    ".c",
    ".cc",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".hpp",
}  # sources that a package compiles when it is used; their comments count
INSTALLED = {"site-packages", "dist-packages"}  # what lies beside a module there has nothing to do with it
NO_MEANING = {"ctx", "kind", "type_comment"}  # fields of nodes that follow from others


def digest_of(*entries: Path) -> str:
    """SHA-256 (hexadecimal) of all files that these modules are made of: their own, and the shared ones of `methods`."""
    return _joined(entries, code_files(*entries))


def own_digest(*entries: Path) -> str:
    """The same without what belongs to the package `methods`: of a plug-in, what its author wrote."""
    return _joined(entries, [path for path in code_files(*entries) if not path.is_relative_to(PACKAGE)])


def _joined(entries: tuple[Path, ...], files: list[Path]) -> str:
    """Files count by their names seen from where imports find them; the name of a plug-in's own file does not matter."""
    lone = {path.resolve() for path in entries if not path.resolve().is_relative_to(PACKAGE)}
    named = sorted(
        ("plug-in" if path in lone else path.relative_to(_root(path)).as_posix(), _file_digest(path)) for path in files
    )
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in named).encode()).hexdigest()


def code_files(*entries: Path) -> list[Path]:
    """The files of these modules (of a package: all), and what they import, directly or not; sorted."""
    found: set[Path] = set()
    waiting = [path.resolve() for path in entries]
    waiting += [path for entry in waiting if entry.name == "__init__.py" for path in entry.parent.rglob("*.py")]
    if any(path.is_relative_to(PACKAGE) for path in waiting):
        waiting.append(PACKAGE / "__init__.py")
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported_files(path)
            waiting += _packages_of(path)
    return sorted(found)


def _packages_of(path: Path) -> list[Path]:
    """The `__init__.py` of the packages that a file lies in: importing it runs them."""
    root = _root(path)
    return [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(root) and folder != root]


def _root(path: Path) -> Path:
    """The folder where the file's absolute imports begin: above its outermost package."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


@cache
def _imported_files(path: Path) -> tuple[Path, ...]:
    """What a file imports of its own package, of its folder and of `methods`; of a package its native sources, too."""
    native = sorted(f for f in path.parent.iterdir() if f.suffix in NATIVE) if path.name == "__init__.py" else []
    tree = _parsed(path)
    found = [] if tree is None else [file for name in _imports(tree, path) for file in _files_of(name, path)]
    return tuple(dict.fromkeys([*native, *found]))


def _imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names of all that may be a module: anywhere in the file, but for `if TYPE_CHECKING`."""
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = path.parent.relative_to(_root(path)).parts
                base = ".".join([*inside[: len(inside) + 1 - node.level], *base.split(".")]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _files_of(name: str, importer: Path) -> list[Path]:
    """The files that importing `a.b.c` runs: those of a, a.b and a.b.c; none where it is of another project."""
    top, *_ = parts = name.split(".")
    for folder in _search(top, importer):
        files = []
        for depth in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:depth])
            files += [f for f in (place / "__init__.py", place.with_name(place.name + ".py")) if f.is_file()][:1]
        if files:
            return files
    return []


def _search(top: str, importer: Path) -> list[Path]:
    """Folders in which a module of that name is looked for."""
    if top == PACKAGE.name:
        return [ROOT]
    root, folders = _root(importer), []
    if root != importer.parent and top == importer.relative_to(root).parts[0]:
        folders.append(root)
    if not importer.is_relative_to(PACKAGE) and top not in sys.stdlib_module_names:
        added = [
            folder for folder in map(Path.resolve, map(Path, sys.path)) if folder != ROOT
        ]  # by a plug-in, or for it
        folders += [folder for folder in (importer.parent, root, *added) if folder.name not in INSTALLED]
    return folders


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that count."""
    yield node
    for _, value in ast.iter_fields(node):
        for child in _counted(value) if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _parsed(path: Path) -> ast.AST | None:
    """None for what is no Python, or none of this version's."""
    if path.suffix in NATIVE:
        return None
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


@cache
def _file_digest(path: Path) -> str:
    """Of the syntax tree; of a file that has none, of its bytes. Kept: a process runs the code that it first saw."""
    tree = _parsed(path)
    content = path.read_bytes() if tree is None else canonical(tree).encode()
    return hashlib.sha256(content).hexdigest()


def canonical(node: object) -> str:
    """A syntax tree as text that is the same under every version of Python: kinds of nodes, and their fields that are not empty."""
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!a}"
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr[{','.join(map(canonical, _merged(node.values)))}]"
    if isinstance(node, list):
        return f"[{','.join(map(canonical, _counted(node)))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = sorted((name, value) for name, value in ast.iter_fields(node) if name not in NO_MEANING and value != [])
    told = [f"{name}={canonical(value)}" for name, value in fields if value is not None and not _is_empty(value)]
    return f"{type(node).__name__}({','.join(told)})"


def _counted(children: list) -> list:
    """Without statements that do nothing (docstrings and other lone constants, `pass`), and without what only type checkers read."""
    found = []
    for child in children:
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            found += _counted(child.orelse)
        elif not isinstance(child, ast.Pass) and not (
            isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        ):
            found.append(child)
    return found


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _is_empty(value: object) -> bool:
    """A format specification without content: versions differ in whether there is one."""
    return isinstance(value, ast.JoinedStr) and not _merged(value.values)


def _merged(values: list[ast.expr]) -> list[ast.expr]:
    """The pieces of an f-string; versions differ in where they divide its text."""
    found: list[ast.expr] = []
    for value in values:
        if isinstance(value, ast.Constant) and found and isinstance(found[-1], ast.Constant):
            found[-1] = ast.Constant(found[-1].value + value.value)
        elif not (isinstance(value, ast.Constant) and value.value == ""):
            found.append(value)
    return found
