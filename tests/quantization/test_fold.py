"""Scales that rows of v, up and qkv absorb for the inputs of o and down: the same function, in floats and in integers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, calibrate, edit_tensors, quantize, streamed_logits, tree
from make_checkpoint import Size, make_checkpoint
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from glmq.calibration.stats import Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.inspection.compare import WeightDiff, compare_weights
from glmq.inspection.folder import scan_folder
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.quantization.fold import RowFolds
from glmq.quantization.options import Options
from glmq.quantization.plan import plan_groups
from glmq.quantization.recipe import make_recipe
from glmq.verification.arithmetic import LinearArithmetic
from glmq.verification.behaviour import BlockBehaviour, compare_behaviour
from glmq.verification.cases import Case
from glmq.verification.checks import verify_files
from glmq.verification.findings import Checked, Finding

LAYER = "model.language_model.layers.0"
V, O = f"{LAYER}.self_attn.v_proj", f"{LAYER}.self_attn.o_proj"
GATE_UP, DOWN = f"{LAYER}.mlp.gate_up_proj", f"{LAYER}.mlp.down_proj"
QKV, PROJ = "model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.proj"
UP, VISION_DOWN = "model.visual.merger.up_proj", "model.visual.merger.down_proj"
FOLDED = {O: V, DOWN: GATE_UP, PROJ: QKV, VISION_DOWN: UP}
SIZE = Size(intermediate=128, layers=1, vision_hidden=64)
HEAD, INNER, VISION = 16, 128, 64

MODES = {
    "W8A8": {"torch_dtype": "fp16"},
    "W8A8_DYNAMIC": {"is_dynamic": True, "torch_dtype": "fp16"},
    "W8A8S": W8A8S,
    "W8A8S_by_tensor": {"co_sparse": True, "torch_dtype": "fp16"},
    "W4A8_DYNAMIC": {"w_bit": 4, "is_lowbit": True, "is_dynamic": True},
}


def make_loud(tensors: dict[str, Tensor]) -> None:
    """Move a factor from columns to the rows behind them: the same function with loud channels in the inputs between."""
    for name in ("weight", "bias"):
        tensors[f"{V}.{name}"][[3, HEAD + 5]] *= 64
    for head in range(4):  # two query heads read each of the two KV heads
        tensors[f"{O}.weight"][:, head * HEAD + (3 if head < 2 else 5)] /= 64
    tensors[f"{GATE_UP}.weight"][INNER + 7] *= 64
    tensors[f"{DOWN}.weight"][:, 7] /= 64
    tensors[f"{QKV}.weight"][2 * VISION + 9] *= 64
    tensors[f"{PROJ}.weight"][:, 9] /= 64
    tensors[f"{UP}.weight"][11] *= 64
    tensors[f"{VISION_DOWN}.weight"][:, 11] /= 64


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loud") / "model"
    make_checkpoint(folder, SIZE)
    edit_tensors(folder, make_loud)
    return folder


@pytest.fixture(scope="module")
def loud_stats(loud: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(loud, tmp_path_factory.mktemp("loud") / "stats", pictures, limit=1)


def every(mode: str) -> dict[str, object]:
    """Options that quantize every linear but lm_head."""
    return {**MODES[mode], "do_smooth": True, "layer": (f"model.[lv]*={mode.removesuffix('_by_tensor')}",)}


@pytest.fixture(scope="module")
def outputs(loud: Path, loud_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folded")
    return {mode: quantize(loud, loud_stats, root / mode, **every(mode)) for mode in MODES}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def labels(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "glmq_report.json").read_text())
    return {row["name"]: row["smoothing"] for row in report["linears"]}


def test_the_folded_float_model_gives_the_same_logits_bit_for_bit(
    loud: Path, loud_stats: Path, pictures: Path, tmp_path: Path
) -> None:
    config, statistics = read_config(loud), Statistics.open(loud_stats)
    recipe = make_recipe(Options(do_smooth=True, layer=("model.[lv]*=W8A8",)))
    groups = plan_groups(recipe, config)
    folded = tmp_path / "folded"
    shutil.copytree(loud, folded)

    def fold(tensors: dict[str, Tensor]) -> None:
        folds = RowFolds(source, statistics)
        for plan in groups.values():
            scales = folds.fold(recipe, groups, plan.group).scales
            if scales is not None:
                changed.add(plan.group.site)
                tensors[f"{plan.group.site}.weight"].mul_(scales)
            for name, divisor in folds.divisors(recipe, groups, plan.group).items():
                changed.add(name)
                tensors[f"{name}.weight"].div_(divisor)
                if f"{name}.bias" in tensors:
                    tensors[f"{name}.bias"].div_(divisor[:, 0])

    changed: set[str] = set()
    with Checkpoint.open(loud) as source:
        edit_tensors(folded, fold)
    assert {*FOLDED, *FOLDED.values()} <= changed
    preprocessor = Preprocessor(loud, config, max_pixels=None, trust_remote_code=False)
    inputs = preprocessor.encode(Image.open(sorted(pictures.glob("*.png"))[0]), "What is it?", None)
    before, after = (streamed_logits(folder, config, inputs, torch.float32) for folder in (loud, folded))
    # Powers of two pass through products and sums without rounding.
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_stored_rows_are_divided_by_what_stored_columns_are_multiplied_with(
    mode: str, outputs: dict[str, Path], loud: Path
) -> None:
    found = labels(outputs[mode])
    assert {name: found[name].split(",")[0] for name in FOLDED} == {
        name: f"folded into {maker.rpartition('.')[2]}" for name, maker in FOLDED.items()
    }
    config = read_config(loud)
    with Checkpoint.open(outputs[mode]) as checkpoint, Checkpoint.open(loud) as source:
        folds = {
            group.site: group.source
            for block in config.family.blocks(config)
            for group in block.groups
            if group.site in FOLDED
        }
        for reader, rows in folds.items():
            assert rows is not None
            row_gain = gains(real(checkpoint, rows.linear), norm_scaled(source, checkpoint, rows.linear), 1)
            column_gain = gains(real(checkpoint, reader), source.read(f"{reader}.weight").float(), 0)
            by_head = column_gain.reshape(-1, rows.repeats, rows.run)
            divided = 1 / row_gain[rows.first_row : rows.first_row + by_head.shape[0] * rows.run].reshape(-1, rows.run)
            scales = divided.log2().round().exp2()
            assert float(scales.max()) >= 4
            assert float(scales.min()) == 1
            # Rounding moves a row's or column's gain by far less than the factor 2 between neighbouring scales.
            assert torch.allclose(divided, scales, rtol=0.25)
            assert torch.allclose(by_head, scales[:, None].expand_as(by_head), rtol=0.4)


def gains(found: Tensor, wanted: Tensor, dim: int) -> Tensor:
    """<found, wanted> / <wanted, wanted> of each row (dim 1) or column (dim 0)."""
    return (found * wanted).sum(dim) / wanted.square().sum(dim)


def norm_scaled(source: Checkpoint, checkpoint: Checkpoint, linear: str) -> Tensor:
    """The float weight with its columns as the stored norm in front wants them."""
    weight = source.read(f"{linear}.weight").float()
    norm = {V: "input_layernorm", GATE_UP: "post_attention_layernorm", QKV: "norm1"}.get(linear)
    if norm is None:
        return weight
    name = f"{LAYER if linear != QKV else 'model.visual.blocks.0'}.{norm}.weight"
    return weight * (source.read(name).float() / checkpoint.read(name).float())


def real(checkpoint: Checkpoint, linear: str) -> Tensor:
    """The weight that stored integers stand for."""
    from glmq.inspection.weights import StoredMatrix

    matrix = StoredMatrix(checkpoint, linear)
    return matrix.values(matrix.stored(0, matrix.rows), 0)


@pytest.mark.parametrize("mode", MODES)
def test_verify_and_inspect_find_nothing_wrong_with_a_fold(
    mode: str, outputs: dict[str, Path], loud: Path, pictures: Path
) -> None:
    found = [
        record for record in verify_files(outputs[mode], loud, []) if not isinstance(record, LinearArithmetic | Checked)
    ]
    assert found == []
    one, other = scan_folder(loud), scan_folder(outputs[mode])
    diffs = {d.name: d for d in compare_weights(one, other, {f"{V}.bias", *(f"{n}.weight" for n in (V, O, DOWN))})}
    assert all(isinstance(diff, WeightDiff) for diff in diffs.values())
    assert diffs[f"{V}.bias"].relative_l2 < 2.0**-8  # of bfloat16 or float16; the fold itself is exact
    assert max(diff.relative_l2 for diff in diffs.values()) < 0.5
    config = read_config(loud)
    preprocessor = Preprocessor(loud, config, max_pixels=None, trust_remote_code=False)
    image = Image.open(sorted(pictures.glob("*.png"))[0])
    case = Case("picture", True, lambda: preprocessor.encode(image, "What is it?", None))
    with Checkpoint.open(loud) as reference, Checkpoint.open(outputs[mode]) as candidate:
        blocks = [b for b in compare_behaviour(reference, candidate, config, [case]) if isinstance(b, BlockBehaviour)]
    errors = {linear.name: linear.error for block in blocks for linear in block.linears}
    report = json.loads((outputs[mode] / "glmq_report.json").read_text())
    for row in report["linears"]:
        if row["name"] in (*FOLDED, *FOLDED.values()):
            # The same linear on nearly the same tokens: the picture is calibrated on, the question is another one.
            assert errors[row["name"]] < 2 * row["output_error"]


@pytest.mark.parametrize(("mode", "step"), [("W8A8", "deq_scale"), ("W8A8_DYNAMIC", "weight_scale")])
def test_half_a_fold_is_found(
    mode: str, step: str, outputs: dict[str, Path], loud: Path, loud_stats: Path, tmp_path: Path
) -> None:
    """A row divided without its columns, in a checkpoint without folds; and a fold whose row was put back."""
    whole = tmp_path / "without"
    quantize(loud, loud_stats, whole, **MODES[mode])
    folded = tmp_path / "with"
    shutil.copytree(outputs[mode], folded)
    for folder, row, factor in ((whole, 0, 0.5), (folded, 3, 64.0)):

        def scale_row(tensors: dict[str, Tensor], row: int = row, factor: float = factor) -> None:
            values = tensors[f"{V}.{step}"]
            if values.dtype == torch.int64:
                values[row] = (values[row].int().view(torch.float32) * factor).view(torch.int32).long()
            else:
                values[row] *= factor

        edit_tensors(folder, scale_row)
        found = [f for f in verify_files(folder, loud, []) if isinstance(f, Finding) and f.severity == "error"]
        assert any(f.check.number == 30 and f.tensor.startswith((V, O)) for f in found)


def test_a_row_that_shrank_by_itself_is_said_to_be_wrong_in_that_row(
    loud: Path, loud_stats: Path, tmp_path: Path
) -> None:
    out = quantize(loud, loud_stats, tmp_path / "out", is_dynamic=True)
    edit_tensors(out, lambda tensors: tensors[f"{V}.weight_scale"][0].mul_(0.5))
    # The first one is of the checksum, others may follow of the weights that the row moves.
    _, found, *_ = [f for f in verify_files(out, loud, []) if isinstance(f, Finding)]
    assert (found.check.number, found.tensor) == (30, f"{V}.weight")
    # The third digit is the statistics', which differ with the processor.
    assert re.match(r"row 0 is 0\.(?:499|5|501) times the float row, wanted 1 within ", found.message)


def test_where_one_side_stays_float_nothing_is_folded(loud: Path, loud_stats: Path, tmp_path: Path) -> None:
    smooth = {"do_smooth": True, "is_dynamic": True, "torch_dtype": "fp16"}
    kept = quantize(loud, loud_stats, tmp_path / "v", **smooth, keep_float=("*.self_attn.[qkv]_proj",))
    assert labels(kept)[O] == "none (v_proj stays float)"
    assert torch.equal(weights(kept)[f"{V}.weight"], weights(loud)[f"{V}.weight"].half())
    plain = quantize(loud, loud_stats, tmp_path / "o", **smooth, keep_float=(O,))
    folded = quantize(loud, loud_stats, tmp_path / "both", **smooth)
    a, b = weights(plain), weights(folded)
    assert torch.equal(a[f"{V}.bias"], weights(loud)[f"{V}.bias"].half())
    assert torch.equal(a[f"{V}.weight"], b[f"{V}.weight"])  # a row's integers do not see what divides the row
    assert torch.equal(a[f"{GATE_UP}.weight_scale"], b[f"{GATE_UP}.weight_scale"])  # down_proj stays float by default
    assert float((a[f"{V}.weight_scale"] / b[f"{V}.weight_scale"])[3]) >= 4


def test_m2_folds_outliers_into_rows(loud: Path, loud_stats: Path, tmp_path: Path) -> None:
    out = quantize(loud, loud_stats, tmp_path / "out", **MODES["W8A8"], layer=("model.[lv]*=W8A8",))
    for name, source in FOLDED.items():
        assert labels(out)[name].startswith(f"folded into {source.rpartition('.')[2]}, 1 to ")


@pytest.mark.slow
def test_m2_leaves_rows_without_outliers_alone(half: Path, half_stats: Path, tmp_path: Path) -> None:
    out = quantize(half, half_stats, tmp_path / "out", **MODES["W8A8"])
    assert {label for name, label in labels(out).items() if name.endswith("o_proj")} == {"none (no clear gain)"}


@pytest.mark.slow
def test_an_interrupted_run_continues_with_the_same_folds(
    loud: Path, loud_stats: Path, outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmq.quantization import stream

    original, calls = stream.encode_linear, []

    def interrupt(name: str, *args: object, **kwargs: object) -> dict[str, Tensor]:
        calls.append(name)
        if name == O and len(calls) == calls.index(O) + 1:  # v is written, o is not
            raise KeyboardInterrupt
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "encode_linear", interrupt)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(loud, loud_stats, out, **every("W8A8S"))
    assert not out.exists()
    quantize(loud, loud_stats, out, resume=True, **every("W8A8S"))
    assert tree(out) == tree(outputs["W8A8S"])
