"""What a dry run of a calibration foretells, against what a run does."""

import json
from pathlib import Path

import psutil
import pytest
from helpers import calibrate, edit_json, refused
from PIL import Image

from glmq.calibration import dry_run
from glmq.jobs.calibrate import CalibrationForecast
from glmq.jobs.calibrate import calibrate as calibrate_or_forecast
from glmq.jobs.calibration_options import CalibrationOptions


def forecast(model: Path, out: Path, pictures: Path | None, **options: object) -> CalibrationForecast:
    before = sorted(out.parent.iterdir())
    found = calibrate_or_forecast(model, out=out, options=CalibrationOptions(images=pictures, **options), dry_run=True)
    assert sorted(out.parent.iterdir()) == before
    return found


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


@pytest.mark.parametrize(
    "options",
    [{}, {"wide_moments": True, "text_inputs": True}, {"limit": 2, "compute_dtype": "bf16", "text_inputs": True}],
)
def test_the_files_and_their_sizes_are_foretold_to_the_byte(
    options: dict[str, object], small: Path, lines: Path, tmp_path: Path
) -> None:
    found = forecast(small, tmp_path / "stats", None, samples_file=lines, **options)
    assert list(tmp_path.iterdir()) == []
    folder = calibrate(small, tmp_path / "stats", None, samples_file=lines, **options)
    sizes = sizes_in(folder)
    assert dict(found.plan.files) == sizes
    assert found.plan.output_bytes == sum(sizes.values())
    manifest = json.loads((folder / "statistics.json").read_text())
    assert [sample.tokens for sample in found.plan.samples] == [sample["tokens"] for sample in manifest["samples"]]
    assert found.seconds > 0
    assert 0 < found.plan.peak_bytes < psutil.virtual_memory().available


def test_texts_alone_leave_the_vision_towers_files_out(small: Path, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "Permission is hereby granted."}))
    found = forecast(small, tmp_path / "stats", None, samples_file=tmp_path / "s.jsonl")
    folder = calibrate(small, tmp_path / "stats", None, samples_file=tmp_path / "s.jsonl")
    assert dict(found.plan.files) == sizes_in(folder)


def test_samples_that_are_longer_than_the_model_takes_are_refused_together(small_copy: Path, tmp_path: Path) -> None:
    edit_json(small_copy / "config.json", lambda c: c["text_config"].update(max_position_embeddings=20))
    rows = [{"text": "word " * 30}, {"text": "Short."}, {"text": "word " * 40}]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def run(limit: int | None, **options: object) -> tuple[int, str]:
        chosen = {"samples_file": tmp_path / "s.jsonl", "texts": False, **options}
        return refused(lambda: forecast(small_copy, tmp_path / "stats", None, limit=limit, **chosen))

    first = "s.jsonl:1: has 60 tokens, the model takes 20 (max_position_embeddings of config.json); shorten its texts"
    assert run(1) == (4, first)
    assert run(None) == (4, f"2 of 3 samples are none for this model, the first: {first}")
    (tmp_path / "s.jsonl").write_text('{"prompt": "Go"}')
    assert run(None, generate=30) == (
        4,
        "s.jsonl:1: has 8 tokens and up to 30 of an answer, the model takes 20 (max_position_embeddings of config.json); "
        "lower --generate",
    )


def test_a_disk_without_room_is_refused_before_the_first_block(
    small: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats"
    plan = forecast(small, stats, None, samples_file=lines).plan
    needed = plan.output_bytes + plan.work_bytes
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: needed - 1)
    code, sentence = refused(lambda: calibrate(small, stats, None, samples_file=lines))
    assert code == 5
    assert f"{needed} bytes are to be written, but its disk has {needed - 1} free" in sentence
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: needed)
    calibrate(small, stats, None, samples_file=lines)


def test_answers_that_the_model_will_write_are_foretold_at_their_longest(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    plan = forecast(small, tmp_path / "stats", pictures, limit=2, generate=4).plan
    assert not plan.is_exact
    sizes = sizes_in(calibrate(small, tmp_path / "stats", pictures, limit=2, generate=4))
    # The random model never stops, so tokens are the most; the texts of its answers are shorter than allowed for.
    assert dict(plan.files) == sizes | {"statistics.json": pytest.approx(sizes["statistics.json"], rel=0.2)}
    assert plan.output_bytes >= sum(sizes.values())


@pytest.mark.parametrize(
    ("seconds", "foretold", "calls"), [([0.25, 9], 4 * 0.25, 1), ([0.125, 0.0625, 9], 4 * 0.0625, 2)]
)
def test_only_a_short_first_call_is_left_out_of_a_trial(
    seconds: list[float], foretold: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = [8.0], [0]

    def run() -> int:
        now[0] += seconds[done[0]]
        done[0] += 1
        return done[0]

    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: now[0])
    assert dry_run._time_run(run, 4) == (foretold, calls)
