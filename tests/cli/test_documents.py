"""The documents hold what a reader can do: shell blocks run on a small model, links lead somewhere, languages agree.

A block whose fence has a title, like ```` ```shell title="with an NPU" ````, needs what tests do not have; it is parsed alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from cli.command_line import commands, glmq
from helpers import W8A8S, calibrate, quantize

from glmq.cli.console import stdout

ROOT = Path(__file__).parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
DOCUMENTS = [README, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
"""Documents without commands."""
RECIPES = re.compile(r"^```toml\n(.*?)^```", flags=re.M | re.S)
SHELL_BLOCK = re.compile(r'^```shell(?: title="([^"]*)")?\n(.*?)^```', flags=re.M | re.S)
NEEDS = {"with an NPU", "with several NPUs", "with vLLM", "with a network", "with Docker", "on the serving machine"}
"""The titles that blocks may have: what a reader must have, and a test has not."""
OWN_FOLDERS = ("float weights", "folder of images", "statistics", "W8A8 weights", "W8A8S weights")
"""What is in the kitchen before the first command."""
PLACEHOLDERS: Final = {name: name.replace(" ", "_") for name in OWN_FOLDERS} | {
    "TP": "1",
    "W8A8SC weights": "W8A8SC_weights",
    "W8A8_DYNAMIC weights": "W8A8_DYNAMIC_weights",
    "W4A8_DYNAMIC weights": "W4A8_DYNAMIC_weights",
    "statistics with text inputs": "statistics_with_text_inputs",
    "weights": "W8A8_weights",
    "packed weights": "packed_weights",
    "unpacked weights": "unpacked_weights",
}
"""What a reader puts in, as it is called here."""


@dataclass(frozen=True)
class Block:
    document: Path
    title: str
    """What it needs; empty: nothing that a test has not."""
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each `glmq` command, without `glmq`; redirections as they are."""
        for line in _filled(self.text).replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split, words.commenters = True, "#"
            command: list[str] = []
            for word in [*words, ";"]:
                if word in ("&&", ";", "|", "||"):
                    yield from _arguments(command)
                    command = []
                else:
                    command.append(word)


def _filled(text: str) -> str:
    """A block with its placeholders filled; {"image": 1} is JSON and none."""
    return re.sub(r"\{([A-Za-z0-9_ -]+)\}", lambda found: PLACEHOLDERS.get(found[1], "other"), text).replace(
        "...", "--help"
    )


def _arguments(command: list[str]) -> Iterator[list[str]]:
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[:1] == ["torchrun"] and "glmq" in words:
        words = words[words.index("glmq") :]
    if words[:1] == ["glmq"] and "--help" not in words:
        yield words[1:]


def _blocks() -> Iterator[tuple[str, Block]]:
    for document in DOCUMENTS:
        for number, (title, text) in enumerate(SHELL_BLOCK.findall(document.read_text(encoding="utf-8"))):
            yield f"{document.relative_to(ROOT)}:{number}", Block(document, title, text)


BLOCKS = dict(_blocks())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_shell_and_its_commands_parse(name: str) -> None:
    block = BLOCKS[name]
    assert block.title in {"", *NEEDS}
    subprocess.run(["bash", "-n"], input=_filled(block.text), text=True, check=True)
    for words in block.commands():
        if not _runs(block, words):
            _parse(words)


def _runs(block: Block, words: list[str]) -> bool:
    """Whether the embedded model and this machine are enough."""
    return not block.title and words[0] not in ("demo", "doctor") and "vllm" not in words


def _parse(words: list[str]) -> None:
    """Raises what a user would see for an option or value that is none."""
    commands().commands[words[0]].make_context(words[0], words[1:])


@pytest.fixture(scope="module")
def kitchen(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the blocks run, with what a reader has: weights, pictures, and what earlier steps wrote."""
    folder = tmp_path_factory.mktemp("documents")
    images = folder / PLACEHOLDERS["folder of images"]
    images.mkdir()
    for picture in sorted(pictures.iterdir())[:2]:
        (images / picture.name).symlink_to(picture)
    (folder / PLACEHOLDERS["float weights"]).symlink_to(small)
    stats = calibrate(small, folder / PLACEHOLDERS["statistics"], images, texts=False)
    quantize(small, stats, folder / PLACEHOLDERS["weights"])
    quantize(small, stats, folder / PLACEHOLDERS["W8A8S weights"], **W8A8S)
    (recipes,) = RECIPES.findall((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))
    (folder / "recipes.toml").write_text(recipes, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_blocks_run_on_a_small_model(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command once, however often the documents name it: they share what the first has written."""
    monkeypatch.chdir(kitchen)
    images = kitchen / PLACEHOLDERS["folder of images"]
    monkeypatch.setattr("glmq.jobs.calibrate.default_images", lambda: images)  # not the thirty that come with glmq
    monkeypatch.setattr("glmq.jobs.side_by_side.CAPTION_TOKENS", 2)
    done: set[str] = set()
    for block in BLOCKS.values():
        for words in block.commands():
            if _runs(block, words) and shlex.join(words) not in done:
                done.add(shlex.join(words))
                _run(words)
    assert len(done) > 5


def _run(words: list[str]) -> None:
    """Run a command; what it writes replaces what an earlier block has written to the same place."""
    into = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if into else words
    writes = words[0] in ("calibrate", "quantize", "sweep", "compress") and "--overwrite" not in words
    talks = words[0] == "ask" and "--max-new-tokens" not in words  # random weights know no end
    result = glmq(*words, *(["--overwrite"] if writes else []), *(["--max-new-tokens", 4] if talks else []))
    if into:
        Path(into).write_text(result.stdout, encoding="utf-8")


def test_the_chinese_readme_has_the_headings_and_commands_of_the_english_one() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, CHINESE))
    depths = [[len(depth) for depth in re.findall(r"^(#+) ", text, flags=re.M)] for text in (english, chinese)]
    assert depths[0] == depths[1]
    assert SHELL_BLOCK.findall(english) == SHELL_BLOCK.findall(chinese)
    rows = [len(re.findall(r"^\|", text, flags=re.M)) for text in (english, chinese)]
    assert rows[0] == rows[1]


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*DOCUMENTS, *OTHERS]:
        for path, anchor in _links(document):
            assert path.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in _anchors(path), f"{document.name}: {path}#{anchor}"


def test_every_document_is_reached_from_the_readme() -> None:
    seen, todo = set[Path](), [README]
    while todo:
        document = todo.pop()
        if document not in seen:
            seen.add(document)
            todo += [path for path, _ in _links(document) if path.suffix == ".md"]
    assert {str(path.relative_to(ROOT)) for path in {*DOCUMENTS, *OTHERS} - seen} == set()


def _links(document: Path) -> Iterator[tuple[Path, str]]:
    """The files that a document leads to, each with the anchor there."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<a href="([^"]+)"', text):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            yield (document.parent / path).resolve() if path else document, anchor


def _anchors(document: Path) -> set[str]:
    """As GitHub and mkdocs name headings of plain words."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_readme_shows_what_step_1_prints(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and sentences, on a terminal of 80 columns; the numbers are those of the whole embedded model."""
    monkeypatch.chdir(kitchen)
    monkeypatch.setattr(stdout, "_width", 80)
    (sample,) = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert sample in CHINESE.read_text(encoding="utf-8")
    (step,) = (
        words for block in BLOCKS.values() if block.document == README for words in block.commands() if "m2" in words
    )
    here = {"npu": "cpu", "--calib_images": "--stats", PLACEHOLDERS["folder of images"]: PLACEHOLDERS["statistics"]}
    said = _shape(glmq(*(here.get(word, word) for word in step), "--overwrite").stdout)
    for part in sample.split("...\n"):
        assert _shape(_filled(part)) in said


def _shape(text: str) -> str:
    """What is printed, whatever its numbers and wherever its lines break."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "0", text.replace("\u2500", "")).split())


def test_the_readme_can_be_read_in_one_sitting() -> None:
    for path in (README, CHINESE):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name
