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


def test_with_smoothing_it_is_a_quarter_of_the_way_from_the_mean_over_the_vendors_thresholds_to_the_least() -> None:
    x, weights = group()
    half_range = (x.amax(0) - x.amin(0)) / 2
    wanted = (half_range / torch.cat(weights).abs().amax(0)).sqrt()
    spread = (x.square().mean() - x.mean().square()).sqrt()
    above = sorted((h for h in half_range.tolist() if h > spread), reverse=True)
    counts = sorted({round(len(above) * (i / 12) ** 2) for i in range(13)})
    assert (len(above), counts[:4]) == (2, [0, 1, 2])
    tried = []
    for count in counts:
        threshold = above[count - 1] if count else float("inf")
        scales = torch.where(half_range >= threshold, wanted, 1.0)
        tried.append([entropy(w * scales) for w in weights])
    least = min(tried, key=lambda bits: sum(b * w.numel() for b, w in zip(bits, weights, strict=True)))
    expected = [b / 4 + sum(t[i] for t in tried) / 4 for i, b in enumerate(least)]
    assert rule_bits(weights, stats_of(x), SIGMA, smoothed=True) == pytest.approx(expected)
