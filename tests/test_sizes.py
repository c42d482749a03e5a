"""Modules, functions and signatures stay small enough to be read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import glmq

PACKAGE = Path(glmq.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LONG_MODULES = {"checkpoint/ascend.py", "codec/container.py", "codec/codec.py"}
"""One subject each, told in one file: a format, a codec."""
MODULE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8
COMMANDS = {
    f"cli/{verb}.py": verb
    for verb in ("ask", "calibrate", "quantize", "sweep", "compress", "inspect", "verify", "demo")
}
"""Typer reads a command's options from its signature."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_modules_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > MODULE_LINES and name not in LONG_MODULES} == {}


def test_functions_are_short_and_take_few_parameters() -> None:
    assert [sentence for name in MODULES for sentence in large_functions(name)] == []


def large_functions(name: str) -> Iterator[str]:
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
        if lines > FUNCTION_LINES:
            yield f"{name}: {function.name} has {lines} lines without its docstring"
        if len(parameters) > PARAMETERS:
            yield f"{name}: {function.name} takes {len(parameters)} parameters"
