"""`python -m benchmarks NAME [options]`; without a name, the list of benchmarks."""

import ast
import importlib
import sys
from pathlib import Path


def names() -> dict[str, str]:
    """Return the first line of every benchmark's docstring, by name: the files here that define or import `main`."""
    folder = Path(__file__).parent
    files = {path.stem: path for path in folder.glob("*.py") if path.name != "__main__.py"}
    files |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    found = {}
    for name, path in sorted(files.items()):
        module = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef | ast.alias) and node.name == "main" for node in ast.walk(module)):
            found[name] = (ast.get_docstring(module) or "").splitlines()[0]
    return found


def main() -> None:
    """Run the benchmark that the first argument names."""
    known = names()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print("usage: python -m benchmarks NAME [options]\n")
        print("\n".join(f"{name:<22} {text}" for name, text in known.items()))
        sys.exit(len(sys.argv) > 1)
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m benchmarks {name}"
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
