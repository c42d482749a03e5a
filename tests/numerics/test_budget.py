import pytest
import reference
import torch
from reference import stats_of
from torch import Tensor

from glmq.numerics.budget import rule_bits
from glmq.numerics.lowbit import safe_steps
from glmq.spec import Method, QuantType, StepRule, WeightScheme

SIGMA = WeightScheme(QuantType.W8A8S, StepRule.SIGMA, Method.COMPENSATED)


def entropy(weight: Tensor) -> float:
    q = torch.round(weight / safe_steps(weight, SIGMA)).clamp(-128, 127)
    return reference.entropy_bits(q.int().flatten().tolist())


def group() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    loud = torch.ones(40)
    loud[[3, 17]] = 20.0
    return torch.randn(300, 40, generator=generator) * loud, [torch.randn(n, 40, generator=generator) for n in (30, 10)]


def test_without_smoothing_the_budget_is_the_entropy_of_the_rules_integers() -> None:
    x, weights = group()
    assert rule_bits(weights, stats_of(x), SIGMA, smoothed=False) == pytest.approx([entropy(w) for w in weights])


def test_with_smoothing_it_is_the_least_over_the_vendors_thresholds() -> None:
    x, weights = group()
    stats = stats_of(x)
    half_range = (x.amax(0) - x.amin(0)) / 2
    wanted = (half_range / torch.cat(weights).abs().amax(0)).sqrt()
    spread = (x.square().mean() - x.mean().square()).sqrt()
    thresholds = [spread, *(h for h in half_range if h > spread)]
    tried = []
    for threshold in thresholds:
        scales = torch.where(half_range > threshold, wanted, 1.0)
        tried.append([entropy(w * scales) for w in weights])
    least = min(tried, key=lambda bits: sum(b * w.numel() for b, w in zip(bits, weights, strict=True)))
    found = rule_bits(weights, stats, SIGMA, smoothed=True)
    assert any(found == pytest.approx(bits) for bits in tried)
    # Not every threshold is tried: the least of those that are lies within 0.05 bits of the least of all.
    total = sum(w.numel() for w in weights)
    excess = sum((f - b) * w.numel() for f, b, w in zip(found, least, weights, strict=True)) / total
    assert 0 <= excess + 1e-9 < 0.05
