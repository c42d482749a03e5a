"""What calibration remembers of one linear's input: extremes, histograms, second moment, a few tokens.

Everything here is a sum, a minimum or a maximum over tokens, so results of separate runs merge. The histogram has bins whose
edges are powers of two times an integer; widening a channel's range merges bins exactly, so the counts depend only on
the values seen, never on their order. Sums do depend on it: they run in the order of the samples, whoever computes them,
and the second moment is summed band by band of its rows, so that several processes can divide the bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

try:
    from glmq.numerics import _moments
except ImportError:  # installed without a compiler
    _kernels: tuple[str, ...] = ()
else:
    _kernels = _moments.list_kernels()

KERNELS: Final = _kernels
"""The compiled kernels that this processor runs, fastest first; empty without a compiler. They give the same bits."""

BINS = 256
"""Bins of one channel's histogram, over [-2^exponent, 2^exponent)."""
CHUNK_VALUES = 2**17
"""Values that statistics are taken of at a time."""
MIN_EXPONENT = -40
"""Narrowest range of a channel: inputs below 2^-40 fall into the two middle bins."""
BAND_ROWS = 512
"""Rows of the second moment that are summed by one product. Only the upper triangle is: half the work of the square."""
TOKENS_AT_ONCE = 1024
"""Of several samples, that one product adds to the second moment, at least: every product reads and writes all of it."""
FP16_END: Final = torch.finfo(torch.float16).max
VALUES_PER_THREAD = 2**18
"""A second thread begins where there are more values than this."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """The statistics of one distinct linear input of width K, over `tokens` rows."""

    name: str
    """The site, named after the first linear that reads it, e.g. `model.language_model.layers.0.self_attn.q_proj`."""
    tokens: int
    minimum: Tensor
    """float32 [K]."""
    maximum: Tensor
    """float32 [K]."""
    mean: Tensor
    """float32 [K]: mean of x over tokens."""
    histogram: Tensor
    """int32 [K, BINS]: counts; bin i of channel j covers [(i - 128), (i - 127)) * 2^(exponent[j] - 7)."""
    exponent: Tensor
    """int16 [K]: every |x_j| < 2^exponent[j]."""
    square_mean: Tensor
    """float32 [K]: mean of x^2 over tokens (the diagonal of the second moment, kept for every input)."""
    second_moment: Tensor | None
    """float32 [K, K]: mean of x x^T over tokens, symmetric; None for inputs wider than asked for."""
    sample: Tensor
    """float32 [T, K]: T evenly spaced tokens of the calibration set, for error tables."""
    sensitivity: Tensor | None = None
    """float32 [rows]: what a squared error in each row's output counts for the answer (sensitivity.py), over the rows of all
    linears that read the input; None where that is not known."""

    @property
    def width(self) -> int:
        return self.minimum.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors as they are stored, a second moment as a triangle."""
        stored = [self.minimum, self.maximum, self.mean, self.histogram, self.exponent, self.square_mean, self.sample]
        stored += [] if self.sensitivity is None else [self.sensitivity]
        triangle = 0 if self.second_moment is None else 4 * (self.width * (self.width + 1) // 2)
        return triangle + sum(tensor.nbytes for tensor in stored)


def is_cut_off(dtype: torch.dtype, largest: float) -> bool:
    """Whether a largest magnitude is the very end of float16, where some chips leave what goes beyond."""
    return dtype is torch.float16 and largest >= FP16_END


def bin_centers(exponent: Tensor) -> Tensor:
    """Centre of every bin: float32 [K, BINS] from int16 [K]."""
    steps = torch.arange(BINS, dtype=torch.float32) - (BINS // 2) + 0.5
    return torch.ldexp(steps.expand(exponent.numel(), BINS), (exponent.to(torch.int32) - 7)[:, None])


def exponents_of(absmax: Tensor) -> Tensor:
    """Smallest e with absmax < 2^e, at least MIN_EXPONENT: int32 [K]."""
    exponent = torch.frexp(absmax).exponent
    return torch.where(absmax > 0, exponent, MIN_EXPONENT).clamp_min(MIN_EXPONENT)


def _widen(counts: Tensor, by: Tensor) -> Tensor:
    """Merge bins so that channel j covers a range 2^by[j] times as wide. counts int32 [K, BINS], by int32 [K] >= 0."""
    centred = torch.arange(BINS) - BINS // 2
    index = (centred[None, :] >> by[:, None].clamp_max(8)) + BINS // 2  # floor division keeps negative bins exact
    return torch.zeros_like(counts).scatter_add_(1, index, counts)


@dataclass(frozen=True, slots=True)
class Extremes:
    """Of each channel over the tokens of one sample."""

    tokens: int
    low: Tensor
    """float32 [K]."""
    high: Tensor
    """float32 [K]."""


class InputAccumulator:
    """Collects InputStats of one input, sample by sample.

    Several processes that share the samples each have one: `observe` a sample where it was computed, `accumulate` what every
    `observe` returned, in the order of the samples, in all of them, and at the end `merge` the `state` of the others on one.
    The statistics have the bits of one process that saw everything.

    Args:
        name: the site.
        width: K.
        with_moment: also collect the [K, K] second moment.
        rank: this process among `world` ones: it sums every world-th band of the second moment.
    """

    def __init__(self, name: str, width: int, *, with_moment: bool, rank: int = 0, world: int = 1) -> None:
        self.name = name
        self.tokens = 0
        self._min = torch.full((width,), torch.inf)
        self._max = torch.full((width,), -torch.inf)
        self._sums = torch.zeros(2, width, dtype=torch.float64)  # of x and of x^2
        self._counts = torch.zeros(width, BINS, dtype=torch.int32)
        self._exponent = torch.full((width,), MIN_EXPONENT, dtype=torch.int32)
        self._with_moment = with_moment
        self._bands: dict[int, Tensor] = {}  # by first row: [rows, K - first row]
        if with_moment:
            for number, start in enumerate(range(0, width, BAND_ROWS)):
                turn, place = divmod(number, world)
                if rank == (place if turn % 2 == 0 else world - 1 - place):  # to and fro: bands get shorter
                    self._bands[start] = torch.zeros(min(BAND_ROWS, width - start), width - start)
        self._rows: list[Tensor] = []
        self._waiting: list[Tensor] = []
        """Samples that the second moment has yet to get."""
        self.latest: Extremes | None = None
        """Of the sample that was observed last."""

    def update(self, x: Tensor, *, keep_rows: int) -> None:
        """Add the tokens of one sample: `observe` and `accumulate`."""
        self.accumulate(self.observe(x, keep_rows=keep_rows))

    def observe(self, x: Tensor, *, keep_rows: int) -> list[Tensor]:
        """Count the tokens of one sample, and return what has to be added in the order of the samples.

        Args:
            x: float [T, K], any float dtype; accumulated in float32 (sums in float64).
            keep_rows: how many evenly spaced tokens of this sample to keep.

        Raises:
            FloatingPointError: NaN, infinity, or the end of float16; nothing is counted then.
        """
        dtype, x = x.dtype, x.detach().to(device="cpu", dtype=torch.float32).contiguous()
        tokens = x.shape[0]
        low, high = x.amin(0), x.amax(0)  # hand NaN on; torch.aminmax is several times slower along a dimension
        if not torch.isfinite(torch.stack((low, high))).all():
            raise FloatingPointError(f"the input of {self.name} holds NaN or infinity")
        if is_cut_off(dtype, max(float(high.max()), -float(low.min()))):
            raise FloatingPointError(f"the input of {self.name} reaches {FP16_END:g}, where float16 ends,")
        self.latest = Extremes(tokens, low, high)
        self._count_in(tokens, low, high, exponents_of(torch.maximum(low.abs(), high.abs())))
        sums = _count_and_sum(x, self._exponent, self._counts)
        picked = torch.linspace(0, tokens - 1, min(keep_rows, tokens)).round().long()
        return [sums, x[picked], *([x] if self._with_moment else [])]

    def accumulate(self, look: Sequence[Tensor]) -> int:
        """Add what `observe` returned for the next sample, here or in another process. Returns floating point operations."""
        sums, rows, *whole = look
        self._sums += sums
        self._rows.append(rows)
        for x in whole:
            self._waiting.append(x)
            if sum(one.shape[0] for one in self._waiting) >= TOKENS_AT_ONCE:
                self._add_waiting()
            else:
                self._waiting[-1] = x.clone()  # whose memory the caller may use again
        return sum(2 * x.shape[0] * band.numel() for x in whole for band in self._bands.values())

    def _add_waiting(self) -> None:
        """Add the samples that wait to the second moment."""
        if self._waiting:
            x = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting.clear()
            for start, band in self._bands.items():
                band.addmm_(x[:, start : start + band.shape[0]].T, x[:, start:])

    def state(self) -> list[Tensor]:
        """What `merge` takes."""
        self._add_waiting()
        starts = torch.tensor([self.tokens, *self._bands])
        return [starts, self._min, self._max, self._exponent, self._counts, *self._bands.values()]

    def merge(self, other: Sequence[Tensor]) -> None:
        """Take over what another process has counted and summed."""
        self._add_waiting()
        starts, low, high, exponent, counts, *bands = other
        tokens, *rows = starts.tolist()
        self._count_in(tokens, low, high, exponent)
        self._counts += _widen(counts, self._exponent - exponent)
        self._bands |= dict(zip(rows, bands, strict=True))

    def _count_in(self, tokens: int, low: Tensor, high: Tensor, exponent: Tensor) -> None:
        """Widen extremes and histogram for more tokens."""
        self._min = torch.minimum(self._min, low)
        self._max = torch.maximum(self._max, high)
        exponent = torch.maximum(self._exponent, exponent)
        wider = (exponent != self._exponent).nonzero()[:, 0]
        if self.tokens and len(wider):
            self._counts[wider] = _widen(self._counts[wider], (exponent - self._exponent)[wider])
        self._exponent = exponent
        self.tokens += tokens

    def finish(self) -> InputStats:
        """The statistics so far; needs at least one token."""
        self._add_waiting()
        sums = (self._sums / self.tokens).float()
        return InputStats(
            name=self.name,
            tokens=self.tokens,
            minimum=self._min,
            maximum=self._max,
            mean=sums[0],
            histogram=self._counts,
            exponent=self._exponent.to(torch.int16),
            square_mean=sums[1],
            second_moment=self._mean_moment() if self._with_moment else None,
            sample=torch.cat(self._rows),
        )

    def _mean_moment(self) -> Tensor:
        """The bands over the number of tokens, and their mirror image: [K, K]."""
        width = self._min.numel()
        moment = torch.empty(width, width)
        for start, band in self._bands.items():
            end = start + band.shape[0]
            moment[start:end, start:] = band / self.tokens
            moment[end:, start:end] = moment[start:end, end:].T
            corner = moment[start:end, start:end].triu()
            moment[start:end, start:end] = corner + corner.triu(1).T
        return moment


def _count_and_sum(x: Tensor, exponent: Tensor, counts: Tensor) -> Tensor:
    """Add the histogram of x, contiguous [T, K], with the given exponents to counts, int32 [K, BINS].

    Returns:
        float64 [2, K]: sums of x and of x^2, token after token.
    """
    # Powers of two for every exponent that occurs, so the products are exact, but for numbers so small that they become zero:
    # that changes the bin of negative ones, and needs a range above 2^7.
    scales = torch.ldexp(torch.ones(x.shape[1]), 7 - exponent)
    if KERNELS:
        return _observe_compiled(x, scales, counts)
    # Values and counters stay in a core's cache while several passes go over them.
    step = max(16, CHUNK_VALUES // x.shape[0])
    for start in range(0, x.shape[1], step):
        columns = slice(start, start + step)
        counts[columns] += _count_in_torch(x[:, columns], scales[columns])
    wide = x.double().numpy()
    return torch.stack([torch.from_numpy(np.sum(part, axis=0)) for part in (wide, np.square(wide))])


def _observe_compiled(x: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
    tokens, width = x.shape
    sums = torch.empty(2, width, dtype=torch.float64)
    threads = min(torch.get_num_threads(), -(-x.numel() // VALUES_PER_THREAD))
    cuts = [width * number // threads for number in range(threads + 1)]
    shares = (x.numpy(), scales.numpy(), counts.numpy(), sums.numpy(), tokens, width)
    observe = partial(_moments.observe, KERNELS[0], *shares)
    if threads == 1:
        observe(0, width)
        return sums
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(observe, cuts[:-1], cuts[1:]):
            pass
    return sums


def _count_in_torch(x: Tensor, scales: Tensor) -> Tensor:
    """Histogram of x [T, K]: int32 [K, BINS]."""
    width = x.shape[1]
    bins = (x * scales).floor_()
    if float(scales.min()) < 1:
        bins -= ((x < 0) & (bins == 0)).float()
    index = bins.to(torch.int32)
    index += torch.arange(BINS // 2, width * BINS, BINS, dtype=torch.int32)  # of channel j's bin for zero
    return torch.bincount(index.reshape(-1), minlength=width * BINS).to(torch.int32).reshape(width, BINS)
