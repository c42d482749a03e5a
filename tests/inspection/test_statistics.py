"""Statistics folders summarized, and two of them compared."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmq.calibration.convergence import Convergence
from glmq.calibration.samples import GeneratedAnswer, Sample
from glmq.calibration.stats import Settings
from glmq.calibration.stats_writer import StatsWriter
from glmq.errors import StatisticsError
from glmq.inspection.statistics import InputChange, StatisticsComparison, compare_statistics, summarize_statistics
from glmq.numerics.moments import InputAccumulator

SITE = "model.language_model.layers.0.self_attn.q_proj"
SAMPLES = (
    Sample("a.png", Path("a.png"), "What?", None, "11" * 32),
    Sample("s.jsonl:2", None, None, "text", "22" * 32),
    Sample("b.png", Path("b.png"), "What?", None, "33" * 32, generated=GeneratedAnswer((5, 6, 7), "It is.")),
)
PLAIN = Settings("float32", None, False)
CHANGE = Convergence(0.5, 0.25, None)


def write(folder: Path, x: Tensor, *, site: str = SITE, settings: Settings = PLAIN) -> Path:
    """A statistics folder of one input that has seen the rows of `x` [tokens, channels]."""
    accumulator = InputAccumulator(site, x.shape[1], with_moment=False)
    accumulator.update(x, keep_rows=1)
    folder.mkdir()
    writer = StatsWriter(folder, "f" * 64, SAMPLES, settings)
    writer.write("block", [(accumulator.finish(), CHANGE)])
    for sample in SAMPLES:
        writer.set_tokens(sample, 4)
    writer.finish({})
    return folder


def compared(a: Path, b: Path) -> StatisticsComparison:
    steps = compare_statistics(a, b)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_summary_has_the_samples_and_the_range_and_the_outlier_channels_of_each_input(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, -1.0, 8.0, -9.0, 0.5], [0.5, 1.0, -1.0, 2.0, 0.25]])
    found = summarize_statistics(write(tmp_path / "stats", x))
    assert (found.samples, found.tokens, found.answered, found.unanswered) == (3, 12, 2, 1)
    assert (found.generated, found.generated_tokens) == (1, 3)
    assert found.in_words == "3 samples, 12 tokens, float32; answers: 2, 1 of them written by the model (3 tokens)"
    (entry,) = found.inputs
    assert (entry.site, entry.tokens, entry.width, entry.low, entry.high) == (SITE, 2, 5, -9.0, 8.0)
    # Magnitudes are 1, 1, 8, 9 and 0.5, their median 1: only 9 is beyond 8 times that.
    assert (entry.outliers, entry.largest, entry.settled) == (1, 9.0, CHANGE)
    assert found.assessment is not None
    assert not found.assessment.is_settled


def test_channels_that_are_never_used_are_no_typical_ones(tmp_path: Path) -> None:
    (entry,) = summarize_statistics(write(tmp_path / "stats", torch.tensor([[0.0, 0.0, 3.0]]))).inputs
    assert (entry.outliers, entry.largest) == (1, math.inf)
    (entry,) = summarize_statistics(write(tmp_path / "zero", torch.zeros(1, 3))).inputs
    assert (entry.outliers, entry.largest) == (0, 1.0)


def test_two_folders_differ_by_range_mean_squares_outliers_and_settings(tmp_path: Path) -> None:
    a = write(tmp_path / "a", torch.tensor([[1.0, 2.0, 0.0], [-1.0, 2.0, 0.0]]))
    shrunk = Settings("bfloat16", 784, False)
    b = write(tmp_path / "b", torch.tensor([[2.0, 2.0, 5.0], [-2.0, 2.0, 5.0], [2.0, 2.0, 5.0]]), settings=shrunk)
    found = compared(a, b)
    # Ranges: 5 - -2 over 2 - -1. Mean squares: 4 / 1 - 1 and 4 / 4 - 1; the third channel is zero in a.
    assert found.changes == (InputChange(SITE, 7 / 3, math.sqrt(9 / 2), (0, 0), (2, 3)),)
    assert found.settings == [("compute_dtype", "float32", "bfloat16"), ("max_pixels", None, 784)]
    assert (found.same_model, found.same_samples, found.only_a, found.only_b) == (True, True, (), ())


def test_inputs_of_one_folder_alone_are_named(tmp_path: Path) -> None:
    found = compared(write(tmp_path / "a", torch.ones(1, 2)), write(tmp_path / "b", torch.ones(1, 2), site="lm_head"))
    assert (found.changes, found.only_a, found.only_b) == ((), (SITE,), ("lm_head",))


def test_a_folder_without_a_manifest_holds_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="so it is not a finished statistics folder"):
        summarize_statistics(tmp_path)
