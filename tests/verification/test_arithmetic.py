"""The numbers of integer linears against slow sums."""

import math
from pathlib import Path

import pytest
import torch
from helpers import edit_tensors
from safetensors.torch import load_file
from torch import Tensor

from glmq.checkpoint.json_file import read_json_object
from glmq.checkpoint.reader import Checkpoint
from glmq.inspection.scaling import find_scalings
from glmq.model.config import read_config
from glmq.spec import INT4
from glmq.verification.arithmetic import (
    FP16_LIMIT,
    LinearArithmetic,
    judge_against_report,
    judge_distance,
    judge_linear,
    measure_linears,
)
from glmq.verification.distance import Distance, WeightDistance
from glmq.verification.findings import Check, Finding
from glmq.verification.origin import Origin

LAYER = "model.language_model.layers.0"
O = f"{LAYER}.self_attn.o_proj"
Q = f"{LAYER}.self_attn.q_proj"


def measure(candidate: Path, reference: Path | None) -> dict[str, LinearArithmetic]:
    with Checkpoint.open(candidate) as one:
        if reference is None:
            records = list(measure_linears(one, None, {}))
        else:
            with Checkpoint.open(reference) as other:
                groups = read_config(candidate).family.groups(read_config(candidate))
                records = list(measure_linears(one, other, find_scalings(other, one, groups)))
    return {record.name: record for record in records if isinstance(record, LinearArithmetic)}


@pytest.fixture(scope="module")
def numbers(tiny: Path, tiny_seed: Path) -> dict[str, LinearArithmetic]:
    return measure(tiny_seed, tiny)


def test_bounds_hold_for_the_worst_inputs_and_are_reached(
    numbers: dict[str, LinearArithmetic], tiny_seed: Path
) -> None:
    tensors = load_file(next(tiny_seed.glob("*.safetensors")))
    q, bias = tensors[f"{O}.weight"].long(), tensors[f"{O}.quant_bias"].long()
    deq = tensors[f"{O}.deq_scale"].int().view(torch.float32).double()
    largest_sum, largest_y = 0, 0.0
    for row in range(q.shape[0]):
        for worst in (torch.where(q[row] > 0, 127, -128), torch.where(q[row] > 0, -128, 127)):
            total = int((q[row] * worst).sum())
            largest_sum = max(largest_sum, abs(total), abs(total + int(bias[row])))
            largest_y = max(largest_y, abs(total + int(bias[row])) * float(deq[row]))
    found = numbers[O]
    assert found.accumulator_share == largest_sum / 2**31
    assert found.result_bound == pytest.approx(largest_y, rel=1e-15)
    assert found.bias_output == pytest.approx(float((bias.double() * deq).abs().max()), rel=1e-15)


def test_distances_and_gains_undo_the_smoothing(
    numbers: dict[str, LinearArithmetic], tiny: Path, tiny_seed: Path
) -> None:
    tensors = load_file(next(tiny_seed.glob("*.safetensors")))
    floats = {name: value for path in tiny.glob("*.safetensors") for name, value in load_file(path).items()}
    norm = f"{LAYER}.input_layernorm.weight"
    wanted = floats[f"{Q}.weight"].double() * (floats[norm].double() / tensors[norm].double())
    step = tensors[f"{Q}.deq_scale"].int().view(torch.float32).double() / tensors[f"{Q}.input_scale"].double()
    error = tensors[f"{Q}.weight"].double() * step[:, None] - wanted
    found = numbers[Q].against
    assert found is not None
    # float32 products of 36 864 weights against float64: 1e-6 each, far below what is compared.
    assert found.relative_l2 == pytest.approx(float(error.norm() / wanted.norm()), rel=1e-5)
    assert found.rms_steps == pytest.approx(float((error / step[:, None]).square().mean().sqrt()), rel=1e-5)
    q, u = tensors[f"{Q}.weight"].double(), wanted / step[:, None]
    nearest = u.round().clamp(-128, 127)
    floor = 4 * 2**-11
    for dim, (index, gain, allowed) in ((1, found.row_gain), (0, found.column_gain)):
        signal, length = u.square().sum(dim), u.shape[dim]
        gains, shrunk = (q * u).sum(dim) / signal, (nearest * u).sum(dim) / signal
        left = (q - gains.unsqueeze(dim) * u).square().mean(dim).sqrt()
        most = 2 * float(left.square().mean().sqrt())
        assert gain == pytest.approx(float(gains[index]), rel=1e-5)
        bias = (1 - shrunk if gain < 1 else shrunk - 1).clamp_min(0)[index]
        noise = (6 / math.sqrt(length) * left.clamp_max(most) if dim == 1 else torch.full_like(left, most)) / (
            signal / length
        ).sqrt()
        assert allowed == pytest.approx(float(bias + noise[index]) + floor, rel=1e-4)
    off = (q - u.clamp(-128.5, 127.5)).abs()
    row, column, steps, limit = found.outlier
    assert steps == pytest.approx(float(off[row, column]), rel=1e-4)
    assert row == int(off[:, column].argmax())
    others = torch.cat([off[:row, column], off[row + 1 :, column]])
    assert limit == pytest.approx(max(2.0, 12 * float(others.square().mean().sqrt())), rel=1e-4)
    assert found.gain[0] == pytest.approx(float((q * u).sum() / u.square().sum()), rel=1e-6)


def test_what_coarse_groups_push_into_fine_ones_is_measured_by_the_steps_of_the_row() -> None:
    torch.manual_seed(0)
    q = torch.randint(-7, 8, (64, 128)).float()
    steps = torch.full((64, 128), 0.01)
    steps[3, 64:] = 0.08  # a row whose second half is coarse
    wanted = q * steps + 0.3 * steps * torch.randn(64, 128).sign()
    q[3, 5] = q[9, 70] = 4
    wanted[3, 5] = 0.04 - 0.07  # seven of its own steps, one and a quarter of the row's
    wanted[9, 70] = 0.04 - 0.065  # in a row like the others
    sums = Distance(64, 128, 2, INT4, "F16")
    sums.add(0, q, wanted, steps)
    row, column, found, allowed = sums.finish().outlier
    assert (row, column) == (9, 70)
    assert found == pytest.approx(6.5, rel=1e-3)
    assert allowed == pytest.approx(12 * 0.3, rel=1e-3)
    wanted[9, 70] = 0.04 - 0.003
    sums = Distance(64, 128, 2, INT4, "F16")
    sums.add(0, q, wanted, steps)
    row, column, found, allowed = sums.finish().outlier
    assert (row, column) == (3, 5)
    assert found == pytest.approx(7 * 0.01 / math.sqrt((0.01**2 + 0.08**2) / 2), rel=1e-3)
    assert found < allowed / 2


def test_integers_are_counted_as_the_report_counts_them(numbers: dict[str, LinearArithmetic], tiny_seed: Path) -> None:
    report = read_json_object(tiny_seed / "glmq_report.json")
    assert [finding for linear in numbers.values() for finding in judge_against_report(linear, report)] == []
    assert len(numbers) == 30


def test_without_a_reference_there_is_no_distance(tiny_seed: Path) -> None:
    assert all(linear.against is None for linear in measure(tiny_seed, None).values())


def good_linear(**changes: object) -> LinearArithmetic:
    fields = {
        "name": O, "type": "INT8", "entropy_bits": 4.0, "zero_share": 0.1, "outlier_share": 0.1,
        "accumulator_share": 0.001, "bias_output": 1.0, "result_bound": 100.0, "against": distance(),
    }  # fmt: skip
    return LinearArithmetic(**{**fields, **changes})  # type: ignore[arg-type]


def distance(**changes: object) -> WeightDistance:
    fields = {
        "relative_l2": 0.01, "rms_steps": 0.29, "size_steps": 40.0, "is_zeroed": False,
        "outlier": (3, 5, 0.5, 2.0), "row_gain": (0, 1.0, 0.05),
        "column_gain": (0, 1.0, 0.05), "group_gain": None, "gain": (1.0, 0.01),
    }  # fmt: skip
    return WeightDistance(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_good_linear_has_no_findings() -> None:
    assert list(judge_linear(good_linear(), is_fp16=True)) == []
    assert list(judge_distance(O, distance(), Origin.UNKNOWN)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulator_share": 1.5}, "lets int32 sums reach 1.5 times what an int32 can hold"),
        ({"bias_output": FP16_LIMIT * 2}, "stands for 1.31e+05, float16 results end at 65504"),
    ],
)
def test_sums_that_overflow_are_errors(changes: dict[str, object], message: str) -> None:
    (finding,) = judge_linear(good_linear(**changes), is_fp16=True)
    assert (finding.severity, finding.tensor, finding.message) == ("error", f"{O}.quant_bias", message)


@pytest.mark.parametrize(
    ("changes", "check", "fact", "cause"),
    [
        ({"rms_steps": 1.5, "size_steps": 2.0}, Check.WEIGHT_DISTANCE,
         "is 1.5 steps from the float weight, root mean square, which itself is 2 steps: rounding to nearest gives 0.29",
         "it is another weight, or its steps are wrong"),
        ({"outlier": (3, 5, 40.0, 3.6)}, Check.INTEGERS,
         "has a weight 40 steps from the float one in row 3, column 5, wanted at most 3.6 in that column",
         "was a bit flipped?"),
        ({"group_gain": (9, 2.0, 0.4)}, Check.INTEGERS,
         "group 9 is 2 times the float group, wanted 1 within 0.4", "its second scale or the group is wrong"),
        ({"row_gain": (7, 2.0, 0.05)}, Check.INTEGERS,
         "row 7 is 2 times the float row, wanted 1 within 0.05", "its step or the row is wrong"),
        ({"row_gain": (7, math.nan, 0.05)}, Check.INTEGERS,
         "row 7 is nan times the float row, wanted 1 within 0.05", "its step or the row is wrong"),
        ({"column_gain": (7, 0.5, 0.05)}, Check.INTEGERS,
         "column 7 is 0.5 times the float column, wanted 1 within 0.05", "the norm in front or the column is wrong"),
        ({"gain": (1.02, 0.01)}, Check.INTEGERS,
         "is 1.02 times the float weight, wanted 1 within 0.01", "its steps or the norm in front are wrong"),
    ],
)  # fmt: skip
def test_what_rounding_does_not_do_is_said_with_whose_doing_it_is(
    changes: dict[str, object], check: Check, fact: str, cause: str
) -> None:
    strange = distance(**changes)
    own = "quantize left it so: every byte is as it wrote it, and the float weight is the one it read"
    other = "it was made from another float model than --reference"
    assert list(judge_distance(O, strange, Origin.UNKNOWN)) == [check.error(f"{O}.weight", f"{fact}; {cause}")]
    assert list(judge_distance(O, strange, Origin.OWN)) == [check.warning(f"{O}.weight", f"{fact}; {own}")]
    assert list(judge_distance(O, strange, Origin.OTHER)) == [check.error(f"{O}.weight", f"{fact}; {other}")]


def test_a_coarse_weight_is_judged_by_its_own_size() -> None:
    assert list(judge_distance(O, distance(rms_steps=1.5, size_steps=2.2), Origin.UNKNOWN)) == []
    assert list(judge_distance(O, distance(rms_steps=1.0, size_steps=0.1), Origin.UNKNOWN)) == []


@pytest.mark.parametrize("origin", Origin)
def test_a_weight_of_zeros_is_wrong_whoever_wrote_it(origin: Origin) -> None:
    (finding,) = judge_distance(O, distance(is_zeroed=True, gain=(0.0, 0.01)), origin)
    assert finding == Check.WEIGHT_DISTANCE.error(f"{O}.weight", "is all zeros, the float weight is not")


def test_a_bfloat16_model_may_have_large_biases() -> None:
    assert list(judge_linear(good_linear(bias_output=1e6), is_fp16=False)) == []


def test_changed_integers_contradict_the_report() -> None:
    report = {"linears": [{"name": O, "entropy_bits": 4.5, "zero_share": 0.1, "outlier_share": 0.1}]}
    (finding,) = judge_against_report(good_linear(), report)
    assert finding.message == "has entropy_bits 4, glmq_report.json says 4.5: the integers were changed since"
    assert list(judge_against_report(good_linear(name=Q), report)) == []
    assert list(judge_against_report(good_linear(), {})) == []


def test_tensors_that_contradict_each_other_are_a_finding(tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{O}.quant_bias"] = tensors[f"{O}.quant_bias"][1:].clone()
        del tensors[f"{Q}.deq_scale"]

    edit_tensors(tmp_path, edit)
    with Checkpoint.open(tmp_path) as checkpoint:
        found = [record for record in measure_linears(checkpoint, None, {}) if isinstance(record, Finding)]
    assert [(finding.check.number, finding.tensor) for finding in found] == [(30, O), (30, Q)]
    assert found[0].message == (
        f"cannot be computed with: {O}: quant_bias and deq_scale have not one entry for each of 192 rows"
    )
