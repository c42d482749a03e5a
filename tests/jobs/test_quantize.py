import os
import shutil
from pathlib import Path

import pytest
from helpers import W8A8S, quantize, tree, without_sensitivity

from glmq.checkpoint.workplace import RESULT, make_work
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.quantization_job import QuantizationJob
from glmq.jobs.quantize import quantize as quantize_job
from glmq.progress import Note
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe


@pytest.mark.slow
def test_what_a_killed_calibration_left_beside_its_whole_statistics_goes(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    """The calibration of an earlier `glmq quantize --stats NAME` was killed when it had only to tidy up."""
    stats = shutil.copytree(small_stats, tmp_path / "stats")
    make_work(tmp_path / ".stats.partial")
    (tmp_path / ".stats.partial" / RESULT).rmdir()
    (tmp_path / ".stats.glmq-lock").write_bytes(b"glmq lock: process 1 on another machine\n")
    quantize(small, stats, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "stats"]


@pytest.mark.slow
def test_old_statistics_deal_bits_out_by_errors_and_say_so(small: Path, small_stats: Path, tmp_path: Path) -> None:
    old = without_sensitivity(small_stats, tmp_path / "old")
    notes: list[str] = []
    recipe = make_recipe(Options(**W8A8S))
    quantize_job(small, old, out=tmp_path / "a", recipe=recipe,
                 watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None)  # fmt: skip
    assert notes == [
        f"note: bits are dealt out as with --allocate error: an older glmq wrote the statistics in {old}; calibrate again for "
        "more accurate answers"
    ]
    quantize(small, small_stats, tmp_path / "b", **W8A8S, allocate="error")
    quantize(small, small_stats, tmp_path / "c", **W8A8S)
    a, b, c = ({k: v for k, v in tree(tmp_path / n).items() if k.endswith("safetensors")} for n in "abc")
    assert a == b != c


def test_sparse_linears_outside_the_text_layers_deal_bits_out_by_errors(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    recipe = make_recipe(Options(**W8A8S, layer=("model.visual.merger.*=W8A8S",)))
    quantize_job(small, small_stats, out=tmp_path / "a", recipe=recipe,
                 watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None)  # fmt: skip
    assert notes[-1] == (
        "note: bits are dealt out as with --allocate error: what model.visual.merger.proj counts for the answer is not "
        "known, only the text layers' linears are rated"
    )


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, ""), (4 * 2**30, "4GB"), (500 * 2**20, "500MB"), (2**20 + 1, "1048577 bytes"), (2**20, "1MB")],
)
def test_sizes_of_weight_files_are_told_apart_to_the_byte(size: int | None, shown: str) -> None:
    job = QuantizationJob(Path("float"), Path("out"), make_recipe(Options()), CalibrationOptions(), shard_bytes=size)
    assert job.settings()["--part_file_size"] == shown
