"""Digests of code: the same whatever it looks like, another when it does something else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import code_digest
from harness.code_digest import canonical, code_files, digest_of, own_digest
from methods.core.registry import available, is_builtin, source_files

SOURCES = sorted((ROOT / "methods").rglob("*.py"))
CODE = '''
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Rate:
    """A rate."""

    least: float = 0.5

    def of(self, x, y=1, *, z=None) -> float:
        """What is kept."""
        kept = x * y - 1  # of all
        if kept > 0 and not z:
            kept += math.floor(x)
        return f"{kept:.2f} of {x}" if z else [kept, -x]


def nothing():
    """Nothing."""
'''


def told(code: str) -> str:
    return canonical(ast.parse(code))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# of all", "# of some"),
        ('"""A rate."""', '"""Another."""'),
        ('    """A rate."""\n', ""),
        ('    """What is kept."""', "    '''What\n    is kept.'''"),
        ("x * y - 1", "(x * y) - (1)"),
        ("(self, x, y=1, *, z=None)", "(\n        self, x,\n        y=1, *, z=None,\n    )"),
        ("import math\n", "import math\n\n\n"),
        ("Sequence", "Iterable"),
        ("0.5", "5e-1"),
        ('f"{kept:.2f} of {x}"', "f'{kept:.2f} of ' f'{x}'"),
        ('    """Nothing."""', "    pass"),
        ("least: float = 0.5", 'least: float = 0.5\n    """At least."""'),
    ],
)
def test_what_does_nothing_does_not_count(old, new):
    assert old in CODE
    assert told(CODE.replace(old, new)) == told(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "0.6"),
        ("y=1", "y=1.0"),
        ("y=1", "y=True"),
        ("y=1", "y='1'"),
        ("y=1, *, z=None", "*, y=1, z=None"),
        ("z=None", "z"),
        ("x * y", "x / y"),
        ("x * y - 1", "x * (y - 1)"),
        ("kept > 0", "kept >= 0"),
        ("and not z", "and z"),
        ("and not", "or not"),
        ("+= math", "-= math"),
        ("math.floor", "math.ceil"),
        ("floor(x)", "floor(y)"),
        ("[kept, -x]", "[-x, kept]"),
        ("[kept, -x]", "(kept, -x)"),
        ("[kept, -x]", "[kept, x]"),
        (".2f", ".3f"),
        ("def of", "def off"),
        ("class Rate:", "class Rate(dict):"),
        ("    def of", "    @staticmethod\n    def of"),
        ("least: float = 0.5", "least = 0.5"),
        ("import math\n", "import cmath as math\n"),
        ("        if kept", "        while kept"),
        ('    """Nothing."""', "    return 0"),
    ],
)
def test_what_does_something_counts(old, new):
    assert CODE.count(old) == 1
    assert told(CODE.replace(old, new)) != told(CODE)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SOURCES))
def test_layout_and_comments_of_no_file_count(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert told(ast.unparse(tree)) == canonical(tree)


def changed(node: ast.AST) -> bool:
    """Makes a node mean something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        node.value = 0 if node.value else 1  # not a little more: 1e30 + 1 is 1e30
    elif isinstance(node, ast.Name | ast.FunctionDef):
        field = "id" if isinstance(node, ast.Name) else "name"
        setattr(node, field, getattr(node, field) + "_")
    elif isinstance(node, ast.BinOp):
        node.op = ast.Mod() if isinstance(node.op, ast.FloorDiv) else ast.FloorDiv()
    elif isinstance(node, ast.Return):
        node.value = ast.Tuple([node.value or ast.Constant(None)], ast.Load())
    else:
        return False
    return True


@pytest.mark.parametrize(
    "code",
    ["a // b", "a % b", "a + b", "x = 1e30", "x = -1", "x = 0.0", "x = True", "x = False", "x = 1e400", "return"],
)
def test_a_changed_node_means_something_else(code):
    tree = ast.parse(code)
    before = canonical(tree)
    assert changed(next(node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.BinOp | ast.Return)))
    assert canonical(tree) != before


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SOURCES), st.integers(0, 10**6))
def test_any_change_of_any_file_counts(path, number):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    before, nodes = canonical(tree), list(ast.walk(tree))
    hidden = {
        id(child)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    nodes = [node for node in nodes if id(node) not in hidden and not isinstance(node, ast.Expr)]
    start = number % len(nodes)
    is_changed = any(changed(node) for node in nodes[start:] + nodes[:start])  # the first that can be
    assert (canonical(tree) != before) == is_changed


# Which files count.

FILES = {
    "toy.py": "import methods\nimport helper\nimport random\n\ndef f():\n    from parts import first\n    import methods.core.vit\n",
    "helper.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typed\nx = 1\n",
    "random.py": "x = 1\n",
    "parts/__init__.py": "x = 1\n",
    "parts/first.py": "from . import second\nfrom .inner.third import x\n",
    "parts/second.py": "x = 1\n",
    "parts/inner/__init__.py": "x = 1\n",
    "parts/inner/third.py": "x = 1\n",
    "parts/kernel.cpp": "int x = 1;\n",
    "parts/unused.py": "x = 1\n",
    "typed.py": "x = 1\n",
    "unused.py": "x = 1\n",
}
COUNTED = {"toy.py", "helper.py", *(name for name in FILES if name.startswith("parts/"))} - {"parts/unused.py"}


def plugin(folder: Path) -> Path:
    """A plug-in of many files."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "toy.py"


@pytest.mark.parametrize("name", FILES)
def test_a_plugin_is_its_file_and_all_that_it_imports_of_its_own(tmp_path, name):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        plugin(folder)
    edited = folders[1] / name
    edited.write_text(edited.read_text() + ("int y = 1;\n" if name.endswith("cpp") else "y = 1\n"))
    one, two = (folder / "toy.py" for folder in folders)
    assert (own_digest(one) != own_digest(two)) == (name in COUNTED)
    assert (digest_of(one) != digest_of(two)) == (name in COUNTED)


def test_of_a_method_that_is_a_package_every_file_counts(tmp_path):
    entry = plugin(tmp_path).parent / "parts" / "__init__.py"
    assert tmp_path / "parts" / "unused.py" in code_files(entry)
    assert tmp_path / "unused.py" not in code_files(entry)


def test_the_packages_that_a_file_lies_in_count(tmp_path):
    """Importing it runs them, also where it imports nothing itself."""
    entry = tmp_path / "outer" / "inner" / "toy.py"
    entry.parent.mkdir(parents=True)
    packages = [entry.with_name("__init__.py"), entry.parent.with_name("__init__.py")]
    for path in (entry, *packages):
        path.write_text("x = 1\n")
    assert set(code_files(entry)) == {entry, *packages}


@pytest.mark.parametrize(
    ("entry", "helper"),
    [
        ("toy.py", "added/nearby.py"),
        ("toy.py", "nearby.py"),
        ("parts/toy.py", "nearby.py"),
        ("parts/toy.py", "parts/nearby.py"),
    ],
)
def test_what_a_plugin_finds_along_the_path_counts(tmp_path, monkeypatch, entry, helper):
    """In a folder that it has added, beside it at the root of the checkout, above its package; but nothing that is installed."""
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)
    entry, helper, installed = tmp_path / entry, tmp_path / helper, tmp_path / "site-packages" / "installed.py"
    for path in (entry, helper, installed, tmp_path / "parts" / "__init__.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    for folder in (installed.parent, tmp_path / "added", tmp_path):
        monkeypatch.syspath_prepend(folder)
    entry.write_text("import nearby\nimport installed\n")
    assert set(code_files(entry)) - {tmp_path / "parts" / "__init__.py"} == {entry, helper}


def test_where_a_plugin_lies_and_what_it_is_called_does_not_count(tmp_path):
    here, there = plugin(tmp_path / "here"), plugin(tmp_path / "there")
    assert digest_of(here) == digest_of(there)
    assert digest_of(here) == digest_of(there.rename(there.with_name("renamed.py")))
    assert digest_of(here) != own_digest(here)  # the shared pieces count there


EXPECTED = {  # files of other folders that a method is made of, and some that it is not
    "sttabt": ({"core/native/packed_attention.cpp", "core/native/rows.h", "core/operators.py", "core/contract.py", "sttabt/checkpoint.py"},
               {"svite/__init__.py", "random.py", "core/masking.py"}),
    "dense": ({"dense.py", "core/contract.py", "core/report.py", "core/registry.py"}, {"core/operators.py", "random.py"}),
}  # fmt: skip


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_is_its_package_and_what_it_imports(method):
    found = {path.relative_to(ROOT / "methods").as_posix() for path in code_files(*source_files(method))}
    counted, others = EXPECTED[method]
    assert counted <= found
    assert not others & found
    if (ROOT / "methods" / method).is_dir():
        assert {
            path.relative_to(ROOT / "methods").as_posix() for path in (ROOT / "methods" / method).glob("*.py")
        } <= found


def test_digests_of_all_methods_without_torch():
    names = [name for name in available() if is_builtin(name)]
    code = (
        "import sys; from harness.freshness import code_digest; print(*map(code_digest, sys.argv[1:])); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert found == [digest_of(*source_files(name)) for name in names]
    assert len(set(found)) == len(names) >= 7
