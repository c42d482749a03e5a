import errno
import json
import os
from pathlib import Path

import pytest
import xxhash

from glmq.checkpoint.journal import NAME, Journal
from glmq.checkpoint.run_note import RunNote, write_note
from glmq.errors import ResumeError, SpaceError, UsageError

SETTINGS = {"model": "ab", "--format": "W8A8S"}


def finished(folder: Path, *blocks: str) -> Path:
    """The journal of a run that has finished these blocks."""
    journal = Journal(folder, SETTINGS)
    for number, block in enumerate(blocks):
        journal.record(block, {"number": number})
    return folder / NAME


def test_the_first_line_is_the_settings_and_each_block_adds_one(tmp_path: Path) -> None:
    path = finished(tmp_path, "a", "b")
    lines = [SETTINGS, {"block": "a", "number": 0}, {"block": "b", "number": 1}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        line | {"xxh3": xxhash.xxh3_128_hexdigest(json.dumps(line).encode())} for line in lines
    ]
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_run_finds_the_finished_blocks_in_order(tmp_path: Path) -> None:
    finished(tmp_path, "b", "a")
    journal = Journal(tmp_path, SETTINGS)
    assert list(journal.finished.items()) == [
        ("b", {"block": "b", "number": 0}), ("a", {"block": "a", "number": 1}),
    ]  # fmt: skip
    journal.record("c", {"number": 2})
    assert list(Journal(tmp_path, SETTINGS).finished) == ["b", "a", "c"]


@pytest.mark.parametrize("cut", range(1, 73))
def test_a_torn_last_line_counts_as_absent_and_does_not_spoil_the_next(cut: int, tmp_path: Path) -> None:
    path = finished(tmp_path, "a", "b")
    whole = path.read_bytes()
    assert len(whole.splitlines(keepends=True)[-1]) == 72
    path.write_bytes(whole[:-cut])
    journal = Journal(tmp_path, SETTINGS)
    # Only the line feed is missing after a cut of one byte: the line itself is whole.
    assert list(journal.finished) == (["a", "b"] if cut == 1 else ["a"])
    journal.record("c", {})
    assert list(Journal(tmp_path, SETTINGS).finished) == [*journal.finished]


@pytest.mark.parametrize(
    "garbage", [b"\x00\x00\x00\n", b"[1]\n", b"\xff\xfe\n", b"nonsense", b"{}\n", b"[" * 9999, b"9" * 9999]
)
def test_nothing_is_trusted_after_a_line_that_is_no_block(garbage: bytes, tmp_path: Path) -> None:
    path = finished(tmp_path, "a")
    path.write_bytes(path.read_bytes() + garbage + b'{"block": "b"}\n')
    assert list(Journal(tmp_path, SETTINGS).finished) == ["a"]


@pytest.mark.parametrize(("place", "left"), [(10, []), (100, []), (160, ["a"]), (190, ["a"])])
def test_an_altered_line_and_all_after_it_count_as_absent(place: int, left: list[str], tmp_path: Path) -> None:
    path = finished(tmp_path, "a", "b", "c")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert list(Journal(tmp_path, SETTINGS).finished) == left


def test_a_line_whose_checksum_is_gone_counts_as_absent(tmp_path: Path) -> None:
    path = finished(tmp_path, "a", "b")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"xxh3"', '"xxh2"')]))
    assert list(Journal(tmp_path, SETTINGS).finished) == ["a"]
    path.write_text("".join([lines[0].replace('"xxh3"', '"xxh2"'), *lines[1:]]))
    assert list(Journal(tmp_path, SETTINGS).finished) == []


def test_blocks_that_are_dropped_are_to_be_done_again(tmp_path: Path) -> None:
    finished(tmp_path, "a", "b", "c")
    Journal(tmp_path, SETTINGS).drop(["b", "c"])
    assert list(Journal(tmp_path, SETTINGS).finished) == ["a"]


OPTIONS = {"--model_path": "a", "--calib_images": "photos", "--limit": "", "--texts": "True"}


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"model": "ab"}, {}, "the unfinished run in {} had --format W8A8S, this one has no --format"),
        (
            {"model": "ab", "--format": "W8A8S", "threads": "2", "--use_sigma": "True"}, {},
            "the unfinished run in {} had no --use_sigma, no threads, this one has --use_sigma True, threads 2",
        ),
        (
            {"model": "ab", "--format": "x" * 61}, {},
            f"the unfinished run in {{}} had --format W8A8S, this one has --format {'x' * 57}...",
        ),
        (
            {"model": "cd", "--format": "W8A8S"}, {"--model_path": "b"},
            "the unfinished run in {} had --model_path a, this one has --model_path b",
        ),
        (
            {"model": "ab", "--format": "W8A8S", "samples": "2"}, {"--limit": "4", "--texts": "False"},
            "the unfinished run in {} had --texts, no --limit, this one has --no-texts, --limit 4",
        ),
        ({"model": "cd", "--format": "W8A8S"}, {}, "the float weights are not those of the unfinished run in {}"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_option_with_both_values(
    settings: dict[str, str], options: dict[str, str], told: str, tmp_path: Path
) -> None:
    path = finished(tmp_path, "a")
    write_note(tmp_path, RunNote("quantize", "", OPTIONS), tmp_path / "out", [])
    before = path.read_bytes()
    with pytest.raises(ResumeError) as caught:
        Journal(tmp_path, settings, options=OPTIONS | options)
    assert str(caught.value) == f"--resume: {told.format(tmp_path)}; run with the same, or start again with --overwrite"
    assert path.read_bytes() == before


def test_a_journal_that_does_not_write_reads_and_remembers(tmp_path: Path) -> None:
    path = finished(tmp_path, "a")
    path.write_bytes(path.read_bytes() + b"torn")
    before = path.read_bytes()
    journal = Journal(tmp_path, SETTINGS, writes=False)
    journal.record("b", {"number": 1})
    assert list(journal.finished) == ["a", "b"]
    assert path.read_bytes() == before
    with pytest.raises(UsageError):
        Journal(tmp_path, {}, writes=False)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EIO, OSError)]
)
def test_a_block_counts_only_if_its_line_is_on_the_disk(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path, "a")
    journal = Journal(tmp_path, SETTINGS)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error) as caught:
        journal.record("b", {})
    if error is SpaceError:
        met = "your quota on its disk is used up" if number == errno.EDQUOT else "its disk takes no more, with "
        assert str(caught.value).startswith(f"{path}: 59 bytes are to be written, but {met}")
    assert list(journal.finished) == ["a"]
