"""docs/api.md is what the public functions and records say of themselves.

`python tests/test_api_reference.py` writes it anew.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from pathlib import Path

import glmq
from glmq import errors

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Python API

Drawn from the docstrings of what `import glmq` offers. How it is used: [glmq as a library](library.md).
"""
GROUPS = (("Functions", inspect.isfunction), ("Records and options", inspect.isclass))


def draw() -> str:
    names = sorted(name for name in glmq.__all__ if not name.startswith("_"))
    text = HEAD
    for title, belongs in GROUPS:
        text += f"\n## {title}\n"
        for name in names:
            value = getattr(glmq, name)
            if belongs(value) and not issubclass(value if inspect.isclass(value) else object, errors.GlmqError):
                text += _entry(name, value)
    return text + "\n## Errors\n\nIn `glmq.errors`, with their codes: [errors](errors.md).\n"


def _entry(name: str, value: object) -> str:
    text = f"\n### glmq.{name}\n\n"
    if inspect.isfunction(value):
        text += f"```python\n{_signature(name, value)}\n```\n\n"
    text += _markdown(inspect.getdoc(value) or "") + "\n"
    if dataclasses.is_dataclass(value):
        text += "\n| field | type | |\n|---|---|---|\n"
        comments = _comments(inspect.getsource(value))
        for field in dataclasses.fields(value):
            kind = str(field.type).replace("|", "\\|")
            text += f"| `{field.name}` | `{kind}` | {comments.get(field.name, '')} |\n"
    for method_name, method in vars(value).items() if inspect.isclass(value) else ():
        function = method.__func__ if isinstance(method, classmethod) else method
        if method_name.startswith("_") or isinstance(value, enum.EnumMeta) or not inspect.getdoc(function):
            continue
        if isinstance(method, classmethod) or inspect.isfunction(method):
            text += f"\n```python\n{_signature(f'{name}.{method_name}', function)}\n```\n\n"
            text += f"{_markdown(inspect.getdoc(function) or '')}\n"
        elif isinstance(method, property):
            text += f"\n`{name}.{method_name}`: {_markdown(inspect.getdoc(method) or '')}\n"
    return text


def _signature(name: str, function: object) -> str:
    """The call with one parameter a line; what a record is by default is left to its own entry."""
    signature = inspect.signature(function)
    lines = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        text = f"    {parameter.name}: {parameter.annotation}"
        if parameter.default is not inspect.Parameter.empty:
            is_record = dataclasses.is_dataclass(parameter.default)
            text += f" = {type(parameter.default).__name__ + '()' if is_record else repr(parameter.default)}"
        lines.append(f"{text},\n")
    inner = f"\n{''.join(lines)}" if lines else ""
    return f"{name}({inner}) -> {signature.return_annotation}"


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists and its examples as blocks."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\n", doc):
        head, _, rest = paragraph.partition("\n")
        if head in ("Args:", "Raises:", "Returns:", "Yields:"):
            lines.append(f"**{head.removesuffix(':')}**\n")
            items = re.sub(r"\n {8,}", " ", rest)
            lines += [re.sub(r"^ +(\*{0,2}[\w, ]+): ", r"- `\1`: ", item).strip() for item in items.splitlines()]
            lines.append("")
        elif head.startswith(">>>"):
            lines.append(f"```python\n{paragraph}\n```\n")
        else:
            lines.append(f"{paragraph}\n")
    return "\n".join(lines).strip()


def _comments(source: str) -> dict[str, str]:
    """The sentence under each field."""
    found = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', source, flags=re.M | re.S)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in found}


def test_the_python_reference_is_what_the_docstrings_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == draw(), "run: python tests/test_api_reference.py"


if __name__ == "__main__":
    DOCUMENT.write_text(draw(), encoding="utf-8")
