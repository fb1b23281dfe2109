"""Imports inside the package go one way: each part may import only the parts listed here, without circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "recurrent_depth"
PRIMITIVES = {"building", "checks", "devices", "errors", "extras", "files", "hub", "terminal"}
ALLOWED = {
    "data": {"data", "model"},
    "reasoning": {"reasoning", "data", "generation", "hf", "model", "runs"},
}
"""Part -> the parts that it may import besides primitives; evaluation, training and serving are above both."""


def modules(part):
    return sorted((PACKAGE / part).rglob("*.py"))


def name_of(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file, everywhere=True):
    """Yield the modules of this package that a file imports; without `everywhere`, only its top-level imports."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recurrent_depth"):
            for alias in node.names:
                inner = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("recurrent_depth"))


@pytest.mark.parametrize("part", ALLOWED)
def test_part_imports_only_what_lies_below_it(part):
    wrong = [
        f"{name_of(file)} imports {found}"
        for file in modules(part)
        for found in imports(file)
        if found.split(".")[1] not in ALLOWED[part] | PRIMITIVES
    ]
    assert not wrong


@pytest.mark.parametrize("part", ALLOWED)
def test_modules_of_a_part_import_in_no_circle(part):
    graph = {name_of(file): set(imports(file)) for file in modules(part)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_preparation_is_not_imported_by_what_the_trainer_reads():
    allowed = {name_of(file) for file in modules("data/preparation")}
    wrong = [
        f"{name_of(file)} imports {found}"
        for file in modules("data")
        if name_of(file) not in allowed
        for found in imports(file)
        if found.startswith("recurrent_depth.data.preparation")
    ]
    assert not wrong
