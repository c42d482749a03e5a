"""Whether half of the samples say the same as all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import calibrate
from torch import Tensor

from glmq.calibration.convergence import Convergence, Halfway, assess, convergence_order
from glmq.calibration.samples import Sample
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import convergence_verdict, describe_convergence, describe_few, describe_large_pictures
from glmq.jobs.settled import Settled, assess_settled
from glmq.numerics.moments import InputAccumulator


def halve(
    first: Tensor, second: Tensor, *texts: Tensor, with_moment: bool = True, world: int = 1
) -> Convergence | None:
    """What `world` ranks find that take these samples in turns: two of the user's and the texts that come with glmq."""
    width, ranks = first.shape[1], []
    for rank in range(world):
        accumulator = InputAccumulator("x", width, with_moment=with_moment, rank=rank, world=world)
        ranks.append((accumulator, Halfway(accumulator, 2)))
    for turn in range(0, 2 + len(texts), world):
        looks = []
        for rank, (accumulator, halfway) in enumerate(ranks):
            x = (*(first, second, *texts), None, None)[turn + rank]
            looks.append([] if x is None else accumulator.observe(x, keep_rows=1))
            if x is not None:
                halfway.observe(turn + rank)
        for accumulator, halfway in ranks:
            for rank, look in enumerate(looks):
                halfway.accumulate(turn + rank, look[0] if look else None)
                if look:
                    accumulator.accumulate(look)
    return Halfway.merge([halfway.state() for _, halfway in ranks])


def test_samples_that_lie_in_a_row_are_spread_over_both_halves_and_built_in_texts_come_last() -> None:
    samples = [Sample(name, None, name, None, "", is_builtin=name.isupper()) for name in "abXcdeY"]
    assert "".join(sample.name for sample in convergence_order(samples)) == "acebdXY"


@pytest.mark.parametrize("texts", [0, 3])
@pytest.mark.parametrize("width", [5, 600])
def test_the_measures_are_those_of_their_definitions(width: int, texts: int) -> None:
    """600 columns are more than one band of the second moment; texts that come with glmq change nothing."""
    generator = torch.manual_seed(0)
    first, second = torch.randn(7, width, generator=generator), torch.randn(9, width, generator=generator) * 2
    found = halve(first, second, *[torch.full((2, width), 9.0)] * texts)
    assert found is not None
    both = torch.cat([first, second])
    short = 1 - (first.amax(0) - first.amin(0)) / (both.amax(0) - both.amin(0))
    half, whole = (x.double().T @ x.double() / len(x) for x in (first, both))
    root = whole.diagonal().rsqrt()
    change = ((half - whole) * root * root[:, None]).norm() / (whole * root * root[:, None]).norm()
    diagonal = (half.diagonal() / whole.diagonal() - 1).square().mean().sqrt()
    # Sums of up to 16 float32 products: far more than six digits; the correlation's three terms cancel one of them.
    assert found.range_gap == pytest.approx(float(short.mean()), rel=1e-5)
    assert found.diagonal == pytest.approx(float(diagonal), rel=1e-5)
    assert found.correlation == pytest.approx(float(change), rel=1e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_the_same(world: int) -> None:
    generator = torch.manual_seed(1)
    parts = [torch.randn(rows, 600, generator=generator) for rows in (7, 9, 4)]
    assert halve(*parts, world=world) == halve(*parts)


def test_the_change_of_a_second_moment_estimates_its_error() -> None:
    generator = torch.manual_seed(3)
    mixing = torch.randn(16, 16, generator=generator)
    truth = mixing.T @ mixing
    estimates, errors = [], []
    for _ in range(100):
        x = torch.randn(64, 16, generator=generator) @ mixing
        found = halve(x[:32], x[32:])
        assert found is not None
        assert found.correlation is not None
        estimates.append(found.correlation**2)
        moment = x.T @ x / 64
        scale = moment.diagonal().rsqrt()[:, None] * moment.diagonal().rsqrt()
        errors.append(float(((moment - truth) * scale).norm() / (moment * scale).norm()) ** 2)
    # Means of 100 runs each, of quantities that scatter by about their own size; their ratio by about a tenth.
    assert sum(estimates) == pytest.approx(sum(errors), rel=0.3)


def test_channels_that_never_move_do_not_count() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    assert halve(x[:2], x[2:], with_moment=False) == Convergence(0.5, pytest.approx(1 - 5 / (35 / 3)), None)
    dead = torch.zeros(3, 2)
    assert halve(dead[:2], dead[2:]) == Convergence(0.0, 0.0, 0.0)


def test_an_input_that_one_half_alone_reaches_has_no_change() -> None:
    x = torch.ones(2, 3)
    assert halve(x, x) == Convergence(0.0, 0.0, 0.0)
    accumulator = InputAccumulator("x", 3, with_moment=True)
    for own in (1, 2):
        halfway = Halfway(accumulator, own)
        look = accumulator.observe(x, keep_rows=1)
        halfway.observe(0)
        halfway.accumulate(0, look[0])
        halfway.accumulate(1, None)  # another sample does not reach it
        assert Halfway.merge([halfway.state()]) is None


@pytest.mark.parametrize(
    ("median", "in_words"),
    [
        (Convergence(0.07, 0.09, 0.2), "settled"),
        (Convergence(0.07, 0.5, 0.2), "settled"),  # the second moment has the mean squares
        (Convergence(0.071, 0.0, 0.0), "not settled"),
        (Convergence(0.07, 0.091, None), "settled for dense 8-bit weights"),
        (Convergence(0.07, 0.0, 0.201), "settled for dense 8-bit weights"),
    ],
)
def test_the_median_text_input_decides(median: Convergence, in_words: str) -> None:
    still, moved = Convergence(0.0, 0.0, None), Convergence(1.0, 1.0, None)
    found = assess({"model.visual.a": moved, "a": still, "b": median, "c": moved, "model.visual.b": moved}, samples=16)
    assert found is not None
    assert (found.inputs, found.in_words, [site for site, _ in found.worst]) == (3, in_words, ["c", "b", "a"])


def test_few_samples_show_no_more_than_their_ranges() -> None:
    found = assess({"a": Convergence(0.0, 0.0, 0.0)}, samples=15)
    assert found is not None
    assert found.in_words == "settled for dense 8-bit weights"


def test_the_verdict_is_on_what_is_quantized() -> None:
    ranges_alone = assess({"a": Convergence(0.0, 0.0, 0.5)}, samples=16)
    assert [convergence_verdict(ranges_alone, is_dense=is_dense) for is_dense in (True, None, False)] == [
        "settled for dense 8-bit weights",
        "settled for dense 8-bit weights; for sparse and 4-bit ones more images would help, -v says what moved",
        "not settled; more images would help, -v says what moved",
    ]
    assert [Settled(ranges_alone, 0, is_dense).is_settled for is_dense in (True, None, False)] == [True, False, False]
    assert Settled(None, 0, is_dense=True).is_settled is None
    nothing = assess({"a": Convergence(0.5, 0.0, 0.0)}, samples=16)
    assert convergence_verdict(nothing, is_dense=True) == "not settled; more images would help, -v says what moved"


@pytest.mark.slow
def test_the_notes_say_what_changed_and_what_would_help(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    settled = assess_settled(Statistics.open(calibrate(tiny, tmp_path / "two", pictures, limit=2)))
    lines = list(describe_convergence(settled.assessment, unanswered=settled.unanswered))
    assert lines[0].startswith(
        "warning: the statistics have not settled: against half of the samples, ranges changed by 12%, mean squares 1"
    )
    assert lines[0].endswith("(medians over 25 text inputs)")
    assert lines[1].startswith("  changed most: layers.")
    assert lines[2:] == [
        "  more images would help, of the kind that the model will be asked about, and samples with answers",
        "note: 2 samples have no answer; most of what a thinking model computes is its answer, "
        "and --generate 256 lets the model write one",
    ]


def test_large_pictures_are_counted_and_what_shrinks_them_is_named() -> None:
    assert describe_large_pictures([9216, 1564], 14) == []
    assert describe_large_pictures([9217, 1564], 14) == [
        "note: 1 large picture of up to 9,217 patches, whose attention takes time with their square; "
        "if the model will be asked about smaller ones, --max-pixels 1806336 shrinks it"
    ]
    (note,) = describe_large_pictures([24128, 10000, 4], 14)
    assert note.startswith("note: 2 large pictures of up to 24,128 patches")
    assert note.endswith(" shrinks them")


def test_few_images_are_counted_and_thirty_are_enough() -> None:
    assert describe_few(1) == ["note: 1 calibration image; 30 are wanted for accuracy"]
    assert describe_few(29) == ["note: 29 calibration images; 30 are wanted for accuracy"]
    assert describe_few(30) == []


@pytest.mark.slow
def test_sixteen_pictures_settle_the_tiny_model(tiny_stats: Path) -> None:
    assessment = assess(Statistics.open(tiny_stats).settled(), samples=24)
    assert assessment is not None
    assert assessment.is_settled
    assert (round(assessment.typical.range_gap, 2), round(assessment.typical.diagonal, 2)) == (0.05, 0.08)


def test_one_sample_shows_nothing() -> None:
    assert assess({}, samples=16) is None
