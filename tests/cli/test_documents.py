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
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        found = re.findall(r"^```shell\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S)
        yield from ((f"{document.name}:{index}", block) for index, block in enumerate(found))


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
