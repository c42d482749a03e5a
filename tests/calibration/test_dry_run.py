"""What `glmq calibrate --dry-run` foretells, against what a run does."""

import json
import re
from pathlib import Path

import pytest
from helpers import glmq, run
from PIL import Image


def sizes_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture(scope="module")
def lines(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with an answer, a text that is shorter than the tokens kept of it, and a wide picture."""
    folder = tmp_path_factory.mktemp("lines")
    Image.open(pictures / "03.png").save(folder / "a.png")
    Image.open(pictures / "05.png").resize((168, 84)).save(folder / "wide.png")
    rows = [{"image": "a.png", "prompt": "What?", "text": "A circle."}, {"text": "Short."}, {"image": "wide.png"}]
    (folder / "s.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "s.jsonl"


@pytest.mark.parametrize("options", [[], ["--wide-moments"], ["--limit", 2, "--compute-dtype", "bf16"]])
def test_the_files_and_their_sizes_are_foretold_to_the_byte(
    options: list[object], small: Path, lines: Path, tmp_path: Path
) -> None:
    command = ["calibrate", "--model-path", small, "--stats", tmp_path / "stats", "--calib-samples", lines, *options]
    found = json.loads(glmq(*command, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    glmq(*command)
    sizes = sizes_in(tmp_path / "stats")
    assert {file["name"]: file["bytes"] for file in found["files"]} == sizes
    assert found["output_bytes"] == sum(sizes.values())
    manifest = json.loads((tmp_path / "stats" / "statistics.json").read_text())
    assert [s["tokens"] for s in found["samples"]] == [s["tokens"] for s in manifest["samples"]]
    assert found["seconds"] > 0
    assert 0 < found["peak_bytes"] < found["available_bytes"]


def test_texts_alone_leave_the_vision_towers_files_out(small: Path, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "Permission is hereby granted."}))
    command = [
        "calibrate",
        "--model-path",
        small,
        "--stats",
        tmp_path / "stats",
        "--calib-samples",
        tmp_path / "s.jsonl",
    ]
    found = json.loads(glmq(*command, "--dry-run", "--json").stdout)
    glmq(*command)
    assert {file["name"]: file["bytes"] for file in found["files"]} == sizes_in(tmp_path / "stats")


def test_the_screen_shows_tokens_disk_memory_and_time(small: Path, pictures: Path, tmp_path: Path) -> None:
    options = ["--model-path", small, "--stats", tmp_path / "stats", "--calib-images", pictures, "--limit", 2]
    shown = glmq("calibrate", *options, "--dry-run").stdout.splitlines()
    assert shown[0].strip() == "Calibration samples"
    size, minutes = r"\d+(\.\d+)? \w+", r"\d+\.\d minutes"
    for line, wanted in zip(
        shown[-4:],
        [
            r"statistics: \d+ bytes in 6 files",
            rf"disk: {size} statistics, {size} beside them while it runs, {size} free",
            rf"memory: about {size} resident at most, {size} available",
            rf"time: about {minutes} on this machine as it is now; one sample went through one block",
        ],
        strict=True,
    ):
        assert re.fullmatch(wanted, line)


def test_a_disk_without_room_is_refused_before_the_first_block(
    small: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["calibrate", "--model-path", small, "--stats", tmp_path / "stats", "--calib-samples", lines]
    plan = json.loads(glmq(*command, "--dry-run", "--json").stdout)
    needed = plan["output_bytes"] + plan["work_bytes"]
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: needed - 1)
    result = run(*command)
    assert result.exit_code == 5
    assert f"{needed} bytes are to be written, but its disk has {needed - 1} free" in result.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: needed)
    glmq(*command)


def test_answers_that_the_model_will_write_are_foretold_at_their_longest(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    options = ["--model-path", small, "--calib-images", pictures, "--limit", 2, "--generate", 4, "--stats"]
    command = ["calibrate", *options, tmp_path / "stats"]
    found = json.loads(glmq(*command, "--dry-run", "--json").stdout)
    assert re.search(r"^statistics: at most \d+ bytes in 6 files$", glmq(*command, "--dry-run").stdout, re.MULTILINE)
    glmq(*command)
    sizes = sizes_in(tmp_path / "stats")
    # The random model never stops, so tokens are the most; the texts of its answers are shorter than allowed for.
    assert {file["name"]: file["bytes"] for file in found["files"]} == sizes | {
        "statistics.json": pytest.approx(sizes["statistics.json"], rel=0.2)
    }
    assert found["output_bytes"] >= sum(sizes.values())
