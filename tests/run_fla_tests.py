"""Runs the forward checks of FLA's own KDA test file against our functions.

    python tests/run_fla_tests.py PATH/TO/fla/tests/ops/test_kda.py [pytest arguments]

The file is read as a syntax tree and three things change in a temporary copy:
  * chunk_kda, fused_recurrent_kda and fused_recurrent_kda_fwd are imported from kda_kernels.api instead of from fla;
  * statements about gradients are dropped, for we have no backward: every call of .backward(), every statement that
    touches a .grad, and every statement that uses a name which only a dropped statement gave a value;
  * tests that call none of our functions, directly or through a helper, are dropped: they would test FLA.
What was dropped is printed. Everything else, references and tolerances too, stays as FLA wrote it. Needs a GPU, and FLA
itself for its naive references.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = {"chunk_kda", "fused_recurrent_kda", "fused_recurrent_kda_fwd"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


class _Gradients(ast.NodeTransformer):
    """Drops what has to do with gradients from one function."""

    def __init__(self) -> None:
        self.dropped: list[ast.stmt] = []
        self.unset: set[str] = set()  # names that only dropped statements gave a value

    def visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            return self._statement(node)
        node = self.generic_visit(node)
        if isinstance(node, ast.If | ast.For | ast.While | ast.With) and not node.body:
            if not getattr(node, "orelse", None):
                return None
            node.body = [ast.Pass()]
        return node

    def _statement(self, node: ast.stmt) -> ast.stmt | None:
        about_gradients = any(isinstance(n, ast.Attribute) and n.attr in ("grad", "backward") for n in ast.walk(node))
        if about_gradients or _names(node, ast.Load) & self.unset:
            self.unset |= _names(node, ast.Store)
            self.dropped.append(node)
            return None
        self.unset -= _names(node, ast.Store)
        return node


def _users_of_ours(functions: list[Function]) -> set[str]:
    """Names of the functions that call ours, directly or through one another."""
    users: set[str] = set()
    while True:
        more = {f.name for f in functions if _names(f, ast.Load) & (OURS | users)}
        if more == users:
            return users
        users = more


def _imports(node: ast.ImportFrom) -> list[ast.stmt]:
    """The import, split into what is ours and what stays with fla."""
    if not (node.module or "").startswith("fla"):
        return [node]
    ours = [alias for alias in node.names if alias.name in OURS]
    theirs = [alias for alias in node.names if alias.name not in OURS]
    sources = (("kda_kernels.api", ours), (node.module, theirs))
    return [ast.ImportFrom(module, aliases, 0) for module, aliases in sources if aliases]


def rewrite(source: str) -> tuple[str, list[str]]:
    """The new source, and a line for each thing dropped, in order.

    Raises:
        ValueError: the file imports none of our functions from fla, or would check nothing.
    """
    tree = ast.parse(source)
    users = _users_of_ours([node for node in tree.body if isinstance(node, Function)])
    body: list[ast.stmt] = []
    dropped: list[tuple[int, str]] = []
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            body += (parts := _imports(node))
            imported |= {a.name for part in parts if part.module == "kda_kernels.api" for a in part.names}
        elif isinstance(node, Function) and node.name.startswith("test") and node.name not in users:
            dropped.append((node.lineno, f"{node.name}: calls none of our functions"))
        else:
            if isinstance(node, Function):
                gradients = _Gradients()
                node = gradients.visit(node)
                dropped += [(n.lineno, f"{node.name}: {ast.unparse(n)}") for n in gradients.dropped]
            body.append(node)
    if not imported:
        raise ValueError(f"imports none of {', '.join(sorted(OURS))} from fla")
    if not any(isinstance(node, Function) and node.name.startswith("test") for node in body):
        raise ValueError("holds no test of our functions")
    tree.body = body
    return ast.unparse(ast.fix_missing_locations(tree)), [f"line {line}: {what}" for line, what in sorted(dropped)]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    if importlib.util.find_spec("fla") is None:
        print("Error: fla is not installed: pip install flash-linear-attention", file=sys.stderr)
        return 3
    path = Path(arguments[0])
    try:
        source, dropped = rewrite(path.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        print(f"Error: {path}: {error}", file=sys.stderr)
        return 2
    print(f"dropped from {path}:", *dropped, sep="\n  ")
    kernels = Path(__file__).resolve().parents[1] / "kernels"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(kernels), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(source)
        pytest = [sys.executable, "-m", "pytest", str(copy), "--rootdir", folder, "-p", "no:cacheprovider"]
        return subprocess.run([*pytest, *arguments[1:]], env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
