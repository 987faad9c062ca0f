"""The size budget finds what is too big, and counts as it says."""

from __future__ import annotations

import ast

import pytest

from scripts.check_size import FILE_LINES, FILE_LINES_WARN, ROOT, file_breach, function_breaches, functions_of


def only_function(source: str):
    (function,) = functions_of(ROOT / "x.py", source)
    return function


def test_a_function_of_60_lines_passes_and_one_more_does_not() -> None:
    body = "    pass\n"
    assert list(function_breaches(only_function("def f():\n" + body * 59))) == []
    assert "61 lines" in next(function_breaches(only_function("def f():\n" + body * 60)))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a, b, /, c, *, d): ...", 4),
        ("class A:\n    def f(self, a): ...", 1),
        ("class A:\n    @classmethod\n    async def f(cls, a, b): ...", 2),
        ("@app.command()\ndef f(a, b, c, d, e, f, g): ...", 0),
        ("@triton.jit\ndef f(a, b, c, d, e, f, g): ...", 0),
        ("@functools.cache\ndef f(a, b, c, d, e, f, g): ...", 7),
    ],
)
def test_parameters_are_counted_without_self(source: str, count: int) -> None:
    ast.parse(source)
    assert only_function(source).parameters == count


def test_long_files_warn_before_they_fail() -> None:
    path = ROOT / "x.py"
    assert file_breach(path, FILE_LINES_WARN) is None
    warned, failed = file_breach(path, FILE_LINES_WARN + 1), file_breach(path, FILE_LINES + 1)
    assert warned is not None and not warned[1]
    assert failed is not None and failed[1]
