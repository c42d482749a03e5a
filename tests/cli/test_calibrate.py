"""`glmq calibrate` as its users call it."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.command_line import glmq, run
from helpers import tree

from glmq.calibration.samples import default_images
from glmq.calibration.stats import Statistics
from glmq.errors import UsageError
from glmq.jobs.calibrate import calibrate
from glmq.jobs.calibration_options import CalibrationOptions


def command(model: Path, stats: Path, *options: object) -> list[object]:
    return ["calibrate", "--model-path", model, "--stats", stats, "--no-texts", *options]


def test_the_screen_shows_tokens_and_the_next_command(small: Path, pictures: Path, tmp_path: Path) -> None:
    stats = tmp_path / "the stats"
    result = glmq(*command(small, stats, "--calib-images", pictures, "--limit", 2))
    lines = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == "Calibration samples"
    assert [line.split() for line in lines[3:6]] == [
        ["00.png", "38", "no"],
        ["01.png", "38", "no"],
        ["2", "samples", "76"],
    ]
    assert re.fullmatch(rf"Statistics written to {stats} in [\d.]+ (s|min)", lines[6])
    assert re.fullmatch(r"  size: \d\.\d MiB", lines[7])
    assert lines[8:] == [
        "  statistics: settled for dense 8-bit weights; for sparse and 4-bit ones more images would help, -v says what moved",
        "  answers: 2 samples have none; most of what a thinking model computes is its answer, "
        "and --generate 256 lets the model write one",
        f"Next: glmq quantize --model_path {small} --stats '{stats}' --save_directory ...",
    ]
    note, *progress = result.stderr.splitlines()
    assert note == "note: 2 calibration images; 30 are wanted for accuracy"
    assert progress[0][9:].startswith("calibrate (pass 1 of 1): 5 blocks")
    assert re.fullmatch(r"\d\d:\d\d:\d\d calibrate: [\d.]+ (s|min), peak \d+ MiB resident", progress[-1])


def test_with_v_the_screen_says_what_has_not_settled_and_where_the_time_went(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    result = glmq(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 2, "-v"))
    assert "\n    settled for dense 8-bit weights: against half of the samples, ranges changed by " in result.stdout
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d calibrate, of these: ([a-z]+ [\d.]+ (s|min)( \([\d.]+ \w+/s\))?, )+other [\d.]+ (s|min)",
        result.stderr.splitlines()[-1],
    )


def test_a_dry_run_shows_tokens_disk_memory_and_time(small: Path, pictures: Path, tmp_path: Path) -> None:
    options = ["--model-path", small, "--stats", tmp_path / "stats", "--calib-images", pictures, "--limit", 2]
    result = glmq("calibrate", *options, "--dry-run")
    assert result.stderr == "note: 2 calibration images; 30 are wanted for accuracy\n"
    shown = result.stdout.splitlines()
    assert shown[0].strip() == "Calibration samples"
    size, minutes = r"\d+(\.\d+)? \w+", r"\d+(\.\d)? (s|min)"
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


def test_large_pictures_are_said_before_anything_runs(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.jobs.notes.LARGE_PICTURE", 10)
    result = glmq(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 2, "--dry-run"))
    assert "note: 2 large pictures of up to 64 patches, whose attention takes time with their square; " in result.stderr


def test_a_dry_run_with_answers_by_the_model_says_at_most(small: Path, pictures: Path, tmp_path: Path) -> None:
    options = ["--calib-images", pictures, "--limit", 2, "--generate", 4]
    shown = glmq(*command(small, tmp_path / "stats", *options, "--dry-run")).stdout
    assert re.search(r"^statistics: at most \d+ bytes in 6 files$", shown, re.MULTILINE)


def test_the_json_of_a_dry_run_is_the_librarys_forecast(small: Path, pictures: Path, tmp_path: Path) -> None:
    stats, options = tmp_path / "stats", ["--calib-images", pictures, "--limit", 2]
    found = json.loads(glmq(*command(small, stats, *options, "--dry-run", "--json")).stdout)
    chosen = CalibrationOptions(images=pictures, limit=2, texts=False)
    plan = calibrate(small, out=stats, options=chosen, dry_run=True).plan
    assert list(tmp_path.iterdir()) == []
    assert found["samples"] == [asdict(sample) for sample in plan.samples]
    assert {file["name"]: file["bytes"] for file in found["files"]} == dict(plan.files)
    for name in ("output_bytes", "work_bytes", "peak_bytes"):
        assert found[name] == getattr(plan, name)
    assert found["seconds"] > 0
    assert 0 < found["peak_bytes"] < found["available_bytes"]
    assert 0 < found["output_bytes"] < found["free_bytes"]


@pytest.mark.slow
def test_underscores_are_the_same_command(small: Path, pictures: Path, tmp_path: Path) -> None:
    for name, dash in (("one", "-"), ("two", "_")):
        options = [f"--model{dash}path", small, f"--calib{dash}images", pictures, f"--device{dash}type", "cpu"]
        glmq("calibrate", *options, "--stats", tmp_path / name, "--limit", 1, f"--skip{dash}bad{dash}images")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_order_in_which_a_folder_lists_its_images_changes_nothing(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    for name, order in (("one", 1), ("two", -1)):
        (tmp_path / name).mkdir()
        for picture in sorted(pictures.glob("0[0-3].png"))[::order]:
            shutil.copy(picture, tmp_path / name)
        glmq(*command(small, tmp_path / f"stats {name}", "--calib-images", tmp_path / name))
    assert tree(tmp_path / "stats one") == tree(tmp_path / "stats two")


def test_json_is_the_manifest_and_the_folder(small: Path, pictures: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    result = glmq(*command(small, stats, "--calib-images", pictures, "--limit", 1, "--json"))
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.pop("folder") == str(stats)
    (done,) = found.pop("passes")
    times = {stage["stage"]: stage for stage in done["stages"]}
    assert set(times) == {"read", "images", "vision", "forward", "statistics", "write"}
    layers = 2 * (128 * 64 + 64 * 64 + 3 * 96 * 64)  # q, k, v; o; gate, up and down
    tokens = [sample["tokens"] for sample in found["samples"]]
    attention = 2 * 4 * 64  # two layers; scores and their products with the values, all heads together
    assert times["forward"]["flops"] == sum(2 * n * layers + n * n * attention for n in tokens)
    assert done["seconds"] <= found.pop("seconds")
    assert found.pop("settled") is None
    assert found.pop("schema") == "glmq.calibrate/1"
    assert {"schema": "glmq.statistics/2", **found} == json.loads((stats / "statistics.json").read_text())


def test_quiet_prints_the_folder_and_nothing_else(small: Path, pictures: Path, tmp_path: Path) -> None:
    result = glmq(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 1, "-q"))
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'stats'}\n", "")


def test_samples_of_a_file_follow_the_images(small: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"prompt": "Why?", "text": "Because."}\n{"text": "Permission is granted."}\n')
    stats = tmp_path / "stats"
    glmq(*command(small, stats, "--calib-images", pictures, "--calib-samples", tmp_path / "s.jsonl", "--limit", 1))
    found = Statistics.open(stats).samples()
    assert [(sample.name, sample.has_answer) for sample in found] == [("00.png", False), ("s.jsonl:1", True)]


def test_samples_of_a_file_alone_need_no_images(small: Path, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"text": "Permission is granted."}\n')
    glmq(*command(small, tmp_path / "stats", "--calib-samples", tmp_path / "s.jsonl"))
    assert [sample.name for sample in Statistics.open(tmp_path / "stats").samples()] == ["s.jsonl:1"]


@pytest.mark.usefixtures("all_texts")
def test_the_texts_that_come_with_glmq_follow_unless_they_are_refused(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    glmq(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 1, "--texts"))
    found = Statistics.open(tmp_path / "stats").samples()
    names = ["00.png", *(f"texts.jsonl:{line}" for line in range(1, 9))]
    assert [(sample.name, sample.has_answer) for sample in found] == [(name, name != "00.png") for name in names]


def test_without_images_the_photographs_that_come_with_glmq_are_used(small: Path, tmp_path: Path) -> None:
    glmq(*command(small, tmp_path / "stats", "--limit", 1, "--max-pixels", 28 * 28 * 4))
    first = sorted(path.name for path in default_images().glob("*.jpg"))[0]
    assert [sample.name for sample in Statistics.open(tmp_path / "stats").samples()] == [first]


def test_the_prompt_and_the_pixels_change_the_samples(small: Path, pictures: Path, tmp_path: Path) -> None:
    images = ("--calib-images", pictures, "--limit", 1)
    tokens = []
    for name, options in (("plain", ()), ("asked", ("--prompt", "Why?")), ("shrunk", ("--max-pixels", 84 * 84))):
        glmq(*command(small, tmp_path / name, *images, *options))
        tokens.append(Statistics.open(tmp_path / name).samples()[0].tokens)
    plain, asked, shrunk = tokens
    assert asked < plain
    # 112 x 112 pixels are 4 x 4 merged patches, 84 x 84 are 3 x 3.
    assert plain - shrunk == 16 - 9


def test_an_unfinished_calibration_knows_its_kind_of_device(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look(_: object, __: object, settings: dict[str, str], *___: object) -> None:
        asked.append(settings["--device-type"])
        raise UsageError("enough")

    monkeypatch.setattr("glmq.jobs.calibrate.CalibrationJournal", look)
    result = run(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 1))
    assert result.exit_code == UsageError.exit_code
    assert asked == ["cpu"]


def test_the_compute_dtype_is_written_down(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.machine.CPUINFO", tmp_path / "cpuinfo")  # of a processor without bfloat16 products
    images = ("--calib-images", pictures, "--limit", 1)
    for name, wanted in (("auto", "float32"), ("bf16", "bfloat16")):
        glmq(*command(small, tmp_path / name, *images, "--compute-dtype", name))
        assert Statistics.open(tmp_path / name).manifest["compute_dtype"] == wanted


def test_wide_moments_are_kept_on_request(small: Path, pictures: Path, tmp_path: Path) -> None:
    glmq(*command(small, tmp_path / "stats", "--calib-images", pictures, "--limit", 1, "--wide-moments"))
    moment = Statistics.open(tmp_path / "stats").input("model.language_model.layers.0.mlp.down_proj").second_moment
    assert moment.shape == (96, 96)


def test_overwriting_replaces_older_statistics(small: Path, pictures: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    images = ("--calib-images", pictures, "--limit")
    glmq(*command(small, stats, *images, 1))
    before = tree(stats)
    result = run(*command(small, stats, *images, 2, "-q"))
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {stats}: is not empty; choose another folder, or pass --overwrite to replace its contents\n"
    )
    assert tree(stats) == before
    glmq(*command(small, stats, *images, 2, "--overwrite"))
    assert len(Statistics.open(stats).samples()) == 2


@pytest.mark.parametrize("where", ["model", "."])
def test_statistics_never_replace_the_model(where: str, small_copy: Path, pictures: Path) -> None:
    before = tree(small_copy.parent)
    stats = small_copy.parent / where
    result = run(*command(small_copy, stats, "--calib-images", pictures, "--overwrite", "-q"))
    what = "is the folder of the float weights" if where == "model" else f"holds the float weights ({small_copy})"
    assert (result.exit_code, result.stderr) == (2, f"error: {stats}: {what}; choose another --stats\n")
    assert tree(small_copy.parent) == before


def test_a_disk_without_room_stops_the_run_and_leaves_nothing(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = run(*command(small, tmp_path / "stats", "--calib-images", pictures, "-q"))
    assert result.exit_code == 5
    assert " bytes are to be written, but its disk has 1000 free; " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_the_run_can_be_resumed(
    small: Path, pictures: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, replace = tmp_path / "stats", os.replace

    def fill_up(source: Path, target: Path) -> None:
        if Path(target).name == "model.language_model.layers.1.safetensors":
            raise OSError(28, "No space left on device")
        replace(source, target)

    arguments = command(small, stats, "--calib-images", pictures, "--limit", 2, "--texts", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fill_up)
        result = run(*arguments)
    assert result.exit_code == 5
    assert re.fullmatch(
        r"error: \S+/model\.language_model\.layers\.1\.safetensors: \d+ bytes are to be written, but its disk takes "
        r"no more, with \d+ bytes free: it may have as many files as it can hold \(df -i\); "
        r"remove some or choose another disk\n",
        result.stderr,
    )
    assert not stats.exists()
    glmq(*arguments, "--resume")
    assert tree(stats) == tree(small_stats)


def test_a_missing_torch_npu_stops_the_run(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    result = run(*command(small, tmp_path / "stats", "--calib-images", pictures, "--device-type", "npu"))
    assert result.exit_code == 5
    assert "\nerror: --device-type npu: " in result.stderr
    assert "torch_npu cannot be imported" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--limit", 0), ("--max-pixels", 783), ("--compute-dtype", "int8"), ("--device-type", "cuda")]
)
def test_values_out_of_range_are_wrong_usage(option: str, value: object, small: Path, tmp_path: Path) -> None:
    result = run(*command(small, tmp_path / "stats", option, value))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {option}")
