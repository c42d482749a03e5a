"""Weights of two checkpoints against each other."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import edit_tensors, quantize
from safetensors.torch import load_file, save_file

import glmq
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, UsageError
from glmq.inspection import compare
from glmq.inspection import sums as compare_sums
from glmq.inspection.compare import (
    Incomparable,
    WeightDiff,
    compare_weights,
    sum_layers,
    weight_histograms,
)
from glmq.inspection.compare_keys import KeyChange, NamePattern, config_changes, description_changes, only_in
from glmq.inspection.folder import scan_folder
from glmq.inspection.weights import StoredMatrix
from glmq.progress import Note
from glmq.reporting.comparison_page import comparison_page
from glmq.reporting.documents import comparison_document
from glmq.threads import run_ahead

LAYER = "model.language_model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
V = f"{LAYER}.self_attn.v_proj"
O = f"{LAYER}.self_attn.o_proj"
NORM = f"{LAYER}.input_layernorm.weight"


def diffs_of(a: Path, b: Path) -> dict[str, WeightDiff | Incomparable]:
    one, other = scan_folder(a), scan_folder(b)
    return {diff.name: diff for diff in compare_weights(one, other, {tensor.name for tensor in one.tensors})}


def diff_of(a: Path, b: Path, name: str) -> WeightDiff:
    diff = diffs_of(a, b)[name]
    assert isinstance(diff, WeightDiff)
    return diff


@pytest.fixture(scope="module")
def kinds(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    for label, options in {
        "w8a8s": {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"},
        "w8a8": {},
        "w4a8": {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "group_size": 64},
    }.items():
        quantize(small, small_stats, root / label, **options)
    return {path.name: path for path in root.iterdir() if not path.name.startswith(".")}


def real_weight(folder: Path, name: str) -> torch.Tensor:
    """The float64 weight that a linear's stored tensors stand for."""
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    weight = tensors[f"{name}.weight"]
    if weight.dtype != torch.int8:
        return weight.double()
    if f"{name}.weight_scale_second" in tensors:
        low, high = (weight << 4) >> 4, weight >> 4  # arithmetic shifts carry the sign
        q = torch.stack([low, high], 1).reshape(-1, weight.shape[1]).double()
        second = tensors[f"{name}.weight_scale_second"].double()
        return q * second.repeat_interleave(q.shape[1] // second.shape[1], 1) * tensors[f"{name}.weight_scale"].double()
    deq = tensors[f"{name}.deq_scale"]
    deq = deq.int().view(torch.float32) if deq.dtype == torch.int64 else deq
    return weight.double() * (deq.double() / tensors[f"{name}.input_scale"].double())[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("label", ["w8a8s", "w8a8", "w4a8"])
def test_the_difference_is_one_of_the_function_with_smoothing_undone(
    small: Path, kinds: dict[str, Path], label: str
) -> None:
    norms = [
        next(load_file(path)[NORM] for path in sorted(folder.glob("*.safetensors")) if NORM in load_file(path)).double()
        for folder in (small, kinds[label])
    ]
    wanted = real_weight(small, Q)
    found = real_weight(kinds[label], Q) * norms[1] / norms[0]
    error = (found - wanted).norm() / wanted.norm()
    diff = diff_of(small, kinds[label], f"{Q}.weight")
    # float32 products and sums of a few thousand terms: 1e-5 of a relative error is far above their rounding.
    assert diff.relative_l2 == pytest.approx(float(error), rel=1e-5)
    assert diff.max_abs == pytest.approx(float((found - wanted).abs().max()), rel=1e-4)
    assert diff.cosine == pytest.approx(float((found * wanted).sum() / found.norm() / wanted.norm()), abs=1e-6)
    assert diff.sqnr_db == pytest.approx(-20 * math.log10(float(error)), abs=1e-3)
    assert diff.undone == pytest.approx(
        (float((norms[0] / norms[1]).min()), float((norms[0] / norms[1]).max())), rel=1e-6
    )
    assert (diff.entropy_a, diff.changed_share, diff.step_ratio) == (None, None, None)


@pytest.mark.slow
def test_a_norm_whose_scales_the_linears_carry_does_not_count(small: Path, kinds: dict[str, Path]) -> None:
    diff = diff_of(small, kinds["w8a8s"], NORM)
    assert (diff.noise, diff.identical) == (0.0, False)
    assert diff.undone is not None


def test_a_channel_that_only_one_norm_switches_off_does_count(small_copy: Path, small: Path) -> None:
    path = next(path for path in small_copy.glob("*.safetensors") if NORM in load_file(path))
    (small_copy / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = load_file(path)
    value = float(tensors[NORM][3])
    tensors[NORM][3] = 0

    save_file(tensors, path)
    assert diff_of(small, small_copy, NORM).noise == pytest.approx(value**2, rel=1e-6)


def test_a_checkpoint_is_identical_to_itself(kinds: dict[str, Path]) -> None:
    for folder in kinds.values():
        for diff in diffs_of(folder, folder).values():
            assert isinstance(diff, WeightDiff)
            assert (diff.identical, diff.relative_l2, diff.max_abs) == (True, 0.0, 0.0)
            assert diff.cosine == pytest.approx(1.0, abs=1e-12) or diff.signal == 0
            assert diff.changed_share in (None, 0.0)
            assert diff.step_ratio in (None, (1.0, 1.0, 1.0))


def test_two_quantized_checkpoints_show_changed_integers_steps_and_entropy(
    kinds: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in kinds["w8a8"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O}.weight"][0, :8] = 77
        tensors[f"{O}.deq_scale"][1] *= 2
        tensors[f"{O}.input_scale"] *= 1
        tensors[f"{O}.input_offset"] += 3

    old = load_file(next(other.glob("*.safetensors")))
    changed_share = float((old[f"{O}.weight"][0, :8] != 77).sum()) / old[f"{O}.weight"].numel()
    edit_tensors(other, edit)
    diff = diff_of(kinds["w8a8"], other, f"{O}.weight")
    assert diff.changed_share == changed_share
    assert diff.step_ratio == (1.0, 1.0, 2.0)
    assert (diff.input_scale_ratio, diff.input_offset_change) == (1.0, 3)
    assert diff.entropy_a != diff.entropy_b
    assert (diff.type_a, diff.type_b) == ("INT8", "INT8")


def test_shapes_that_differ_cannot_be_compared(small: Path, kinds: dict[str, Path], tmp_path: Path) -> None:
    for path in kinds["w8a8"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("weight", "deq_scale"):
            tensors[f"{O}.{suffix}"] = tensors[f"{O}.{suffix}"][:-2].clone()
        tensors[f"{Q}.bias"] = tensors[f"{Q}.bias"][:-1].clone()
        tensors[f"{LAYER}.mlp.gate_up_proj.deq_scale"] = tensors[f"{LAYER}.mlp.gate_up_proj.deq_scale"][:-1].clone()
        tensors[NORM] = tensors[NORM][:-1].clone()
        tensors[f"{V}.input_scale"] = tensors[f"{V}.input_scale"][:0].clone()

    edit_tensors(tmp_path, edit)
    found = diffs_of(small, tmp_path)
    assert found[f"{O}.weight"] == Incomparable(f"{O}.weight", "is 64 x 64 in the first, 62 x 64 in the other")
    assert found[f"{Q}.bias"] == Incomparable(f"{Q}.bias", "has shape [64] in the first, [63] in the other")
    broken = found[f"{LAYER}.mlp.gate_up_proj.weight"]
    assert broken == Incomparable(
        f"{LAYER}.mlp.gate_up_proj.weight",
        f"{LAYER}.mlp.gate_up_proj.weight: 192 x 64 integers have 191 row steps",
    )
    assert found[NORM] == Incomparable(NORM, "has shape [64] in the first, [63] in the other")
    scale = f"{V}.input_scale: has shape [0], one number is wanted"
    assert found[f"{V}.weight"] == Incomparable(f"{V}.weight", scale)


@pytest.mark.parametrize("offset", [torch.tensor([torch.nan]), torch.zeros(0)], ids=["NaN", "none"])
def test_input_ranges_that_are_no_numbers_are_left_out(
    kinds: dict[str, Path], tmp_path: Path, offset: torch.Tensor
) -> None:
    shutil.copytree(kinds["w8a8"], tmp_path / "b")
    edit_tensors(tmp_path / "b", lambda tensors: tensors.update({f"{O}.input_offset": offset}))
    diff = diff_of(kinds["w8a8"], tmp_path / "b", f"{O}.weight")
    assert (diff.input_scale_ratio, diff.input_offset_change) == (None, None)


def test_steps_by_group_must_divide_the_columns(kinds: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kinds["w4a8"], tmp_path / "b")
    name = f"{O}.weight_scale_second"
    edit_tensors(tmp_path / "b", lambda tensors: tensors.update({name: tensors[name][:, :0].clone()}))
    assert diffs_of(kinds["w4a8"], tmp_path / "b")[f"{O}.weight"] == Incomparable(
        f"{O}.weight", f"{O}.weight: 64 x 64 integers have 64 row steps and second-stage scales [64, 0]"
    )


def test_names_that_only_one_has_are_grouped(small: Path, kinds: dict[str, Path]) -> None:
    one, other = scan_folder(small), scan_folder(kinds["w8a8s"])
    assert only_in(one, other) == []
    extra = only_in(other, one)
    assert NamePattern("model.language_model.layers.N.input_layernorm.bias", 2) in extra
    assert all(row.pattern.endswith("norm.bias") or ".norm" in row.pattern for row in extra)


@pytest.mark.parametrize("side", [0, 1])
def test_names_of_trainers_are_compared_as_the_models_own(
    side: int, small: Path, small_copy: Path, kinds: dict[str, Path]
) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            own = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[f"module.{own}"] = tensors.pop(name)

    edit_tensors(small_copy, rename)
    (small_copy / "model.safetensors.index.json").unlink()
    pair, renamed = [small, kinds["w8a8"]], [small, kinds["w8a8"]]
    if side == 1:
        pair, renamed = pair[::-1], renamed[::-1]
    renamed[side] = small_copy
    notes: list[object] = []
    wanted, found = glmq.compare(*pair), glmq.compare(*renamed, watch=notes.append)
    assert found.diffs == wanted.diffs
    assert (found.only_a, found.only_b) == (wanted.only_a, wanted.only_b)
    assert notes[0] == Note(
        f"note: {small_copy}: tensors are named as trainers leave them: module.lm_head.weight is compared as "
        "lm_head.weight, and so on"
    )


def test_changes_of_config_and_description_are_listed(small: Path, kinds: dict[str, Path]) -> None:
    one, other = scan_folder(small), scan_folder(kinds["w8a8s"])
    assert config_changes(one, other) == [
        KeyChange("text_config.dtype", "bfloat16", "float16"),
        KeyChange("torch_dtype", "bfloat16", "float16"),
    ]
    assert description_changes(one, other) == []
    changes = description_changes(scan_folder(kinds["w8a8"]), other)
    assert KeyChange("model_quant_type", "W8A8", "W8A8S") in changes
    assert KeyChange("model.language_model.layers.N.self_attn.q_proj.weight (2 keys)", "W8A8", "W8A8S") in changes


def test_layers_add_up_to_the_total(small: Path, kinds: dict[str, Path]) -> None:
    diffs = [diff for diff in diffs_of(small, kinds["w8a8"]).values() if isinstance(diff, WeightDiff)]
    layers = sum_layers(diffs)
    assert [layer.layer for layer in layers][-1] == "total"
    assert sum(layer.tensors for layer in layers[:-1]) == layers[-1].tensors == len(diffs)
    total = math.sqrt(sum(diff.noise for diff in diffs) / sum(diff.signal for diff in diffs))
    assert layers[-1].relative_l2 == pytest.approx(total, rel=1e-12)
    assert layers[-1].worst == max(diffs, key=lambda diff: diff.relative_l2).name


def with_numbers(model: Path, folder: Path, *numbers: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A copy of the model whose q_proj holds these numbers first, and whose o_proj is changed by about 1 %."""
    shutil.copytree(model, folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O}.weight"] = (tensors[f"{O}.weight"].float() * 1.01).bfloat16()
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(dtype)
        tensors[f"{Q}.weight"].view(-1)[: len(numbers)] = torch.tensor(numbers, dtype=dtype)

    edit_tensors(folder, edit)
    return folder


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (math.nan, torch.bfloat16),
        (-math.inf, torch.bfloat16),
        (math.nan, torch.float64),
        (1e308, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", [compare_sums.KERNELS, ()], ids=["compiled", "torch"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_is_finite_on_one_side_only_differs_most(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: float, dtype: torch.dtype, kernels: tuple[str, ...],
    turned: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(compare_sums, "KERNELS", kernels)
    folders = [small, with_numbers(small, tmp_path / "b", number, dtype=dtype)]
    found = glmq.compare(*(folders[::-1] if turned else folders), histograms=True)
    worst, second = found.diffs[:2]
    assert (worst.name, worst.relative_l2, worst.noise, worst.max_abs, worst.cosine, worst.sqnr_db) == (
        f"{Q}.weight", math.inf, math.inf, math.inf, 0.0, -math.inf
    )  # fmt: skip
    assert math.isfinite(worst.signal)
    assert second.name == f"{O}.weight"
    assert 0.005 < second.relative_l2 < 0.02
    layers = {layer.layer: layer for layer in found.layers}
    for label, name in (("layers.0", "self_attn.q_proj"), ("total", f"{Q}.weight")):
        assert (layers[label].relative_l2, layers[label].worst, layers[label].worst_relative_l2) == (
            math.inf, name, math.inf
        ), label  # fmt: skip
    assert found.histograms[0].name == f"{Q}.weight"
    document = comparison_document(found)
    json.dumps(document, allow_nan=False)
    assert [document["tensors"][0][key] for key in ("relative_l2", "noise", "max_abs", "sqnr_db")] == [None] * 4
    assert "∞" in comparison_page(found, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_not_finite_on_both_sides_does_not_differ(small: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = (math.nan, math.inf, -math.inf, 1e308)
    one = with_numbers(small, tmp_path / "a", *numbers, dtype=dtype)
    assert glmq.compare(one, one).identical
    other = with_numbers(small, tmp_path / "b", *numbers, 3.0, dtype=dtype)
    diff = diff_of(one, other, f"{Q}.weight")
    change = 3.0 - float(real_weight(one, Q).view(-1)[4])
    assert (diff.identical, diff.noise, diff.max_abs) == (
        False, pytest.approx(change**2, rel=1e-6), pytest.approx(change, rel=1e-6)
    )  # fmt: skip
    assert math.isfinite(diff.relative_l2)
    apart = with_numbers(small, tmp_path / "c", *numbers[:3], -1e308, dtype=dtype)
    assert diff_of(one, apart, f"{Q}.weight").max_abs == math.inf


def test_norms_that_are_not_finite_scale_nothing(small: Path, small_copy: Path) -> None:
    edit_tensors(small_copy, lambda tensors: tensors[NORM].view(-1)[:1].fill_(math.nan))
    assert glmq.compare(small_copy, small_copy).identical
    diffs = diffs_of(small, small_copy)
    assert {name for name, diff in diffs.items() if isinstance(diff, WeightDiff) and diff.noise} == {NORM}
    assert diff_of(small, small_copy, NORM).relative_l2 == math.inf


def test_histograms_count_every_weight_over_the_same_bins(small: Path, kinds: dict[str, Path]) -> None:
    (pair,) = weight_histograms(scan_folder(small), scan_folder(kinds["w8a8s"]), [f"{Q}.weight"])
    assert sum(pair.a) == sum(pair.b) == 64 * 64
    assert len(pair.a) == len(pair.b) == compare.HISTOGRAM_BINS
    assert pair.low <= float(real_weight(small, Q).min())
    assert pair.high >= float(real_weight(small, Q).max())


@pytest.mark.parametrize(("bad", "left"), [(1, 64 * 64 - 1), (64 * 64, 0)])
def test_histograms_leave_out_what_is_not_finite(small: Path, small_copy: Path, bad: int, left: int) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"].view(-1)[:bad] = torch.tensor([torch.nan, torch.inf]).repeat(bad)[1 : 1 + bad]

    edit_tensors(small_copy, edit)
    for pair in weight_histograms(scan_folder(small_copy), scan_folder(small), [f"{Q}.weight"]):
        assert (sum(pair.a), sum(pair.b)) == (left, 64 * 64)
    (same,) = weight_histograms(scan_folder(small_copy), scan_folder(small_copy), [f"{Q}.weight"])
    assert sum(same.a) == sum(same.b) == left


def test_statistics_and_compressed_weights_cannot_be_compared(small: Path, small_stats: Path) -> None:
    with pytest.raises(UsageError) as error:
        diffs_of(small, small_stats)
    assert str(error.value) == (
        f"{small_stats}: holds calibration statistics; weights of float and un-compressed quantized checkpoints can be "
        "compared, run `glmq compress --decompress` first"
    )


def test_without_a_config_norms_are_compared_as_they_are(small: Path, kinds: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for label, folder in (("a", small), ("b", kinds["w8a8"])):
        (tmp_path / label).mkdir()
        for path in folder.glob("*.safetensors"):
            (tmp_path / label / path.name).symlink_to(path)
        folders.append(tmp_path / label)
    diff = diff_of(*folders, NORM)
    assert diff.undone is None
    assert diff.noise > 0


def test_a_stored_matrix_refuses_what_is_no_matrix(small: Path) -> None:
    with Checkpoint.open(small) as checkpoint, pytest.raises(CheckpointError) as error:
        StoredMatrix(checkpoint, f"{LAYER}.input_layernorm")
    assert str(error.value) == f"{NORM}: has shape [64], a matrix is wanted"


def test_results_that_are_computed_ahead_keep_their_order_and_their_errors() -> None:
    def square(number: int) -> int:
        if number == 20:
            raise ValueError("twenty")
        return number * number

    calls = [lambda number=number: square(number) for number in range(30)]
    found: list[int] = []
    with pytest.raises(ValueError, match="twenty"):
        found.extend(run_ahead(calls, 3))
    assert found == [number * number for number in range(20)]
