"""docs/api.md is what the public functions and records say of themselves.

`python tests/test_api_reference.py` writes it anew.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import operator
import re
from importlib import import_module
from pathlib import Path

import glmq
from glmq import errors

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Python API

Drawn from the docstrings of what `import glmq` offers. How it is used: [glmq as a library](library.md).
"""


def is_class(value: object) -> bool:
    """As inspect.isclass, which Python 3.10 says of `dict[str, int]` too."""
    return issubclass(type(value), type)


def is_record(value: object) -> bool:
    return is_class(value) and not issubclass(value, (enum.Enum, errors.GlmqError))  # type: ignore[arg-type]


def is_enum(value: object) -> bool:
    return isinstance(value, enum.EnumMeta)


def is_alias(value: object) -> bool:
    return not (is_class(value) or inspect.isfunction(value) or inspect.ismodule(value))


GROUPS = (
    ("Functions", inspect.isfunction),
    ("Records and options", is_record),
    ("Enums", is_enum),
    ("Names of types", is_alias),
)


def draw() -> str:
    names = sorted(name for name in glmq.__all__ if not name.startswith("_"))
    text = HEAD
    for title, belongs in GROUPS:
        text += f"\n## {title}\n"
        for name in names:
            value = getattr(glmq, name)
            if belongs(value):
                text += _entry(name, value)
    return text + "\n## Errors\n\nIn `glmq.errors`, with their codes: [errors](errors.md).\n"


def _entry(name: str, value: object) -> str:
    text = f"\n### glmq.{name}\n\n"
    if is_alias(value):
        return text + _alias(name)
    if inspect.isfunction(value):
        text += f"```python\n{_signature(name, value)}\n```\n\n"
    text += _markdown(inspect.getdoc(value) or "") + "\n"
    if dataclasses.is_dataclass(value):
        text += "\n| field | type | |\n|---|---|---|\n"
        comments = _comments(inspect.getsource(value))
        for field in dataclasses.fields(value):
            kind = _kind(field).replace("|", "\\|")
            text += f"| `{field.name}` | `{kind}` | {comments.get(field.name, '')} |\n"
    if isinstance(value, enum.EnumMeta):
        text += "\n| member | value | |\n|---|---|---|\n"
        comments = _comments(inspect.getsource(value))
        for member in value:
            text += f"| `{name}.{member.name}` | {_value(member.value)} | {comments.get(member.name, '')} |\n"
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


def _kind(field: dataclasses.Field[object]) -> str:
    """A field's type as its source has it, whether Python keeps that as text or as the type itself."""
    return field.type.__name__ if isinstance(field.type, type) else field.type


def _alias(name: str) -> str:
    """What the source says that a name of a type stands for, and the sentence under it."""
    source = Path(str(import_module(glmq._HOME[name]).__file__)).read_text(encoding="utf-8")
    found = re.search(rf'^{name}: TypeAlias = ([^\n]+)\n(?:"""(.*?)""")?', source, flags=re.M | re.S)
    assert found is not None, name
    meaning, sentence = found[1].strip('"'), " ".join((found[2] or "").split())
    return f"```python\n{name} = {meaning}\n```\n" + (f"\n{sentence}\n" if sentence else "")


def _value(value: object) -> str:
    """The value of a member of an enum: as Python spells it, and of several, what they say."""
    return "<br>".join(map(str, value)) if isinstance(value, tuple) else f"`{value!r}`"


def _signature(name: str, function: object) -> str:
    """The call with one parameter a line; what a record is by default is left to its own entry."""
    signature = inspect.signature(function)
    lines = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "    *,\n" not in lines:
            lines.append("    *,\n")
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
    """The sentence under each field, or member of an enum."""
    found = re.findall(r'^    (\w+)(?::| =) [^\n]+\n    """(.*?)"""', source, flags=re.M | re.S)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in found}


def blocks(text: str) -> list[str]:
    """The Python of the page but for the examples, which test_api.py runs."""
    return [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if not block.startswith(">>>")]


def test_what_the_page_shows_is_python_that_calls_as_the_functions_do() -> None:
    for block in blocks(draw()):
        name, bracket, rest = block.partition("(")
        if not bracket or "=" in name:
            ast.parse(block)  # a name of a type
            continue
        (shown,) = ast.parse(f"def shown({rest.rstrip()}: ...").body
        assert isinstance(shown, ast.FunctionDef)
        function = operator.attrgetter(name)(glmq)
        parameters = inspect.signature(function).parameters.values()
        by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert [argument.arg for argument in shown.args.args] == by_place
        assert [argument.arg for argument in shown.args.kwonlyargs] == by_name


def test_every_type_of_a_parameter_and_of_a_field_is_public() -> None:
    kinds = []
    for name in glmq.__all__:
        value = getattr(glmq, name)
        if inspect.isfunction(value):
            kinds += [str(kind) for kind in value.__annotations__.values()]
        elif dataclasses.is_dataclass(value):
            kinds += map(_kind, dataclasses.fields(value))
    kinds += blocks(draw().partition("## Names of types")[2])
    words = {word for kind in kinds for word in re.findall(r"\b[A-Z]\w+", kind)}
    assert {"Engine", "Watch", "Path"} <= words
    assert words - set(glmq.__all__) == {"Callable", "Literal", "Mapping", "None", "Path", "Sequence"}


def test_the_python_reference_is_what_the_docstrings_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == draw(), "run: python tests/test_api_reference.py"


if __name__ == "__main__":
    DOCUMENT.write_text(draw(), encoding="utf-8")
