"""The map in docs/architecture.md is the tree: every module has a line, which is the first sentence of its own docstring.

`python tests/test_architecture.py` writes the map into it.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
SOURCES = ROOT / "glmq"
ROOMS = (
    "codec", "numerics", "checkpoint", "model", "calibration", "quantization", "compression", "inspection", "verification",
    "serve", "reporting", "jobs", "cli",
)  # fmt: skip
"""From the top of the house to the shell."""
BEGIN, END = "<!-- map -->\n```\n", "```\n<!-- end of map -->"
COLUMN = 24
"""Where the sentences begin."""


def first_sentence(path: Path) -> str:
    """What a module says that it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = re.match(r'(?:#.*\n)*(r?""".*?""")', text, flags=re.DOTALL)  # to parse all of it takes long
        text = inspect.cleandoc(ast.literal_eval(docstring[1])) if docstring else ""
    else:
        text = re.sub(r"^ ?\* ?", "", text.partition("/*")[2].partition("*/")[0], flags=re.MULTILINE)
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].removesuffix(".")


def line(indent: int, name: str, sentence: str) -> str:
    return f"{' ' * indent}{name:<{COLUMN - indent}} {sentence}\n"


def draw(folder: Path, indent: int) -> str:
    """The lines of the modules in a folder, then those of its folders."""
    files = sorted(
        p for p in folder.iterdir() if p.suffix in (".py", ".c", ".h") and p.name not in ("__init__.py", "__main__.py")
    )
    text = "".join(line(indent, path.name, first_sentence(path)) for path in files)
    inner = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    order = [SOURCES / room for room in ROOMS] if folder == SOURCES else sorted(inner)
    assert sorted(order) == sorted(inner)
    for room in order:
        text += line(indent, f"{room.name}/", first_sentence(room / "__init__.py")) + draw(room, indent + 2)
    return text


def draw_map() -> str:
    return line(0, "glmq/", first_sentence(SOURCES / "__init__.py")) + draw(SOURCES, 2)


def test_the_map_is_the_tree() -> None:
    written = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == draw_map()


def test_every_module_says_what_it_is_in_one_sentence() -> None:
    for row in draw_map().splitlines():
        name, _, sentence = row.strip().partition(" ")
        assert sentence.strip(), name
        assert len(row) <= 170, row


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^  "(glmq[.\w]*)",$', text.partition("packages = [")[2].partition("]")[0], re.MULTILINE)
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES.rglob("__init__.py")}
    assert set(listed) == found | {"glmq.calibImages"}


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    if not rest:
        sys.exit(f"{DOCUMENT}: has no {BEGIN!r}")
    DOCUMENT.write_text(before + BEGIN + draw_map() + END + rest.partition(END)[2], encoding="utf-8")
