"""The rules of the tree: file lengths, docstrings, no stubs, imports that cost nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "hasten").rglob("*.py"))
NAMES = [str(f.relative_to(ROOT)) for f in FILES]
every_file = pytest.mark.parametrize("file", FILES, ids=NAMES)


def limit(name: str) -> int:
    """The most lines a file may have."""
    if name in ("hasten/fit.py",) or name.startswith("hasten/methods/"):
        return 150
    return 250 if name == "hasten/models/dit.py" else 400


@every_file
def test_length(file):
    name = str(file.relative_to(ROOT))
    assert len(file.read_text().splitlines()) <= limit(name)


# What a protocol in core declares and explains; an implementation of it need not say it again.
PROTOCOL = {"forward", "blocks", "turns", "networks", "stages", "sampling", "needs_data", "check", "apply"}


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module, and public methods of its public classes, without a docstring.

    Methods of one statement may go without, and those that implement a protocol.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    missing = []
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for part in node.body:
                if isinstance(part, kinds) and not part.name.startswith("_") and part.name not in PROTOCOL:
                    if len(part.body) > 1 and not ast.get_docstring(part):
                        missing.append(f"{node.name}.{part.name}")
    return missing


@every_file
def test_public_things_have_docstrings(file):
    tree = ast.parse(file.read_text())
    if tree.body:  # an empty __init__.py says nothing because it holds nothing
        assert ast.get_docstring(tree), "the module has no docstring"
    assert undocumented(tree) == []


@every_file
def test_nothing_is_left_for_later(file):
    text = file.read_text()
    for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "breakpoint("):
        assert word not in text


def test_the_docstring_rule_sees_what_is_missing():
    tree = ast.parse(
        'class A:\n  def f(self):\n    x = 1\n    return x\ndef g(): pass\ndef _h(): pass\ndef i():\n  "i"'
    )
    assert undocumented(tree) == ["A", "A.f", "g"]


HEAVY = (
    "diffusers transformers torchao torchmetrics torchvision sklearn scipy matplotlib pandas tensorboard wandb "
    "datasets pydantic jinja2"
).split()


@pytest.mark.parametrize("module", ["hasten", "hasten.core.sample", "hasten.models.dit"])
def test_an_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_core_imports_torch_and_itself_alone():
    """Also inside functions, where import-linter looks too, and on names that it is not told of."""
    allowed = {"hasten.core", "torch", "__future__"} | set(sys.stdlib_module_names)
    for file in (ROOT / "hasten" / "core").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("hasten.core"), f"{file.name} imports {name}"


def test_every_mutation_finds_its_text_once(monkeypatch: pytest.MonkeyPatch):
    """One that does not is no test of the tests any more; mutate.py --changed sees those of changed files only."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    mutations = importlib.import_module("mutations").MUTATIONS
    stale = [(m.file, m.old) for m in mutations if (ROOT / m.file).read_text().count(m.old) != 1]
    assert len(mutations) > 500 and not stale


def test_every_mutant_is_still_a_program(monkeypatch: pytest.MonkeyPatch):
    """A mutant that does not even parse is no mutant: its tests never run."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    for m in importlib.import_module("mutations").MUTATIONS:
        if m.file.endswith(".py"):
            ast.parse((ROOT / m.file).read_text().replace(m.old, m.new), filename=f"{m.file}: {m.breaks}")
