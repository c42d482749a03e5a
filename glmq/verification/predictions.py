"""The tokens that two checkpoints predict: lm_head applied a few thousand rows at a time, compared position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.linears import decode_linear, integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.model.greedy import HEAD_ROWS
from glmq.model.inputs import ModelInputs
from glmq.numerics.int8_linear import run_linear

TIE: Final = 0.45
"""Nats. Noise of this standard deviation in every logit makes a KL of 0.1, which is about its variance / 2: tokens that are
nearer to each other are a tie, which any rounding may decide."""


@dataclass(frozen=True, slots=True)
class SamplePredictions:
    """The predicted tokens of one sample: of its answer, or without one, of what follows the image."""

    name: str
    positions: int
    kl: float
    """Mean KL(float || candidate), nats."""
    top1: float
    """Share of positions at which both models prefer the same token."""
    nll_float: float | None
    nll_candidate: float | None
    """Mean negative log-likelihood of the answer's tokens, nats; None without an answer."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predicted tokens of all samples, each position weighing the same."""

    positions: int
    kl: float
    kl_error: float | None
    """Standard error of `kl`, from how far positions differ; None of a single position."""
    top1: float
    """Share of positions at which both models prefer the same token."""
    ties: int
    """Positions at which they do not, and the float model finds the candidate's token nearly as likely: by less than `TIE`."""
    nll_float: float | None
    nll_candidate: float | None
    samples: tuple[SamplePredictions, ...]

    @property
    def same_tokens(self) -> int:
        """Positions at which both models prefer the same token."""
        return round(self.top1 * self.positions)

    @property
    def good_tokens(self) -> int:
        """Positions at which the candidate's token is the float model's own or as good as that."""
        return self.same_tokens + self.ties

    @property
    def tied(self) -> str:
        """What to say of the ties behind a share of equal tokens; empty of none."""
        return f", at {self.ties} more a tie" if self.ties else ""


class Head:
    """lm_head of one checkpoint, read a few rows at a time.

    Args:
        source: the checkpoint.
        name: of lm_head in it.
        keeps: hold the float rows in memory once they are read; integers are held in any case.
    """

    def __init__(self, source: Checkpoint, name: str, *, keeps: bool = False) -> None:
        self._source, self._name, self._keeps = source, name, keeps
        self._int8 = decode_linear(name, source) if name in integer_linears(source) else None
        self._kept: dict[tuple[int, int], Tensor] = {}

    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        """float32 [T, stop - start] from float32 [T, width]."""
        if self._int8 is None:
            return x @ self._rows(start, stop).T
        return run_linear(x, self._int8.cut(slice(start, stop)))

    def _rows(self, start: int, stop: int) -> Tensor:
        rows = self._kept.get((start, stop))
        if rows is None:
            rows = self._source.read_rows(f"{self._name}.weight", start, stop).float()
        if self._keeps:
            self._kept[start, stop] = rows
        return rows


class HeadSums:
    """Softmax sums over the vocabulary, which arrives in pieces; float64, one entry per position.

    With logits a (float) and b (candidate): S = sum exp(a - m), U = sum exp(a - m) (a - b) for the running maximum m, so
    KL = U / S - logsumexp(a) + logsumexp(b).
    """

    def __init__(self, targets: Tensor) -> None:
        count = targets.numel()
        self.targets = targets
        self._top = torch.full((2, count), -math.inf, dtype=torch.float64)
        self._sum = torch.zeros(2, count, dtype=torch.float64)
        self._difference = torch.zeros(count, dtype=torch.float64)
        self._best = torch.zeros(2, count, dtype=torch.int64)
        self._chosen = torch.zeros(count, dtype=torch.float64)  # the float model's logit of the candidate's best token
        self._wanted = torch.zeros(2, count, dtype=torch.float64)

    def add(self, start: int, reference: Tensor, candidate: Tensor) -> None:
        """The logits of the tokens from `start` on, [T, rows] of each model."""
        a, b = reference.double(), candidate.double()
        for side, logits in enumerate((a, b)):
            highest, where = logits.max(1)
            is_higher = highest > self._top[side]
            self._best[side] = torch.where(is_higher, where + start, self._best[side])
            top = torch.maximum(highest, self._top[side])
            shrink = (self._top[side] - top).exp()
            weights = (logits - top[:, None]).exp()
            self._sum[side] = self._sum[side] * shrink + weights.sum(1)
            if side == 0:
                self._difference = self._difference * shrink + (weights * (a - b)).sum(1)
            else:
                self._chosen = torch.where(is_higher, a.gather(1, where[:, None])[:, 0], self._chosen)
            self._top[side] = top
            inside = (self.targets >= start) & (self.targets < start + logits.shape[1])
            self._wanted[side, inside] = logits[inside, self.targets[inside] - start]

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KL, agreement (0 or 1), and negative log-likelihood of the targets in each model, of each position."""
        partition = self._top + self._sum.log()
        kl = self._difference / self._sum[0] - partition[0] + partition[1]
        nll = partition - self._wanted
        return kl, (self._best[0] == self._best[1]).double(), nll[0], nll[1]

    def ties(self) -> int:
        """How many positions have two best tokens, nearly equally likely to the float model."""
        return int(((self._best[0] != self._best[1]) & (self._top[0] - self._chosen < TIE)).sum())


def scored_places(inputs: ModelInputs) -> Tensor:
    """The positions whose prediction counts: those of the answer's tokens, or without an answer all after the image."""
    if inputs.answer_start < inputs.tokens:
        return torch.arange(max(inputs.answer_start, 1) - 1, inputs.tokens - 1)
    images = (inputs.ids[0] == inputs.image_token_id).nonzero()
    return torch.arange(int(images[-1]) if images.numel() else 0, inputs.tokens)


def target_ids(inputs: ModelInputs, places: Tensor) -> Tensor:
    """The answer's token that each position should predict; -1 without an answer."""
    if inputs.answer_start == inputs.tokens:
        return torch.full_like(places, -1)
    return inputs.ids[0, places + 1]


def compare_predictions(
    heads: tuple[Head, Head],
    hidden: tuple[Tensor, Tensor],
    targets: Tensor,
    samples: Sequence[tuple[str, int]],
    vocab_size: int,
) -> Predictions:
    """The tokens that two models predict at the same positions.

    Args:
        heads: lm_head of the float model and of the candidate.
        hidden: float32 [T, width] of each behind its last norm.
        targets: int64 [T]: the answer's token that each position should predict, or -1.
        samples: name of each sample, and how many of the positions are its, in their order.
        vocab_size: rows of lm_head.
    """
    sums = HeadSums(targets)
    for start in range(0, vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, vocab_size)
        reference, candidate = (head.logits(x, start, stop) for head, x in zip(heads, hidden, strict=True))
        sums.add(start, reference, candidate)
    return summarize(sums, [name for name, _ in samples], [count for _, count in samples])


def summarize(sums: HeadSums, names: Sequence[str], counts: Sequence[int]) -> Predictions:
    """The means over each sample and over all; arguments as of `compare_predictions`."""
    columns = sums.finish()

    def means(name: str, cut: slice) -> SamplePredictions:
        kl, top1, nll_float, nll_candidate = (column[cut] for column in columns)
        answered = sums.targets[cut] >= 0
        has_answer = bool(answered.any())
        return SamplePredictions(
            name=name,
            positions=kl.numel(),
            kl=float(kl.mean()),
            top1=float(top1.mean()),
            nll_float=float(nll_float[answered].mean()) if has_answer else None,
            nll_candidate=float(nll_candidate[answered].mean()) if has_answer else None,
        )

    rows: list[SamplePredictions] = []
    start = 0
    for name, count in zip(names, counts, strict=True):
        if count:
            rows.append(means(name, slice(start, start + count)))
        start += count
    total = means("", slice(0, start))
    kl = columns[0]
    error = float(kl.std()) / math.sqrt(kl.numel()) if kl.numel() > 1 else None
    nll = total.nll_float, total.nll_candidate
    return Predictions(total.positions, total.kl, error, total.top1, sums.ties(), *nll, tuple(rows))
