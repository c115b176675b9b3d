"""From a spec and the command line to cells: overrides, plug-ins, the choice of methods, sweeps. No torch of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

import methods
from harness import freshness
from harness.errors import UserError
from harness.spec import Entry, Spec, is_survey
from harness.yamlfile import fields_at, read, validate
from methods.core.registry import is_builtin, unknown


@dataclass(frozen=True)
class Cell:
    """One (entry, seed)."""

    label: str
    method: methods.Method = field(repr=False)
    seed: int
    phases: dict[str, str] = field(default_factory=dict)  # files that phases' results are taken from
    control: bool = False  # see spec.Entry

    @property
    def settings(self) -> dict[str, Any]:
        return self.method.settings.model_dump(mode="json")


@dataclass(frozen=True)
class Run:
    """A spec with its name and the choices of the command line applied."""

    name: str
    spec: Spec
    folder: Path
    entries: tuple[Entry, ...]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, the dense baseline and dense+ first. UserError for wrong settings."""
        rows: list[tuple[str, methods.Method, dict[str, str], bool]] = []
        for entry in (*baseline_entries(), *self.entries):
            for label, method in expand(entry):
                given = self._given(entry)
                if any(method.name == m.name and method.settings == m.settings and given == g for _, m, g, _ in rows):
                    continue
                if any(label == other for other, *_ in rows):
                    raise UserError(
                        f"{self.name}: two rows are called {label!r}; give one of the entries another label"
                    )
                rows.append((label, method, given, entry.control))
        return [Cell(label, method, seed, *rest) for seed in self.spec.seeds for label, method, *rest in rows]

    def _given(self, entry: Entry) -> dict[str, str]:
        """The entry's files for phases, relative ones from the spec's folder."""
        paths = {
            phase: Path(file) if Path(file).exists() else self.folder / file for phase, file in entry.phases.items()
        }
        gone = next((phase for phase, path in paths.items() if not path.is_file()), None)
        if gone is not None:
            raise UserError(f"{entry.method}: phases.{gone} {entry.phases[gone]}: no such file")
        return {phase: str(path) for phase, path in paths.items()}


def baseline_entries() -> tuple[Entry, Entry]:
    """The rows that every run has: dense, and dense+ (dense trained on for the adaptation budget)."""
    (base, settings), (reference, continued) = methods.BASELINE, methods.REFERENCE
    return Entry(method=base, settings=settings, label="dense"), Entry(
        method=reference, settings=continued, label="dense+"
    )


def expand(entry: Entry) -> list[tuple[str, methods.Method]]:
    """The entry's sweep: (label, method) per combination of its lists of values."""
    lists = {
        key: value for key, value in entry.settings.items() if isinstance(value, list) and not _accepts(entry, key)
    }
    empty = next((key for key, value in lists.items() if not value), None)
    if empty:
        raise UserError(f"{entry.method}.{empty}: an empty list of values")
    rows = []
    for values in itertools.product(*lists.values()):
        chosen = entry.settings | dict(zip(lists, values, strict=True))
        try:
            method = methods.create(entry.method, **chosen)
        except ValueError as error:
            raise UserError(str(error)) from None
        rows.append((_label(entry, chosen, list(lists)), method))
    return rows


def _accepts(entry: Entry, key: str) -> bool:
    """Whether a list is a value of this setting rather than a sweep over values: its type says so, whatever the other
    settings are."""
    try:
        fields = methods.find(entry.method).Settings.model_fields
        field = next(field for name, field in fields.items() if key in (name, field.alias))
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        pydantic.TypeAdapter(kind).validate_python(entry.settings[key])
    except (ValueError, StopIteration):  # an unknown method or setting is told when the method is made
        return False
    return True


def _label(entry: Entry, chosen: dict[str, Any], swept: list[str]) -> str:
    """The row's label; what is swept appears in it, by a {setting} or at its end."""
    try:
        label = entry.label.format(**chosen) if entry.label else entry.method
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"label {entry.label!r}: {error} is no setting of this entry") from None
    shown = [key for key in (swept if entry.label else chosen) if f"{{{key}}}" not in (entry.label or "")]
    return " ".join([label, *(f"{key}={chosen[key]}" for key in shown)])


def load_run(
    path: Path,
    overrides: Iterable[str] = (),
    only: list[str] | None = None,
    plugins: Iterable[str] = (),
    changes: dict[str, Any] | None = None,
) -> Run:
    """A spec file with `--set KEY=VALUE` overrides, restricted to some methods, with further plug-ins.

    changes: top-level keys that other options set (seeds, device, dtype). UserError for whatever is wrong."""
    content, lines = read(path, "spec")
    if is_survey(content):
        raise UserError(f"spec {path}: is a survey; say bench.py latency --spec {path.stem}")
    spec = validate(Spec, content, str(path), lines)
    added = [name for plugin in plugins for name in plug_in(plugin)]
    for plugin in spec.plugins:
        plug_in(path.parent / plugin)
    entries = _choose(spec.entries, only, added)
    values = content | (changes or {})
    for override in overrides:
        key, value = parse_override(override)
        head, *rest = key.split(".")
        if key in ("entries", "plugins"):
            raise UserError(
                f"--set {key}: use {'--methods and METHOD.SETTING=VALUE' if key == 'entries' else '--plugin'}"
            )
        if head in Spec.model_fields:
            _set_key(values, [head, *rest], value)
        else:
            entries = set_setting(entries, head, rest, value, list(Spec.model_fields))
    spec = validate(Spec, values, "--set" if list(overrides) else str(path))
    take_digests(entries)
    return Run(path.stem, spec, path.parent, tuple(entries))


def take_digests(entries: Iterable[Entry]) -> None:
    """A run is of the code that it begins with: digests are taken now, before data is read, and kept however files change."""
    for name in dict.fromkeys(entry.method for entry in (*baseline_entries(), *entries)):
        with contextlib.suppress(ValueError):  # a method that cannot be loaded is told when it is made
            if not is_builtin(name):
                methods.find(name)
            freshness.code_digest(name), freshness.plugin_part(name)


def parse_override(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value in YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: must be KEY=VALUE, e.g. budget.epochs=2 or dynamicvit.keep_rate=[0.9,0.7]")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text!r}: the value is not valid YAML") from None


def set_setting(
    entries: list[Entry], method: str, rest: list[str], value: Any, keys: Iterable[str] = ()
) -> list[Entry]:
    """`entries` with METHOD.SETTING = value in every entry of that method."""
    if method not in methods.available():
        raise UserError(f"--set: {unknown('key', method, dict.fromkeys([*keys, *methods.available()]))}")
    if len(rest) != 1:
        raise UserError(f"--set {'.'.join([method, *rest])}: must be METHOD.SETTING=VALUE")
    if all(entry.method != method for entry in entries):
        raise UserError(f"--set {method}.{rest[0]}: this run has no entry of {method}; add it with --methods")
    return [
        entry.model_copy(update={"settings": entry.settings | {rest[0]: value}}) if entry.method == method else entry
        for entry in entries
    ]


def known(names: Iterable[str]) -> list[str]:
    """The names, if all are methods; UserError otherwise."""
    names = list(names)
    for name in names:
        if name not in methods.available():
            raise UserError(unknown("method", name, methods.available()))
    return names


def _choose(entries: list[Entry], only: list[str] | None, added: list[str]) -> list[Entry]:
    """The spec's entries of the chosen methods; a chosen method (or a new plug-in's) without one gets its defaults."""
    known([*(entry.method for entry in entries), *(only or [])])
    chosen = only if only is not None else [*(entry.method for entry in entries), *added]
    automatic = {entry.method for entry in baseline_entries()}
    result = [entry for entry in entries if entry.method in chosen]
    for name in dict.fromkeys(chosen):
        if name not in automatic and all(entry.method != name for entry in result):
            result.append(Entry(method=name))
    return result


def plug_in(path: str | Path) -> list[str]:
    """The names of the methods that a file adds. UserError where it cannot be loaded."""
    try:
        return methods.load_plugin(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None


def _set_key(values: dict, keys: list[str], value: Any) -> None:
    """Sets values[a][b][c]; an unknown key is left to the validation, which knows what is allowed."""
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if isinstance(inner, str) and key == "data":
            inner = {"card": inner}
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"--set {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} has no keys inside")
        inner = dict(inner or {})
        if not inner and depth == 0 and not fields_at(Spec, (key,)) and key not in {"adapt"}:
            raise UserError(f"--set {'.'.join(keys)}: {key} has no keys inside")
        values[key] = inner
        values = inner
    values[keys[-1]] = value
