"""Runs the code of a notebook, cell by cell in one namespace, without Jupyter.

    python -m tests.notebook notebooks/run.ipynb

The value of a cell's last line must be one that Jupyter could show: evaluating it must not fail.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def execute(path: Path) -> dict[str, Any]:
    """The names that the cells define. An error names the cell and the line, as a file of the traceback."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(path), 1):
        tree, where = ast.parse(source), f"{path.name}, code cell {number}"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            repr(eval(compile(ast.Expression(last.value), where, "eval"), names))
    return names


if __name__ == "__main__":
    found = execute(Path(sys.argv[1]))
    print(json.dumps({name: found[name] for name in ("random_loss", "losses", "RUN_URL")}))
