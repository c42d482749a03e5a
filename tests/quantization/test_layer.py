"""quantize_group against the formulas, on one small norm group with outlier channels."""

import dataclasses
import functools
import math
from dataclasses import replace

import pytest
import reference
import torch
from reference import stats_of
from torch import Tensor

from glmq.checkpoint.ascend import encode_row_scale
from glmq.errors import StatisticsError
from glmq.numerics import hessian, ranges
from glmq.numerics.affine import activation_qparams
from glmq.numerics.int8_linear import run_linear
from glmq.numerics.metrics import relative_l2
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import mean_rule_bits, solve_bits
from glmq.quantization import group, layer
from glmq.quantization.group import NO_FOLD, FloatLinear, GroupScheme, RowFold
from glmq.quantization.layer import GroupResult, rate_curves
from glmq.spec import ActRange, FloatDtype, Method, QuantType, Smoothing, StepRule, WeightScheme

K = 128
SIGMA = WeightScheme(QuantType.W8A8S, StepRule.SIGMA, Method.COMPENSATED)
WEIGHTS = {
    "sigma": SIGMA,
    "fraction": replace(SIGMA, step_rule=StepRule.FRACTION),
    "co_sparse": replace(SIGMA, step_rule=StepRule.TENSOR_FRACTION),
    "w8a8": replace(SIGMA, quant_type=QuantType.W8A8, step_rule=StepRule.ROW_MAX),
    "dynamic": replace(SIGMA, quant_type=QuantType.W8A8_DYNAMIC, step_rule=StepRule.ROW_MAX),
    "w4a8": replace(SIGMA, quant_type=QuantType.W4A8_DYNAMIC, step_rule=StepRule.ROW_MAX, group_size=64),
}


def scheme(weight: WeightScheme = SIGMA, **changes: object) -> GroupScheme:
    return replace(GroupScheme(weight, Smoothing.M2, ActRange.HISTOGRAM, bias_correction=False), **changes)


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NORM = normals(K, seed=1).abs().add(0.5).bfloat16()
TOKENS = normals(600, 24, seed=2) @ normals(24, K, seed=3) / 5 + normals(600, K, seed=4) / 2


def problem() -> tuple[list[FloatLinear], InputStats]:
    """q, k, v of a layer whose norm has three loud channels."""
    loud = torch.ones(K)
    loud[[5, 60, 99]] = 20.0
    linears = [
        FloatLinear("q", normals(48, K, seed=5) / loud / 10, normals(48, seed=8)),
        FloatLinear("k", normals(16, K, seed=6) / loud / 10, normals(16, seed=9)),
        FloatLinear("v", normals(16, K, seed=7) / loud / 10, None),
    ]
    return linears, stats_of(TOKENS * NORM.float() * loud)


def quantize_group(
    linears: list[FloatLinear], stats: InputStats, scheme: GroupScheme, **options: object
) -> GroupResult:
    """Quantized and measured."""
    return layer.measure_group(linears, stats, scheme, layer.quantize_group(linears, stats, scheme, **options))


@functools.cache
def quantized(weight: WeightScheme, dtype: FloatDtype = FloatDtype.FP16, **changes: object) -> GroupResult:
    linears, stats = problem()
    return quantize_group(linears, stats, scheme(weight, **changes), norm_weight=NORM, dtype=dtype)


@pytest.mark.parametrize("dtype", list(FloatDtype))
@pytest.mark.parametrize("mode", ["sigma", "w8a8"])
def test_static_tensors_obey_the_formulas(mode: str, dtype: FloatDtype) -> None:
    result = quantized(WEIGHTS[mode], dtype)
    params = {linear.activation for linear in result.linears}
    assert len(params) == 1  # q, k and v read one input
    (shared,) = params
    assert shared is not None
    if dtype is FloatDtype.BF16:
        assert torch.tensor(shared.scale).bfloat16().item() == shared.scale
    for linear, source in zip(result.linears, problem()[0], strict=True):
        assert linear.deq_scale is not None
        assert linear.quant_bias is not None
        assert torch.equal(linear.deq_scale, (linear.weight_scale * torch.tensor(shared.scale)).reshape(-1))
        for row in range(len(source.weight)):
            bias = 0.0 if source.bias is None else source.bias[row].item() / linear.deq_scale[row].item()
            expected = round(bias - shared.offset * linear.weight[row].int().sum().item())
            assert linear.quant_bias[row].item() == expected
        assert (linear.bias is None) == (source.bias is None)
        assert linear.bias is None or torch.equal(linear.bias, source.bias)


@pytest.mark.parametrize("mode", list(WEIGHTS))
@pytest.mark.parametrize("method", list(Method))
def test_the_same_inputs_give_the_same_bits_and_are_not_changed(mode: str, method: Method) -> None:
    weight = replace(WEIGHTS[mode], method=method)
    linears, stats = problem()
    first = quantize_group(linears, stats, scheme(weight), norm_weight=NORM, dtype=FloatDtype.FP16)
    second = quantized(weight)
    assert first.norm_weight is not None
    assert second.norm_weight is not None
    assert torch.equal(first.norm_weight, second.norm_weight)
    for a, b in zip(first.linears, second.linears, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    for now, before in zip(linears, problem()[0], strict=True):
        assert torch.equal(now.weight, before.weight)


@pytest.mark.parametrize("mode", ["sigma", "fraction", "co_sparse"])
def test_reference_integers_of_sparse_types_are_the_vendors(mode: str) -> None:
    result = quantized(replace(WEIGHTS[mode], method=Method.REFERENCE), smoothing=Smoothing.NONE)
    for linear, source in zip(result.linears, problem()[0], strict=True):
        rows = source.weight.tolist()
        match mode:
            case "sigma":
                steps = [reference.sigma_step(row, 3.0) for row in rows]
            case "fraction":
                steps = [reference.fraction_step(row, 0.01) for row in rows]
            case _:
                steps = reference.tensor_fraction_steps(rows, 0.01)
        low = -127 if mode == "co_sparse" else -128
        assert linear.weight_scale[:, 0].tolist() == steps
        assert linear.weight.tolist() == [
            [reference.quantize(w, step, 0, low, 127) for w in row] for row, step in zip(rows, steps, strict=True)
        ]


def test_reference_integers_of_two_stages_are_the_vendors() -> None:
    result = quantized(replace(WEIGHTS["w4a8"], method=Method.REFERENCE), smoothing=Smoothing.NONE)
    for linear, source in zip(result.linears, problem()[0], strict=True):
        assert linear.weight_scale_second is not None
        for row, values in enumerate(source.weight.tolist()):
            q, step, second = reference.two_stage(values, 64)
            assert linear.weight[row].tolist() == q
            assert linear.weight_scale[row].item() == step
            assert linear.weight_scale_second[row].tolist() == second


def test_reference_integers_of_eight_bits_divide_in_the_model_dtype() -> None:
    result = quantized(replace(WEIGHTS["w8a8"], method=Method.REFERENCE), smoothing=Smoothing.NONE)
    for linear, source in zip(result.linears, problem()[0], strict=True):
        half = source.weight.half()
        step = half.abs().amax(1, keepdim=True) / 127
        assert torch.equal(linear.weight, torch.round(half / step).to(torch.int8))
        assert torch.equal(linear.weight_scale, step.float())


@pytest.mark.parametrize("dtype", list(FloatDtype))
def test_the_smoothed_group_is_the_same_function(dtype: FloatDtype) -> None:
    result = quantized(SIGMA, dtype)
    assert result.norm_weight is not None
    assert result.scales is not None
    # norm / norm' in float32, so norm' * scales returns the norm within one float32 rounding.
    assert torch.allclose(result.norm_weight.float() * result.scales, NORM.float(), rtol=2.0**-23, atol=0)
    assert float(result.scales[60] / result.scales.median()) > 3  # a loud channel


def test_without_a_norm_nothing_is_smoothed() -> None:
    linears, stats = problem()
    result = quantize_group(linears[:1], stats, scheme(), norm_weight=None, dtype=FloatDtype.FP16)
    assert result.norm_weight is None
    assert result.scales is None
    assert result.reports[0].smoothing == "none"
    kept = quantized(SIGMA, FloatDtype.FP16, smoothing=Smoothing.NONE)
    assert kept.scales is None
    assert kept.norm_weight is not None
    assert torch.equal(kept.norm_weight, NORM.half())


@pytest.mark.parametrize("mode", list(WEIGHTS))
def test_compensation_loses_less_than_nearest_rounding(mode: str) -> None:
    """Sparse types at the entropy of the rule's integers on the same scales, the others at the same steps."""
    plain = quantized(replace(WEIGHTS[mode], method=Method.PLAIN))
    linears, stats = problem()
    bits = [r.entropy_bits for r in plain.reports] if WEIGHTS[mode].quant_type is QuantType.W8A8S else None
    better = quantize_group(linears, stats, scheme(WEIGHTS[mode]), norm_weight=NORM, dtype=FloatDtype.FP16, bits=bits)
    for old, new in zip(plain.reports, better.reports, strict=True):
        assert new.output_error < (0.95 if mode in ("w8a8", "dynamic") else 0.75) * old.output_error
        if bits is not None:
            assert new.entropy_bits <= old.entropy_bits


def test_entropies_stay_below_what_was_asked_for_and_close_to_it() -> None:
    linears, stats = problem()
    wanted = [3.0, 4.5, 2.25]
    result = quantize_group(linears, stats, scheme(), norm_weight=NORM, dtype=FloatDtype.FP16, bits=wanted)
    for report, bits in zip(result.reports, wanted, strict=True):
        # 2048 weights at least: moving one changes the entropy by less than 0.01 bits, the search stops within 0.002.
        assert bits - 0.02 < report.entropy_bits <= bits


@pytest.mark.parametrize(("mode", "limit"), [("w8a8", 6.5), ("dynamic", 6.5), ("w4a8", 2.5)])
def test_integers_of_fixed_types_stay_below_the_bits_asked_for(mode: str, limit: float) -> None:
    linears, stats = problem()
    finest = quantized(WEIGHTS[mode])
    result = quantize_group(
        linears, stats, scheme(WEIGHTS[mode]), norm_weight=NORM, dtype=FloatDtype.FP16, bits=[limit] * 3
    )
    for report, free in zip(result.reports, finest.reports, strict=True):
        assert limit - 0.15 < report.entropy_bits <= limit < free.entropy_bits


def test_a_group_by_itself_divides_what_the_rule_spends_on_it() -> None:
    linears, stats = problem()
    curves, _ = rate_curves(linears, stats, scheme(), norm_weight=NORM, dtype=FloatDtype.FP16)
    assert [c.name for c in curves] == ["q", "k", "v"]
    assert [c.weights for c in curves] == [48 * K, 16 * K, 16 * K]
    entropies = [r.entropy_bits for r in quantized(SIGMA).reports]
    spent = sum(b * c.weights for b, c in zip(entropies, curves, strict=True)) / sum(c.weights for c in curves)
    assert mean_rule_bits(curves) - 0.02 < spent <= mean_rule_bits(curves)
    # The curves use the curvature before smoothing, the group its own: what they divide differs a little.
    assert entropies == pytest.approx(solve_bits(curves, mean_rule_bits(curves)), abs=0.1)
    assert entropies[1] > entropies[0]  # the smaller linear buys more accuracy for its bits


def test_what_the_rating_pass_chose_is_not_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, stats = problem()
    _, known = rate_curves(linears, stats, scheme(), norm_weight=NORM, dtype=FloatDtype.FP16)
    kept = (getattr(known, field.name) for field in dataclasses.fields(known))
    assert all(
        part.ndim < 2 for part in kept if isinstance(part, Tensor)
    )  # a factor of every group would fill the memory
    fresh = quantized(SIGMA)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(hessian, "rounding_order", again)
    monkeypatch.setattr(group, "choose_scales", again)
    monkeypatch.setattr(ranges, "histogram_range", again)
    result = quantize_group(linears, stats, scheme(), norm_weight=NORM, dtype=FloatDtype.FP16, known=known)
    for one, other in zip(result.linears, fresh.linears, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.weight_scale, other.weight_scale)
        assert one.activation == other.activation
    assert [replace(r, seconds=0) for r in result.reports] == [replace(r, seconds=0) for r in fresh.reports]


def test_no_outlier_is_lost_and_the_reference_says_what_it_cuts() -> None:
    linears, stats = problem()
    linears[0].weight[3, 60] = 50.0
    for method, cut in ((Method.PLAIN, 0), (Method.COMPENSATED, 0), (Method.REFERENCE, 1)):
        group = scheme(replace(SIGMA, method=method), smoothing=Smoothing.NONE)
        result = quantize_group(linears, stats, group, norm_weight=NORM, dtype=FloatDtype.FP16)
        assert result.reports[0].saturated == cut
        assert abs(int(result.linears[0].weight[3, 60])) == 127


@pytest.mark.parametrize("mode", list(WEIGHTS))
@pytest.mark.parametrize("method", list(Method))
def test_dead_rows_and_dead_channels_give_finite_tensors(mode: str, method: Method) -> None:
    linears, stats = problem()
    for linear in linears:
        linear.weight[2] = 0.0
        linear.weight[3] *= 1e-37  # as good as dead
        linear.weight[:, 7] = 0.0
    stats = stats_of(stats.sample * (torch.arange(K) != 11))
    group = scheme(replace(WEIGHTS[mode], method=method))
    result = quantize_group(linears, stats, group, norm_weight=NORM, dtype=FloatDtype.FP16)
    for linear in result.linears:
        assert not linear.weight[2:4].any()
        assert bool((linear.weight_scale > 0).all())
        assert bool(linear.weight_scale.isfinite().all())
        if linear.deq_scale is not None:
            assert bool((linear.deq_scale >= torch.finfo(torch.float32).tiny).all())


def test_a_bias_too_large_for_int32_widens_the_step_of_its_row() -> None:
    linears, stats = problem()
    linears[0].weight[4] *= 1e-12
    assert linears[0].bias is not None
    linears[0].bias[4] = 3.0
    result = quantize_group(linears, stats, scheme(WEIGHTS["w8a8"]), norm_weight=NORM, dtype=FloatDtype.FP16)
    linear = result.linears[0]
    assert linear.quant_bias is not None
    assert linear.deq_scale is not None
    assert abs(int(linear.quant_bias[4])) <= 2**30 + 128 * 128 * K
    assert float(linear.quant_bias[4]) * float(linear.deq_scale[4]) == pytest.approx(3.0, rel=1e-6)  # one step of 2^30


@pytest.mark.parametrize(("method", "dtype"), [(Method.PLAIN, FloatDtype.FP16), (Method.COMPENSATED, FloatDtype.BF16)])
@pytest.mark.parametrize("mode", ["w8a8", "sigma", "fraction"])
@pytest.mark.parametrize("dead", [slice(2, 48, 4), slice(None)], ids=["some rows", "all rows"])
def test_rows_of_zeros_keep_their_bias(mode: str, method: Method, dtype: FloatDtype, dead: slice) -> None:
    linears, stats = problem()
    linears[0].weight[1] *= 1000.0  # whose step was that of the rows of zeros too
    linears[0].weight[dead] = 0.0
    bias = linears[0].bias
    assert bias is not None
    bias[2] = 0.003
    bias[6] = 0.0
    group = scheme(replace(WEIGHTS[mode], method=method))
    result = quantize_group(linears, stats, group, norm_weight=NORM, dtype=dtype)
    linear = result.linears[0]
    assert linear.quant_bias is not None
    assert linear.deq_scale is not None
    assert not linear.weight[dead].any()
    assert torch.allclose((linear.quant_bias * linear.deq_scale)[dead], bias[dead], rtol=1e-5, atol=0)
    assert int(linear.quant_bias[dead].abs().max()) <= 2**23
    step = linear.weight_scale[dead][bias[dead] != 0]
    if mode == "w8a8":  # the sparse type stores no steps
        assert torch.equal(step, encode_row_scale(step, dtype).float())


def test_a_row_that_rounds_to_zeros_still_does_on_the_step_that_its_bias_asks_for() -> None:
    linears, stats = problem()
    linears[0].weight[2] = linears[0].weight.abs().max() * 1e-5
    bias = linears[0].bias
    assert bias is not None
    bias[2] = 1e-6
    weight = replace(SIGMA, method=Method.PLAIN)
    result = quantize_group(
        linears, stats, scheme(weight, smoothing=Smoothing.NONE), norm_weight=NORM, dtype=FloatDtype.FP16,
        bits=[3.0, 3.0, 3.0],
    )  # fmt: skip
    linear = result.linears[0]
    assert not linear.weight[2].any()
    top = float(linears[0].weight[2].max())
    assert 2 * top < float(linear.weight_scale[2]) <= 4 * top


@pytest.mark.parametrize("mode", ["w8a8", "sigma"])
def test_the_reference_leaves_the_vendors_steps_to_rows_of_zeros(mode: str) -> None:
    linears, stats = problem()
    linears[0].weight[2] = 0.0
    group = scheme(replace(WEIGHTS[mode], method=Method.REFERENCE))
    result = quantize_group(linears, stats, group, norm_weight=NORM, dtype=FloatDtype.FP16)
    assert float(result.linears[0].weight_scale[2]) == 1.0


def test_bias_correction_returns_the_mean_output() -> None:
    linears, stats = problem()
    shifted = stats_of(stats.sample + 3 * stats.square_mean.sqrt())  # inputs with a mean
    errors = {}
    for corrected in (False, True):
        result = quantize_group(
            linears,
            shifted,
            scheme(replace(SIGMA, method=Method.PLAIN), bias_correction=corrected),
            norm_weight=NORM,
            dtype=FloatDtype.FP16,
        )
        assert result.scales is not None
        y = run_linear(shifted.sample / result.scales, result.linears[0])
        exact = torch.nn.functional.linear(shifted.sample, linears[0].weight, linears[0].bias)
        errors[corrected] = float((y - exact).mean(0).abs().mean())
    assert errors[True] < errors[False] / 5


@pytest.mark.parametrize("act_range", list(ActRange))
def test_activation_ranges_follow_the_method(act_range: ActRange) -> None:
    result = quantized(WEIGHTS["w8a8"], act_range=act_range)
    _, stats = problem()
    assert result.scales is not None
    report = result.reports[0]
    x = stats.sample / result.scales
    exact = activation_qparams(float(x.min()), float(x.max()))
    if act_range is ActRange.MINMAX:
        assert result.linears[0].activation == exact
        assert report.clipped_share == 0.0
    assert report.input_low < -2 < 2 < report.input_high
    if act_range is ActRange.MIXED:
        found = {
            quantized(WEIGHTS["w8a8"], act_range=a).linears[0].activation for a in (ActRange.MINMAX, ActRange.HISTOGRAM)
        }
        assert result.linears[0].activation in found


@pytest.mark.parametrize("mode", list(WEIGHTS))
def test_a_report_says_what_was_measured(mode: str) -> None:
    linears, stats = problem()
    result = quantized(replace(WEIGHTS[mode], method=Method.PLAIN))
    assert result.scales is not None
    for linear, report, source in zip(result.linears, result.reports, linears, strict=True):
        step = linear.weight_scale
        if linear.weight_scale_second is not None:
            step = (step * linear.weight_scale_second).repeat_interleave(64, 1)
        smoothed = source.weight * result.scales
        values = linear.weight.int().flatten().tolist()
        y = torch.nn.functional.linear(stats.sample, source.weight, source.bias)
        assert (report.name, report.rows, report.cols) == (source.name, *source.weight.shape)
        assert (report.quant_type, report.method) == (WEIGHTS[mode].quant_type, "plain")
        assert report.entropy_bits == pytest.approx(reference.entropy_bits(values), abs=1e-9)
        assert report.outlier_share == sum(abs(v) > 7 for v in values) / len(values)
        assert report.zero_share == values.count(0) / len(values)
        assert report.output_error == relative_l2(run_linear(stats.sample / result.scales, linear), y)
        assert report.sqnr_db == -20 * math.log10(report.output_error)
        # Sums of some thousand float32 squares in another order.
        assert report.weight_error == pytest.approx(relative_l2(linear.weight.float() * step, smoothed), rel=1e-5)
        assert (report.step_min, report.step_max) == (
            linear.weight_scale.min().item(),
            linear.weight_scale.max().item(),
        )


def test_without_a_second_moment_integers_are_the_nearest_and_the_report_says_so() -> None:
    linears, stats = problem()
    narrow = replace(stats, second_moment=None)
    for mode in WEIGHTS:
        result = quantize_group(linears, narrow, scheme(WEIGHTS[mode]), norm_weight=NORM, dtype=FloatDtype.FP16)
        assert [r.method for r in result.reports] == ["plain"] * 3
        assert result.scales is not None
        if mode != "w4a8":
            q = torch.round(linears[0].weight * result.scales / result.linears[0].weight_scale).clamp(-128, 127)
            assert torch.equal(result.linears[0].weight, q.to(torch.int8))


def test_a_broken_second_moment_is_refused() -> None:
    linears, stats = problem()
    broken = replace(stats, second_moment=torch.full((K, K), torch.nan))
    with pytest.raises(StatisticsError, match="is not positive definite: calibrate again"):
        quantize_group(linears, broken, scheme(), norm_weight=NORM, dtype=FloatDtype.FP16)


@pytest.mark.parametrize(
    ("mode", "by_bits"),
    [*((mode, False) for mode in WEIGHTS), *((mode, True) for mode in ("sigma", "fraction", "co_sparse"))],
)
def test_rows_that_absorb_scales_keep_their_integers_and_numbers(mode: str, by_bits: bool) -> None:
    """Only the steps and biases are divided; co_sparse alone chooses its steps over all rows."""
    linears, stats = problem()
    divisor = torch.tensor([1.0, 2.0, 16.0, 1.0]).repeat(12)[:, None]
    bits = [3.0, 3.0, 3.0] if by_bits else None
    group = scheme(WEIGHTS[mode] if by_bits else replace(WEIGHTS[mode], method=Method.PLAIN))
    divided = [replace(linears[0], divisor=divisor), *linears[1:]]
    before, after = (
        quantize_group(some, stats, group, norm_weight=NORM, dtype=FloatDtype.BF16, bits=bits)
        for some in (linears, divided)
    )
    a, b = before.linears[0], after.linears[0]
    assert b.bias is not None
    assert linears[0].bias is not None
    assert torch.equal(b.bias, linears[0].bias / divisor[:, 0])
    if mode == "co_sparse" and not by_bits:
        return
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight_scale / divisor, b.weight_scale)
    assert a.activation == b.activation
    if a.quant_bias is not None:
        assert a.deq_scale is not None
        assert b.deq_scale is not None
        assert torch.equal(a.deq_scale / divisor[:, 0], b.deq_scale)
        assert torch.equal(a.quant_bias, b.quant_bias)
    same = ("weight_error", "output_error", "saturated", "entropy_bits")
    assert {f: getattr(before.reports[0], f) for f in same} == {f: getattr(after.reports[0], f) for f in same}


@pytest.mark.parametrize("mode", list(WEIGHTS))
def test_an_input_whose_rows_absorb_scales_is_the_same_function(mode: str) -> None:
    linears, stats = problem()
    scales = torch.ones(K)
    scales[[5, 60, 99]] = 16.0
    fold = RowFold(scales, "folded into v_proj, 1 to 16")
    plain, folded = (
        quantize_group(linears[:1], stats, scheme(WEIGHTS[mode]), norm_weight=None, dtype=FloatDtype.FP16, fold=some)
        for some in (NO_FOLD, fold)
    )
    assert folded.norm_weight is None
    assert folded.scales is scales
    assert folded.reports[0].smoothing == "folded into v_proj, 1 to 16"
    y = torch.nn.functional.linear(stats.sample, linears[0].weight, linears[0].bias)
    error = relative_l2(run_linear(stats.sample / scales, folded.linears[0]), y)
    assert folded.reports[0].output_error == error
    assert error < plain.reports[0].output_error  # the loud channels were what the activation's step is spent on


@pytest.mark.parametrize(
    ("act_range", "label"),
    [(ActRange.MINMAX, {"min-max"}), (ActRange.HISTOGRAM, {"histogram"}), (ActRange.MIXED, None)],
)
def test_the_report_says_which_range_was_chosen(act_range: ActRange, label: set[str] | None) -> None:
    result = quantized(WEIGHTS["w8a8"], act_range=act_range)
    found = {report.input_range for report in result.reports}
    if label is None:  # whichever has the chosen numbers
        label = {
            name
            for name, a in (("min-max", ActRange.MINMAX), ("histogram", ActRange.HISTOGRAM))
            if quantized(WEIGHTS["w8a8"], act_range=a).linears[0].activation == result.linears[0].activation
        }
    assert found == label
    assert {report.input_range for report in quantized(WEIGHTS["dynamic"]).reports} == {""}
