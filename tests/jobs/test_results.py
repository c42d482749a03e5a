"""What the jobs return under torchrun."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import fork_ranks

import glmq


@pytest.mark.slow
def test_every_rank_gets_the_same_records(small: Path, pictures: Path, tmp_path: Path) -> None:
    def work(tell: Callable[[object], None]) -> None:
        options = glmq.CalibrationOptions(images=pictures, limit=2)
        stats = glmq.calibrate(small, out=tmp_path / "stats", options=options)
        result = glmq.quantize(small, stats, out=tmp_path / "w8a8s", recipe=glmq.Recipe.w8a8s(sigma=3.0))
        packed = glmq.compress(tmp_path / "w8a8s", out=tmp_path / "packed", codec="portable")
        for record in (stats.folder, stats.statistics.manifest, stats.times, result, packed):
            tell(repr(record))

    first, second = fork_ranks(2, work)
    assert first == second
    assert len(first) == 5, first
    assert "W8A8S" in first[3]
