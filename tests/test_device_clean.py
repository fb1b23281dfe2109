"""The code of models, generation and training names the device of every new tensor, and explains every host read.

Found in the syntax trees of the package. tests/test_gpu_paths.py runs the same code on a pretended GPU.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "recurrent_depth"
PARTS = ("model", "generation", "hf", "training")
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
READS = {"item", "tolist", "cpu", "numpy", "nonzero"}
REDUCTIONS = {"all", "any", "max", "min", "sum", "mean", "norm", "argmax", "prod"}


def test_factory_without_a_device_is_found():
    source = (
        "import torch\nx = torch.zeros(3)\ny = torch.ones(3, device=x.device)\nz = torch.eye(2)  # device: default\n"
    )
    assert factories_without_device(source) == [(2, "torch.zeros")]


def test_host_read_without_a_comment_is_found():
    source = "a = x.item()\n# host: it decides\nb = x.tolist()\nc = bool(x.all())\nd = int(x.max())  # host: needed\n"
    assert unexplained_reads(source) == [(1, "item"), (4, "bool")]


@pytest.mark.parametrize("part", PARTS)
def test_new_tensors_name_their_device(part):
    """A factory without `device=` needs a comment `# device: REASON` on its line or the line above."""
    assert found_in(part, factories_without_device) == []


@pytest.mark.parametrize("part", PARTS)
def test_host_reads_say_why_the_host_needs_the_value(part):
    """Reading a value waits for the GPU. It needs a comment `# host: REASON` on its line or the line above."""
    assert found_in(part, unexplained_reads) == []


def found_in(part, search):
    return [
        f"{file.relative_to(PACKAGE)}:{line}: {what}"
        for file in sorted((PACKAGE / part).rglob("*.py"))
        for line, what in search(file.read_text(encoding="utf-8"))
    ]


def factories_without_device(source):
    """Return (line, call) of every torch factory without a device and without a comment."""
    return [
        (node.lineno, ast.unparse(node.func))
        for node in calls(source, "device:")
        if isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def unexplained_reads(source):
    """Return (line, function) of every read of a tensor on the host without a comment."""
    found = []
    for node in calls(source, "host:"):
        function = node.func
        if isinstance(function, ast.Attribute) and (function.attr in READS or ast.unparse(function) == "torch.equal"):
            found.append((node.lineno, function.attr))
        elif isinstance(function, ast.Name) and function.id in ("bool", "int", "float") and node.args:
            inner = node.args[0]
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr in REDUCTIONS:
                found.append((node.lineno, function.id))
    return found


def calls(source, mark):
    """Yield the calls without a comment that contains `mark` on one of their lines or the line above."""
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and mark in token.string
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and not comments & {*range(node.lineno - 1, node.end_lineno + 1)}:
            yield node
