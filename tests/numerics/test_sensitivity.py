"""Row sensitivities: the formulas, term by term in float64, and that samples may be observed by anybody in any number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glmq.numerics.sensitivity import (
    TOKENS,
    Heads,
    LayerOutputs,
    LayerWeights,
    RowSensitivities,
    SensitivityAccumulator,
)

HIDDEN, INNER, HEAD, QUERY, KV = 6, 5, 2, 4, 2
HEADS = Heads(QUERY, KV)


def outputs(tokens: int, seed: int) -> LayerOutputs:
    g = torch.Generator().manual_seed(seed)
    widths = (QUERY * HEAD, KV * HEAD, HIDDEN, 2 * INNER, HIDDEN, HIDDEN)
    return LayerOutputs(*(torch.randn(tokens, width, generator=g) * (1 + i) for i, width in enumerate(widths)))


def weights() -> LayerWeights:
    g = torch.Generator().manual_seed(5)
    return LayerWeights(
        torch.rand(HIDDEN, generator=g) + 0.5,
        torch.rand(HIDDEN, generator=g) + 0.5,
        torch.randn(HIDDEN, QUERY * HEAD, generator=g),
        torch.randn(HIDDEN, INNER, generator=g),
    )


def fields(rows: RowSensitivities) -> dict[str, Tensor]:
    return {name: getattr(rows, name) for name in ("query", "key", "value", "output", "gate_up", "down")}


def floored(rows: list[float]) -> Tensor:
    x = torch.tensor(rows, dtype=torch.float64)
    return x.clamp_min(0.05 * float(x.mean())).float()


def expected(layer: LayerOutputs, w: LayerWeights) -> dict[str, Tensor]:
    """Token by token and channel by channel, as the text beside the formulas says."""
    o, d, r = layer.attention.double(), layer.mlp.double(), layer.residual.double()
    q, k, gate_up = layer.query.double(), layer.key.double(), layer.gate_up.double()
    tokens = len(o)
    ms = [
        (float(o[t].square().mean()), float(d[t].square().mean()), float(r[t].square().mean())) for t in range(tokens)
    ]
    t_o = sum(1 / (a * c) for a, _, c in ms) / tokens
    t_d = sum(1 / (b * c) for _, b, c in ms) / tokens
    gamma_o, gamma_d = w.attention_norm.double().square().tolist(), w.mlp_norm.double().square().tolist()
    s = sum(gamma_o[n] * float(o[t, n]) ** 2 / (ms[t][0] * ms[t][2]) for t in range(tokens) for n in range(HIDDEN))
    s = s / tokens / 4
    gate, up = [], []
    for i in range(INNER):
        c = sum(gamma_d[n] * float(w.down[n, i]) ** 2 for n in range(HIDDEN))
        g = gate_up[:, i].clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(torch.nn.functional.silu(g).sum(), g)
        u = gate_up[:, INNER + i]
        silu = torch.nn.functional.silu(g).detach()
        gate.append(c * sum(float(slope[t] * u[t]) ** 2 / (ms[t][1] * ms[t][2]) for t in range(tokens)) / tokens)
        up.append(c * sum(float(silu[t]) ** 2 / (ms[t][1] * ms[t][2]) for t in range(tokens)) / tokens)
    value, query, key = [], [], [0.0] * (KV * HEAD)
    for h in range(KV):
        for j in range(HEAD):
            own = [(h * QUERY // KV + i) * HEAD + j for i in range(QUERY // KV)]
            value.append(t_o * sum(gamma_o[n] * float(w.output[n, c]) ** 2 for c in own for n in range(HIDDEN)))
    for h in range(QUERY):
        for j in range(HEAD):
            channel = h // (QUERY // KV) * HEAD + j
            query.append(float(k[:, channel].square().mean()) / HEAD * s / QUERY)
            key[channel] += float(q[:, h * HEAD + j].square().mean()) / HEAD * s / QUERY
    return {
        "query": floored(query),
        "key": floored(key),
        "value": floored(value),
        "output": floored([g * t_o for g in gamma_o]),
        "gate_up": torch.cat([floored(gate), floored(up)]),
        "down": floored([g * t_d for g in gamma_d]),
    }


def test_every_linear_has_what_its_formula_says() -> None:
    layer, w = outputs(7, 0), weights()
    accumulator = SensitivityAccumulator(HEADS)
    accumulator.accumulate(accumulator.observe(layer))
    found = fields(accumulator.finish(w))
    for name, rows in expected(layer, w).items():
        assert torch.allclose(found[name], rows, rtol=1e-5), name


def test_samples_have_the_same_sums_whoever_observes_them() -> None:
    samples, w = [outputs(5, 1), outputs(9, 2), outputs(1, 3)], weights()
    one = SensitivityAccumulator(HEADS)
    for sample in samples:
        one.accumulate(one.observe(sample))
    others = [SensitivityAccumulator(HEADS) for _ in samples]
    observed = [other.observe(sample) for other, sample in zip(others, samples, strict=True)]
    for look in observed:
        others[0].accumulate(look)
    for a, b in zip(fields(one.finish(w)).values(), fields(others[0].finish(w)).values(), strict=True):
        assert torch.equal(a, b)


def test_of_a_long_sample_some_tokens_stand_for_all() -> None:
    accumulator = SensitivityAccumulator(HEADS)
    assert accumulator.observe(outputs(TOKENS + 40, 0))[0][0] == TOKENS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision_or_without_any_output_gives_finite_numbers(dtype: torch.dtype) -> None:
    layer = outputs(4, 0)
    parts = [getattr(layer, name).to(dtype) * 0 for name in ("query", "key", "attention", "gate_up", "mlp", "residual")]
    accumulator = SensitivityAccumulator(HEADS)
    accumulator.accumulate(accumulator.observe(LayerOutputs(*parts)))
    assert all(bool(rows.isfinite().all()) for rows in fields(accumulator.finish(weights())).values())
