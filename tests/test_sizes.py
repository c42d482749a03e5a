"""Modules, functions and signatures stay small enough to be read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmq

PACKAGE = Path(glmq.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LONG_MODULES = {"checkpoint/ascend.py", "codec/container.py", "codec/codec.py"}
"""One subject each, told in one file: a format, a codec."""
MODULE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8
COMMANDS = {
    f"cli/{verb}.py": verb for verb in ("ask", "calibrate", "quantize", "compress", "inspect", "verify", "demo")
}
"""Typer reads a command's options from its signature."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", sorted(set(MODULES) - LONG_MODULES))
def test_a_module_is_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MODULE_LINES


@pytest.mark.parametrize("name", MODULES)
def test_its_functions_are_short_and_take_few_parameters(name: str) -> None:
    for function in functions(MODULES[name]):
        if function.name == COMMANDS.get(name):
            continue
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        docstring = ast.get_docstring(function, clean=False)
        if docstring is not None:
            lines -= len(docstring.splitlines())
        given = function.args
        parameters = [
            a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")
        ]
        assert lines <= FUNCTION_LINES, f"{function.name} has {lines} lines without its docstring"
        assert len(parameters) <= PARAMETERS, f"{function.name} takes {len(parameters)} parameters"
