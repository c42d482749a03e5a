import os
import shutil
from pathlib import Path

from helpers import W8A8S, quantize

from glmq.checkpoint.workplace import RESULT, make_work


def test_what_a_killed_calibration_left_beside_its_whole_statistics_goes(
    tiny: Path, tiny_stats: Path, tmp_path: Path
) -> None:
    """The calibration of an earlier `glmq quantize --stats NAME` was killed when it had only to tidy up."""
    stats = shutil.copytree(tiny_stats, tmp_path / "stats")
    make_work(tmp_path / ".stats.partial")
    (tmp_path / ".stats.partial" / RESULT).rmdir()
    (tmp_path / ".stats.glmq-lock").write_bytes(b"glmq lock: process 1 on another machine\n")
    quantize(tiny, stats, tmp_path / "out", **W8A8S)
    assert sorted(os.listdir(tmp_path)) == ["out", "stats"]
