import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmq.errors import UsageError
from glmq.numerics import rows
from glmq.numerics.lowbit import grid_of, kth_largest, quantize_in_storage_dtype, rule_steps, safe_steps
from glmq.spec import INT8, INT8_SYMMETRIC, FloatDtype, Method, QuantType, StepRule, WeightScheme

SPARSE = (StepRule.SIGMA, StepRule.FRACTION, StepRule.TENSOR_FRACTION)


def scheme(rule: StepRule, **changes: float | bool) -> WeightScheme:
    return WeightScheme(QuantType.W8A8S, rule, Method.PLAIN, **changes)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return normal**3


@pytest.mark.parametrize("shape", [(1, 100), (5, 128), (17, 333)])
@pytest.mark.parametrize("factor", [1.0, 2.5, 3.0])
def test_sigma_steps_equal_the_rule_row_by_row(shape: tuple[int, int], factor: float) -> None:
    weight = heavy_tailed(*shape)
    steps = rule_steps(weight, scheme(StepRule.SIGMA, sigma_factor=factor))
    assert steps[:, 0].tolist() == [reference.sigma_step(row, factor) for row in weight.tolist()]


@pytest.mark.parametrize("shape", [(1, 100), (5, 128), (17, 333)])
@pytest.mark.parametrize("fraction", [0.01, 0.055, 0.1])
def test_fraction_steps_equal_the_rules(shape: tuple[int, int], fraction: float) -> None:
    weight = heavy_tailed(*shape)
    values = weight.tolist()
    steps = rule_steps(weight, scheme(StepRule.FRACTION, fraction=fraction))
    assert steps[:, 0].tolist() == [reference.fraction_step(row, fraction) for row in values]
    steps = rule_steps(weight, scheme(StepRule.TENSOR_FRACTION, fraction=fraction))
    assert steps[:, 0].tolist() == reference.tensor_fraction_steps(values, fraction)


@pytest.mark.slow
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(1, 40)
)
@settings(deadline=None)
def test_kth_largest_equals_sorting(values: list[float], k: int) -> None:
    k = min(k, len(values))
    assert kth_largest(torch.tensor([values]), k) == sorted(map(abs, values), reverse=True)[k - 1]


def test_rows_in_chunks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(23, 50)
    whole = [rule_steps(weight, scheme(rule, fraction=0.1)) for rule in SPARSE]
    monkeypatch.setattr(rows, "CHUNK_WEIGHTS", 170)
    assert len(list(rows.row_chunks(weight))) == 8
    for rule, steps in zip(SPARSE, whole):
        assert torch.equal(rule_steps(weight, scheme(rule, fraction=0.1)), steps)


def test_every_weight_is_kept_in_rows_that_the_exact_rules_cut() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    weight[1, 7] = 1000.0  # beyond 127 steps of the bulk
    for rule in SPARSE:
        exact, safe = rule_steps(weight, scheme(rule)), safe_steps(weight, scheme(rule))
        assert float(weight[1, 7] / exact[1]) > 127.5
        assert safe[1].item() == torch.tensor(1000.0).div(127).item()
        assert torch.equal(safe[[0, 2, 3]], exact[[0, 2, 3]])


@pytest.mark.parametrize("rule", SPARSE)
def test_odd_rows_get_a_positive_step_and_lose_nothing(rule: StepRule) -> None:
    weight = torch.zeros(4, 200)
    weight[0] = 0.25  # constant magnitude
    weight[0, ::2] = -0.25
    weight[1, 5] = 3.0  # one huge weight
    weight[2] = torch.linspace(-1, 1, 200)
    steps = safe_steps(weight, scheme(rule))  # row 3 is all zero
    assert bool((steps > 0).all())
    assert bool((weight.abs() <= 127.5 * steps).all())
    restored = torch.round(weight / steps) * steps
    assert torch.equal(restored[[0, 1, 3]], weight[[0, 1, 3]])
    assert steps[3].item() == steps[:3].max().item()


def test_an_all_zero_tensor_has_steps_of_one() -> None:
    for rule in StepRule:
        assert safe_steps(torch.zeros(2, 150), scheme(rule)).tolist() == [[1.0], [1.0]]


def test_without_outliers_the_step_covers_the_row() -> None:
    weight = heavy_tailed(3, 200)
    for rule in SPARSE:
        steps = rule_steps(weight, scheme(rule, keep_outliers=False))
        assert torch.equal(steps, weight.abs().amax(1, keepdim=True) / 7)
    assert torch.equal(rule_steps(weight, scheme(StepRule.ROW_MAX)), weight.abs().amax(1, keepdim=True) / 127)


def test_a_row_too_short_for_the_fraction_is_refused_by_the_exact_rule_only() -> None:
    weight = heavy_tailed(2, 64)
    with pytest.raises(UsageError) as caught:
        rule_steps(weight, scheme(StepRule.FRACTION, fraction=0.01))
    assert str(caught.value) == (
        "fraction 0.01 of a row of 64 weights is less than one weight: use a larger fraction, or another method"
    )
    assert torch.equal(safe_steps(weight, scheme(StepRule.FRACTION, fraction=0.01)), weight.abs().amax(1)[:, None] / 7)


def test_eight_bit_integers_come_from_a_division_in_the_model_dtype() -> None:
    weight = heavy_tailed(6, 90)
    weight[4] = 0.0
    q, step = quantize_in_storage_dtype(weight, FloatDtype.FP16)
    half = weight.half().numpy()
    for row in range(6):
        expected = abs(half[row]).max() / half.dtype.type(127)
        assert step[row].item() == (float(expected) if row != 4 else 1.0)
        if row != 4:
            ratios = half[row] / expected
            assert q[row].tolist() == [max(-128, min(127, round(float(r)))) for r in ratios]
    assert not q[4].any()


def test_only_co_sparse_spares_minus_128() -> None:
    assert grid_of(scheme(StepRule.TENSOR_FRACTION)) == INT8_SYMMETRIC
    assert {grid_of(scheme(rule)) for rule in (StepRule.SIGMA, StepRule.FRACTION, StepRule.ROW_MAX)} == {INT8}
