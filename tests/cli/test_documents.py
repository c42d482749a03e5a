"""Every shell block of the documents is shell, and every `glmq` in them is a command that parses."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from glmq.cli.app import app

ROOT = Path(__file__).parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
DOCUMENTS = [README, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_BLOCK = re.compile(r'^```shell(?: title="([^"]*)")?\n(.*?)^```', flags=re.M | re.S)


def blocks() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        found = SHELL_BLOCK.findall(document.read_text(encoding="utf-8"))
        name = document.relative_to(ROOT)
        yield from ((f"{name}:{index}", block) for index, (_, block) in enumerate(found))


BLOCKS = dict(blocks())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_shell_and_its_commands_parse(name: str) -> None:
    # {float weights} is what a reader puts in; {"image": 1} is JSON.
    block = re.sub(r"\{([A-Za-z0-9_ -]+)\}", lambda found: found[1].replace(" ", "_"), BLOCKS[name]).replace(
        "...", "--help"
    )
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True)
            if words[:1] == ["glmq"] and "--help" not in words:
                parse(words[1:])


def parse(words: list[str]) -> None:
    """Raises what a user would see for an option or value that is none."""
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    command.make_context(words[0], words[1:])


def test_the_chinese_readme_has_the_headings_and_commands_of_the_english_one() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, CHINESE))
    depths = [[len(depth) for depth in re.findall(r"^(#+) ", text, flags=re.M)] for text in (english, chinese)]
    assert depths[0] == depths[1]
    assert SHELL_BLOCK.findall(english) == SHELL_BLOCK.findall(chinese)
    rows = [len(re.findall(r"^\|", text, flags=re.M)) for text in (english, chinese)]
    assert rows[0] == rows[1]


def test_the_readme_can_be_read_in_one_sitting() -> None:
    for path in (README, CHINESE):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name
