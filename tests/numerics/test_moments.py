import math
import re

import numpy as np
import pytest
import torch
from helpers import slow_histogram
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmq.numerics import moments
from glmq.numerics.moments import BAND_ROWS, BINS, MIN_EXPONENT, InputAccumulator, InputStats, bin_centers

U = 2.0**-24
"""Unit roundoff of float32."""

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
"""Every finite float32: zeros of both signs, subnormals, powers of two, the largest."""

ROWS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(FLOATS, min_size=width, max_size=width), min_size=1, max_size=12)
)
"""Tokens of 1 to 4 channels."""


def accumulate(*chunks: Tensor, with_moment: bool = False, keep_rows: int = 0) -> InputStats:
    accumulator = InputAccumulator("site", chunks[0].shape[1], with_moment=with_moment)
    for chunk in chunks:
        accumulator.update(chunk, keep_rows=keep_rows)
    return accumulator.finish()


def bins_of(*values: float) -> tuple[int, dict[int, int]]:
    """Exponent and the non-empty bins of one channel, seen one value at a time."""
    stats = accumulate(*(torch.tensor([[value]]) for value in values))
    counts = stats.histogram[0]
    return int(stats.exponent[0]), {int(i): int(counts[i]) for i in counts.nonzero()}


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(ROWS)
@settings(deadline=None)
def test_histograms_equal_those_counted_value_by_value(rows: list[list[float]]) -> None:
    stats = accumulate(torch.tensor(rows))
    for channel, values in enumerate(zip(*rows, strict=True)):
        assert (int(stats.exponent[channel]), stats.histogram[channel].tolist()) == slow_histogram(list(values))


@given(st.data(), ROWS)
@settings(deadline=None)
def test_histograms_and_extremes_depend_on_the_values_alone(data: st.DataObject, rows: list[list[float]]) -> None:
    whole = accumulate(torch.tensor(rows))
    order = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))) if len(rows) > 1 else ())
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = accumulate(*(torch.tensor(piece) for piece in pieces))
    for field in ("histogram", "exponent", "minimum", "maximum"):
        assert torch.equal(getattr(parts, field), getattr(whole, field))


@given(ROWS)
@settings(deadline=None)
def test_every_value_is_counted_once_in_a_bin_that_holds_it(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    stats = accumulate(x)
    assert stats.tokens == len(rows)
    assert stats.histogram.dtype is torch.int32
    assert stats.histogram.sum(1).tolist() == [len(rows)] * x.shape[1]
    assert stats.exponent.dtype is torch.int16
    assert (x.abs().amax(0).double() < 2.0 ** stats.exponent.double()).all()
    assert torch.equal(stats.minimum, x.amin(0))
    assert torch.equal(stats.maximum, x.amax(0))


@pytest.mark.parametrize(
    ("values", "exponent", "bins"),
    [
        # A power of two does not lie below itself: the range is twice as wide, and it starts the bin in its middle.
        ([1.0], 1, {128 + 64: 1}),
        ([-1.0], 1, {128 - 64: 1}),
        ([2.0**-40], -39, {128 + 64: 1}),
        ([math.nextafter(1.0, 0.0) - 2**-25], 0, {255: 1}),
        ([-1.0, 0.99], 1, {64: 1, 128 + 63: 1}),
        # Zero is the first value of the upper middle bin, whatever its sign.
        ([0.0, -0.0], MIN_EXPONENT, {128: 2}),
        # What is far below the range falls into the two middle bins, subnormal numbers too.
        ([2.0**-149, -(2.0**-149)], MIN_EXPONENT, {127: 1, 128: 1}),
        ([2.0**-149, -(2.0**-149), 3.0], 2, {127: 1, 128: 1, 128 + 96: 1}),
        # Bins merge exactly when the range grows: 5/128 and 6/128 share a bin of width 1/4.
        ([5 / 128, 6 / 128, 31.0], 5, {128: 2, 128 + 124: 1}),
        ([-5 / 128, 6 / 128, 31.0], 5, {127: 1, 128: 1, 128 + 124: 1}),
        ([0.0, 2.0**127], 128, {128: 1, 128 + 64: 1}),
        ([-3.4028234663852886e38], 128, {0: 1}),
    ],
)
def test_bins_at_the_edges(values: list[float], exponent: int, bins: dict[int, int]) -> None:
    assert bins_of(*values) == (exponent, bins)


def test_a_channel_that_is_always_zero_keeps_the_narrowest_range() -> None:
    x = normals(5, 3)
    x[:, 1] = 0
    stats = accumulate(x, with_moment=True)
    assert int(stats.exponent[1]) == MIN_EXPONENT
    assert (float(stats.minimum[1]), float(stats.maximum[1]), float(stats.mean[1])) == (0, 0, 0)
    assert stats.second_moment[1].tolist() == stats.second_moment[:, 1].tolist() == [0, 0, 0]


def test_bin_centers_lie_in_the_middle_of_their_bins() -> None:
    centers = bin_centers(torch.tensor([0, -40, 128], dtype=torch.int16))
    assert centers.shape == (3, BINS)
    for row, exponent in enumerate((0, -40, 128)):
        wanted = [(i - 128 + 0.5) * 2.0 ** (exponent - 7) for i in range(BINS)]
        assert centers[row].double().tolist() == wanted


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
@settings(deadline=None)
def test_means_are_right_to_the_last_bit_but_one(tokens: int, width: int, seed: int) -> None:
    x = normals(tokens, width, seed=seed)
    stats = accumulate(*x.split(7))
    for channel in range(width):
        values = x[:, channel].tolist()
        mean = math.fsum(values) / tokens
        # float64 sums, then one rounding to float32.
        assert abs(float(stats.mean[channel]) - mean) <= U * math.fsum(map(abs, values)) / tokens
        square = math.fsum(value * value for value in values) / tokens
        # Squares are rounded to float32 before they are summed: one more unit.
        assert abs(float(stats.square_mean[channel]) - square) <= 2 * U * square * (1 + U)


def test_the_second_moment_is_the_mean_outer_product() -> None:
    x = normals(50, 6)
    moment = accumulate(*x.split(8), with_moment=True).second_moment
    wide = x.double()
    # A float32 sum of n products in any order is off by at most n units of the sum of magnitudes, plus the division.
    bound = 52 * U * (wide.abs().T @ wide.abs()) / 50
    assert ((moment - wide.T @ wide / 50).abs() <= bound).all()
    assert accumulate(x).second_moment is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = normals(9, 4).to(dtype)
    found, wanted = accumulate(x, with_moment=True, keep_rows=2), accumulate(x.float(), with_moment=True, keep_rows=2)
    for field in ("minimum", "maximum", "mean", "histogram", "exponent", "square_mean", "second_moment", "sample"):
        assert torch.equal(getattr(found, field), getattr(wanted, field))


@pytest.mark.parametrize(
    ("tokens", "keep", "rows"),
    [(1, 3, [0]), (3, 3, [0, 1, 2]), (5, 3, [0, 2, 4]), (10, 4, [0, 3, 6, 9]), (5, 1, [0]), (4, 9, [0, 1, 2, 3]), (4, 0, [])],
)  # fmt: skip
def test_kept_tokens_are_evenly_spaced_from_the_first_to_the_last(tokens: int, keep: int, rows: list[int]) -> None:
    x = torch.arange(tokens * 2.0).reshape(tokens, 2)
    assert torch.equal(accumulate(x, keep_rows=keep).sample, x[rows])


def test_kept_tokens_of_several_samples_follow_each_other() -> None:
    x, y = normals(5, 2), normals(3, 2, seed=1)
    assert torch.equal(accumulate(x, y, keep_rows=2).sample, torch.stack([x[0], x[4], y[0], y[2]]))


def test_the_input_is_not_changed_and_not_held() -> None:
    x = normals(6, 2)
    before = x.clone()
    accumulator = InputAccumulator("site", 2, with_moment=True)
    accumulator.update(x, keep_rows=2)
    assert torch.equal(x, before)
    x.zero_()
    found = accumulator.finish()
    assert torch.equal(found.sample, before[[0, 5]])
    assert torch.equal(found.second_moment, accumulate(before, with_moment=True).second_moment)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(bad: float) -> None:
    good, broken = normals(4, 2), normals(4, 2)
    broken[2, 1] = bad
    accumulator = InputAccumulator("layers.0.q_proj", 2, with_moment=True)
    accumulator.update(good, keep_rows=1)
    with pytest.raises(FloatingPointError) as caught:
        accumulator.update(broken, keep_rows=1)
    assert str(caught.value) == "the input of layers.0.q_proj holds NaN or infinity"
    found, wanted = accumulator.finish(), accumulate(good, with_moment=True, keep_rows=1)
    assert found.tokens == 4
    assert torch.equal(found.histogram, wanted.histogram)
    assert torch.equal(found.second_moment, wanted.second_moment)


def test_the_end_of_float16_counts_as_beyond_it_in_float16_alone() -> None:
    accumulator = InputAccumulator("layers.0.q_proj", 2, with_moment=False)
    x = torch.tensor([[1.0, -65504.0]])
    with pytest.raises(FloatingPointError) as caught:
        accumulator.update(x.half(), keep_rows=1)
    assert str(caught.value) == "the input of layers.0.q_proj reaches 65504, where float16 ends,"
    accumulator.update(x, keep_rows=1)
    accumulator.update(x.half() / 2, keep_rows=1)
    assert accumulator.finish().tokens == 2


def test_equal_inputs_give_equal_bits() -> None:
    x = normals(64, 16)
    one, other = accumulate(*x.split(10), with_moment=True), accumulate(*x.split(10), with_moment=True)
    for field in ("mean", "square_mean", "second_moment"):
        assert torch.equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_several_accumulators_that_share_samples_and_bands_have_the_bits_of_one(world: int) -> None:
    width = 3 * BAND_ROWS + 7
    samples = [normals(5 + 400 * number, width, seed=number) * 4.0**number for number in range(4)]
    wanted = accumulate(*samples, with_moment=True, keep_rows=2)
    many = [InputAccumulator("site", width, with_moment=True, rank=rank, world=world) for rank in range(world)]
    for number, x in enumerate(samples):
        look = many[number % world].observe(x, keep_rows=2)
        for accumulator in many:
            accumulator.accumulate(look)
    first, *others = many
    for other in others:
        first.merge(other.state())
    found = first.finish()
    assert found.tokens == wanted.tokens
    for field in (
        "minimum", "maximum", "mean", "histogram", "exponent", "square_mean", "second_moment", "sample",
    ):  # fmt: skip
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field


@pytest.mark.parametrize("width", [1, BAND_ROWS - 1, BAND_ROWS, BAND_ROWS + 1, 2 * BAND_ROWS + 3])
def test_the_second_moment_of_any_width_is_whole_and_symmetric(width: int) -> None:
    x = torch.randint(-8, 9, (6, width), generator=torch.Generator().manual_seed(width)).float()  # sums are exact
    found = accumulate(x[:4], x[4:], with_moment=True).second_moment
    assert found is not None
    assert torch.equal(found, x.T @ x / 6)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("kernel", moments.KERNELS)
def test_every_kernel_has_the_bits_of_torch(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(kernels: tuple[str, ...], threshold: int) -> moments.InputStats:
        monkeypatch.setattr(moments, "KERNELS", kernels)
        monkeypatch.setattr(moments, "VALUES_PER_THREAD", threshold)
        generator = torch.Generator().manual_seed(3)
        accumulator = InputAccumulator("a", 75, with_moment=False)
        for tokens, size in ((1, 1.0), (60, 1e-3), (90, 4.0), (7, 1e30), (30, 1e-44)):
            x = torch.randn(tokens, 75, generator=generator) * size
            x[0, :9], x[0, 9:20] = 0.0, -1e-45
            accumulator.update(x, keep_rows=0)
        return accumulator.finish()

    found, wanted = observe((kernel,), 2000), observe((), 2000)
    for field in ("histogram", "exponent", "mean", "square_mean"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field


@pytest.mark.parametrize("kernel", moments.KERNELS)
@pytest.mark.parametrize("width", [3, 128, 131])
def test_every_kernel_counts_more_tokens_than_its_narrow_counters_hold(width: int, kernel: str) -> None:
    x = np.ones((70_000, width), np.float32)
    x[5], x[-1] = -1, 2
    counts, sums = np.full((width, 256), 7, np.int32), np.empty((2, width))
    moments._moments.observe(kernel, x, np.ones(width, np.float32), counts, sums, *x.shape, 0, width)
    wanted = np.full(256, 7)
    wanted[[127, 129, 130]] += 1, 69_998, 1
    assert np.array_equal(counts, np.tile(wanted, (width, 1)))
    assert np.array_equal(sums, np.tile([[69_999.0], [70_003.0]], (1, width)))


@pytest.mark.skipif(not moments.KERNELS, reason="the compiled kernels are not built")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kernel": "avx1024"}, "no kernel avx1024 on this machine"),
        ({"end": 4}, "first and end must lie within the channels"),
        ({"first": -1}, "first and end must lie within the channels"),
        ({"tokens": -1}, "first and end must lie within the channels"),
        ({"tokens": 3}, "x has 24 bytes, 36 are needed"),
        ({"scales": np.ones(2, np.float32)}, "scales has 8 bytes, 12 are needed"),
        ({"counts": np.zeros((3, 255), np.int32)}, "counts has 3060 bytes, 3072 are needed"),
        ({"sums": np.zeros(49, np.int8)[1:]}, "sums does not begin at a multiple of 8 bytes"),
        ({"tokens": 2**62, "channels": 2**2}, "x has 24 bytes, -1 are needed"),
    ],
)
def test_the_compiled_kernel_refuses_buffers_that_do_not_fit(changes: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {
        "kernel": moments.KERNELS[-1],
        "x": np.zeros((2, 3), np.float32),
        "scales": np.ones(3, np.float32),
        "counts": np.zeros((3, 256), np.int32),
        "sums": np.zeros((2, 3)),
        **{"tokens": 2, "channels": 3, "first": 0, "end": 3},
    }
    with pytest.raises(ValueError, match=re.escape(sentence)):
        moments._moments.observe(*(arguments | changes).values())
