"""How much an error in each output row of a linear counts for the answer: the row's sensitivity, without a backward pass.

A text layer of GLM-4.xV normalises what attention and MLP give before it adds that to the residual stream R, and R is
normalised before lm_head reads it. So an error of 1 in channel n of o_proj's output y_o moves the stream by gamma_o[n] /
rms(y_o), and what the head sees by that over rms(R). With ms = mean of squares over channels, gamma the weight of the norm
behind attention or MLP, and E over tokens, a unit of squared error counts

    t_o = E[1 / (ms(y_o) ms(R))], t_d alike for down_proj's output y_d
    o_proj   gamma_o[n]^2 t_o
    v_proj   t_o sum over the query heads h of its KV head, and over n, of gamma_o[n]^2 W_o[n, hj]^2
    down     gamma_d[n]^2 t_d
    up       c_i E[silu(g_i)^2 / (ms(y_d) ms(R))],      c_i = sum_n gamma_d[n]^2 W_down[n, i]^2
    gate     c_i E[(silu'(g_i) u_i)^2 / (ms(y_d) ms(R))]
    S = E[sum_n gamma_o[n]^2 y_o[n]^2 / (ms(y_o) ms(R))] / 4
    q_proj   E[k_j^2] / head_dim * S / heads
    k_proj   sum over the query heads h of its KV head of E[q_hj^2] / head_dim * S / heads

S stands for what a change of the attention's weights does: the softmax's Jacobian and the spread of the values over tokens,
both taken as typical. R is the layer's own output. This is the diagonal of the Fisher information as far as one layer knows
it; what the later layers do is taken to be the same for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import silu

from glmq.numerics.rows import row_chunks

TOKENS: Final = 128
"""Of each sample, evenly spaced: a mean needs no more."""
LEAST_SHARE: Final = 0.05
"""No row counts less than this share of its linear's mean row: the estimate is not that good."""
TINY: Final = 1e-30
"""Under mean squares that a sum divides by."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How a layer's query channels belong to its key and value channels."""

    query: int
    """Query heads."""
    key: int
    """KV heads; divides `query`."""


@dataclass(frozen=True, slots=True)
class LayerOutputs:
    """What one text layer computed for T tokens, any float dtype, any device."""

    query: Tensor
    """[T, heads * head_dim]: q_proj's output, before the rotary embedding."""
    key: Tensor
    """[T, KV heads * head_dim]: k_proj's."""
    attention: Tensor
    """[T, H]: o_proj's, before its norm."""
    gate_up: Tensor
    """[T, 2 I]: gate first."""
    mlp: Tensor
    """[T, H]: down_proj's, before its norm."""
    residual: Tensor
    """[T, H]: the layer's own output."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of a text layer through which errors pass on, any float dtype, any device."""

    attention_norm: Tensor
    """[H]: gamma_o."""
    mlp_norm: Tensor
    """[H]: gamma_d."""
    output: Tensor
    """[H, heads * head_dim]: of o_proj."""
    down: Tensor
    """[H, I]: of down_proj."""


@dataclass(frozen=True, slots=True)
class RowSensitivities:
    """What a squared error in each row's output counts, float32 [rows of that linear]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor


class SensitivityAccumulator:
    """The means over tokens that sensitivities need. Sums are float64 and run in the order of `accumulate`.

    Several processes that share the samples each have one: each calls `observe` for its samples, and `accumulate` for
    everybody's, in the order of the samples.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._sums: tuple[Tensor, ...] = ()

    def observe(self, layer: LayerOutputs) -> list[Tensor]:
        """What one sample adds: seven sums over its picked tokens, float64; nothing is remembered."""
        tokens = layer.residual.shape[0]
        picked = torch.linspace(0, tokens - 1, min(TOKENS, tokens)).round().long()

        def rows(x: Tensor) -> Tensor:
            return x[picked.to(x.device)].to(device="cpu", dtype=torch.float32)

        attention, mlp, residual = rows(layer.attention), rows(layer.mlp), rows(layer.residual)
        stream = residual.square().mean(1, keepdim=True)
        weight_o = 1 / (attention.square().mean(1, keepdim=True) * stream).clamp_min(TINY)  # [T, 1]
        weight_d = 1 / (mlp.square().mean(1, keepdim=True) * stream).clamp_min(TINY)
        gate, up = rows(layer.gate_up).chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))  # silu'(g)
        sums = (
            torch.cat([torch.ones_like(weight_o), weight_o, weight_d], 1),
            attention.square() * weight_o,
            (slope * up).square_() * weight_d,
            silu(gate).square_() * weight_d,
            rows(layer.query).square_(),
            rows(layer.key).square_(),
        )
        return [x.sum(0, dtype=torch.float64) for x in sums]

    def accumulate(self, observed: Sequence[Tensor]) -> None:
        """Add what `observe` returned for the next sample, here or in another process."""
        self._sums = tuple(a + b for a, b in zip(self._sums, observed, strict=True)) if self._sums else tuple(observed)

    def finish(self, weights: LayerWeights) -> RowSensitivities:
        """The sensitivities over all samples so far; needs at least one."""
        counts, *sums = self._sums
        tokens, sum_o, sum_d = counts.tolist()
        attention, gate, up, query, key = (x / tokens for x in sums)
        gamma_o = weights.attention_norm.to(device="cpu", dtype=torch.float64).square()
        gamma_d = weights.mlp_norm.to(device="cpu", dtype=torch.float64).square()
        through_o = _column_energy(weights.output, gamma_o)
        through_d = _column_energy(weights.down, gamma_d)
        scores = float(gamma_o @ attention) / 4 / self._heads.query
        head_dim = len(key) // self._heads.key
        shared = self._heads.query // self._heads.key
        by_kv_head = (self._heads.key, shared, head_dim)
        return RowSensitivities(
            query=_floored(key.reshape(-1, 1, head_dim).expand(by_kv_head).reshape(-1) * scores / head_dim),
            key=_floored(query.reshape(by_kv_head).sum(1).reshape(-1) * scores / head_dim),
            value=_floored(through_o.reshape(by_kv_head).sum(1).reshape(-1) * sum_o / tokens),
            output=_floored(gamma_o * sum_o / tokens),
            gate_up=torch.cat([_floored(through_d * gate), _floored(through_d * up)]),
            down=_floored(gamma_d * sum_d / tokens),
        )


def _column_energy(weight: Tensor, by_row: Tensor) -> Tensor:
    """sum_n by_row[n] weight[n, k]^2: float64 [K], of a weight [N, K]."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in row_chunks(weight):
        part = weight[rows].to(device="cpu", dtype=torch.float32)
        total += by_row[rows].float() @ part.square()
    return total


def _floored(rows: Tensor) -> Tensor:
    return rows.clamp_min(LEAST_SHARE * float(rows.mean())).float()
