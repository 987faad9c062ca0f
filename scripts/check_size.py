"""The size budget: short functions, short files, few parameters, and a total that is raised only on purpose.

`python scripts/check_size.py` prints the totals and one line for each breach; exit code 1 if there is any.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "engine", "kv_transfer", "prefill_worker", "decode_worker", "router", "cluster", "src/tandem")
OTHERS = ("tests", "scripts", "benchmarks")

FUNCTION_LINES = 60
FUNCTION_MEDIAN = 10
FILE_LINES = 600
FILE_LINES_WARN = 400
PARAMETERS = 6
TOTAL_LINES = 18_000  # non-blank lines of the packages: a quarter connectors and surviving faults, a tenth the bench

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    where: str
    lines: int
    parameters: int


def source_files(folders: tuple[str, ...]) -> Iterator[Path]:
    """Handwritten Python files below `folders`; links are not followed, so nothing is counted twice."""
    for folder in folders:
        pattern = "*.py" if folder.startswith("src") else "**/*.py"
        for path in sorted((ROOT / folder).glob(pattern)):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield path


def functions_of(path: Path, text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FunctionNode):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines, parameter_count(node))


def parameter_count(node: FunctionNode) -> int:
    """Parameters without self and cls; none for a CLI command (its flags) and a Triton kernel (pointers, strides)."""
    if any(decorator_name(decorator) in ("command", "callback", "jit") for decorator in node.decorator_list):
        return 0
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def decorator_name(decorator: ast.expr) -> str:
    """The last part: `jit` of @triton.jit, `command` of @app.command()."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return target.attr if isinstance(target, ast.Attribute) else ""


def file_breach(path: Path, lines: int) -> tuple[str, bool] | None:
    """A message, and whether it is an error rather than a warning."""
    limit = FILE_LINES if lines > FILE_LINES else FILE_LINES_WARN
    if lines <= limit:
        return None
    return f"{path.relative_to(ROOT)}: {lines} lines (limit {limit})", lines > FILE_LINES


def function_breaches(function: Function) -> Iterator[str]:
    if function.lines > FUNCTION_LINES:
        yield f"{function.where}: {function.lines} lines (limit {FUNCTION_LINES})"
    if function.parameters > PARAMETERS:
        yield f"{function.where}: {function.parameters} parameters (limit {PARAMETERS}; use a dataclass)"


def total_breaches(total: int, median: float) -> Iterator[str]:
    if total > TOTAL_LINES:
        yield f"packages: {total} non-blank lines (budget {TOTAL_LINES}); delete some, or raise the budget and say why"
    if median > FUNCTION_MEDIAN:
        yield f"packages: median function of {median:g} lines (limit {FUNCTION_MEDIAN})"


def main() -> int:
    errors: list[str] = []
    warnings: list[str] = []
    total, product = 0, list[Function]()
    for folders, counts in ((PACKAGES, True), (OTHERS, False)):
        for path in source_files(folders):
            text = path.read_text(encoding="utf-8")
            functions = list(functions_of(path, text))
            breach = file_breach(path, text.count("\n"))
            if breach:
                (errors if breach[1] else warnings).append(breach[0])
            for function in functions:
                errors.extend(function_breaches(function))
            if counts:
                total += sum(1 for line in text.splitlines() if line.strip())
                product.extend(functions)
    median = statistics.median(function.lines for function in product)
    errors.extend(total_breaches(total, median))
    for line in warnings:
        print(f"warning: {line}")
    for line in errors:
        print(f"error: {line}")
    print(f"size: {total} of {TOTAL_LINES} lines, {len(product)} functions, median {median:g} lines")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
