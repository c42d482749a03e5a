"""Whole checkpoints: a good one, pieces, what is in none; which tensors there are, and what must agree between them."""

from pathlib import Path

import pytest
import torch
from handmade import KINDS, LAYER, K, Make, O, Q, V, alter, configure, describe, found, stored

from glmq.checkpoint.ascend import decode_linear
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.spec import QuantType
from glmq.verification import linears
from glmq.verification.structure import check_structure


@pytest.mark.parametrize("label", KINDS)
@pytest.mark.parametrize("with_source", [True, False])
def test_a_good_checkpoint_has_no_findings(
    good: dict[str, Path], source: Checkpoint, label: str, with_source: bool
) -> None:
    assert found(good[label], source if with_source else None) == []


def test_pieces_of_a_tensor_are_judged_like_the_whole(
    good: dict[str, Path], source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "_ELEMENTS_AT_ONCE", 700)
    monkeypatch.setattr("glmq.checkpoint.reader.PIECE_BYTES", 700)
    assert [found(path, source) for path in good.values()] == [[]] * len(KINDS)


def test_something_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        list(check_structure(tmp_path / "none", None))
    assert str(caught.value) == f"{tmp_path / 'none'}: is not a folder; give the folder of the quantized checkpoint"


def test_tensors_and_keys_without_their_counterpart_are_found(make: Make) -> None:
    directory = make("w8a8")
    describe(
        directory,
        {
            "lm_head.weight": "-",
            "ghost.weight": "FLOAT",
            "model.visual.merger.gate_up_proj.weight": "W8A8",
            f"{LAYER}.mlp.down_proj.weight": "W8A8S",
            f"{Q}.deq_scale": "FLOAT",
            f"{LAYER}.input_layernorm.bias": "W8A16",
        },
    )
    assert sorted(found(directory, None)) == [
        (5, "ghost.weight", "is described as FLOAT but not stored, and is no alias of what is"),
        (5, "lm_head.weight", "is stored but not in the description"),
        (5, "model.visual.merger.gate_up_proj.weight", "is described as W8A8 but not stored, and is no alias of what is"),
        (7, f"{LAYER}.mlp.down_proj.deq_scale", "is missing, a W8A8S linear has it"),
        (7, f"{LAYER}.mlp.down_proj.input_offset", "is missing, a W8A8S linear has it"),
        (7, f"{LAYER}.mlp.down_proj.input_scale", "is missing, a W8A8S linear has it"),
        (7, f"{LAYER}.mlp.down_proj.quant_bias", "is missing, a W8A8S linear has it"),
        (7, f"{Q}.deq_scale", "is described as FLOAT, wanted W8A8 as its linear's weight is"),
        (9, f"{LAYER}.mlp.down_proj.weight", "has dtype F16, wanted I8"),
        (12, f"{LAYER}.input_layernorm.bias", "is described as W8A16, all of a W8A8 model is FLOAT or W8A8"),
        (
            12,
            f"{LAYER}.mlp.down_proj.weight",
            "is described as W8A8S, 1 linear of this W8A8 model so: MindIE reads one type per model, "
            "other engines one per linear",
        ),
    ]  # fmt: skip


def test_the_mindie_form_has_no_aliases(make: Make) -> None:
    directory = make("w8a8s-mindie")
    name = "model.visual.merger.gate_up_proj.weight"
    describe(directory, {name: "FLOAT"})
    assert found(directory, None) == [(5, name, "is described as FLOAT but not stored, and is no alias of what is")]


def test_missing_vision_keys_are_found(make: Make) -> None:
    directory = make("w8a8")
    name = "model.visual.blocks.0.mlp.up_proj.weight"
    describe(directory, {name: "-"})
    assert found(directory, None) == [
        (5, name, "is stored but not in the description"),
        (14, name, "is not in the description, where the engine looks it up"),
    ]


def test_lost_and_foreign_tensors_are_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    alter(directory, {"lm_head.weight": None, "model.extra.weight": torch.zeros(2).half()})
    lost = (6, "lm_head.weight", "is missing, the float model has it")
    foreign = (6, "model.extra.weight", "is neither in the float model nor part of a quantized linear")
    assert found(directory, source) == [lost, foreign]
    (extra,) = (f for f in check_structure(directory, None) if f.tensor == "model.extra.weight")
    assert (extra.severity, extra.message) == (
        "warning", "is no part of the model: MindIE does not read it, vLLM refuses it",
    )  # fmt: skip


def test_missing_and_superfluous_tensors_of_a_linear_are_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8s")
    alter(
        directory,
        {
            f"{O}.weight_scale": torch.ones(128, 1).half(),
            f"{O}.bias": torch.zeros(128).half(),
            f"{Q}.quant_bias": None,
        },
    )
    describe(directory, {f"{O}.weight_scale": "W8A8S"})
    assert found(directory, source) == [
        (7, f"{Q}.quant_bias", "is missing, a W8A8S linear has it"),
        (7, f"{O}.bias", "does not belong to a W8A8S linear"),
        (7, f"{O}.weight_scale", "does not belong to a W8A8S linear"),
    ]


def test_static_linears_without_row_steps_are_whole(make: Make, source: Checkpoint) -> None:
    """As other tools write W8A8: no engine reads the steps, and deq_scale / input_scale tells them."""
    directory = make("w8a8")
    with Checkpoint.open(directory) as checkpoint:
        steps = [name for name in checkpoint if name.endswith((".weight_scale", ".weight_offset"))]
        before = decode_linear(Q, checkpoint)
    alter(directory, dict.fromkeys(steps))
    describe(directory, dict.fromkeys(steps, "-"))
    assert len(steps) == 10
    assert (found(directory, source), found(directory, None)) == ([], [])
    with Checkpoint.open(directory) as checkpoint:
        after = decode_linear(Q, checkpoint)
    assert (after.quant_type, before.quant_type) == (QuantType.W8A8, QuantType.W8A8)
    assert torch.allclose(after.weight_scale, before.weight_scale, rtol=2**-11, atol=0)
    dynamic = make("dynamic")
    alter(dynamic, {f"{Q}.weight_scale": None})
    describe(dynamic, {f"{Q}.weight_scale": "-"})
    assert found(dynamic, None) == [(7, f"{Q}.weight_scale", "is missing, a W8A8_DYNAMIC linear has it")]


def test_linears_of_one_input_with_different_scales_are_found(make: Make) -> None:
    directory = make("dynamic-mindie")
    assert found(directory, None) == []
    directory = make("w8a8s")
    offset = stored(directory, f"{K}.input_offset") + 1
    sums = stored(directory, f"{K}.weight").sum(1, dtype=torch.int32)
    alter(directory, {f"{K}.input_offset": offset, f"{K}.quant_bias": stored(directory, f"{K}.quant_bias") - sums})
    assert found(directory, None) == [
        (12, f"{Q}.input_offset", "differs between the linears of this input: [5.0], [6.0], [5.0]")
    ]


def test_a_float_linear_among_quantized_ones_is_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8s")
    own = [f"{V}.{suffix}" for suffix in ("input_scale", "input_offset", "quant_bias", "deq_scale")]
    alter(directory, dict.fromkeys(own) | {f"{V}.weight": source.read(f"{V}.weight").half()})
    describe(directory, {f"{V}.weight": "FLOAT"})
    assert found(directory, source) == [
        (12, Q, "the linears of this input differ in type: q_proj W8A8S, k_proj W8A8S, v_proj FLOAT")
    ]


def test_a_sparse_checkpoint_in_bfloat16_is_found(make: Make) -> None:
    directory = make("w8a8s")
    configure(directory, "", {"torch_dtype": "bfloat16"})
    configure(directory, "text_config", {"dtype": "bfloat16"})
    findings = found(directory, None)
    assert (13, "", "W8A8S runs in float16 only, config.json says bfloat16") in findings
    assert (9, f"{Q}.deq_scale", "has dtype I64, wanted F32") in findings
    configure(directory, "text_config", {"dtype": "-"})
    assert (13, "", "W8A8S runs in float16 only, config.json says no dtype") in found(directory, None)


def test_doubled_norm_tensors_in_the_wrong_form_or_with_other_values_are_found(make: Make) -> None:
    norm = f"{LAYER}.input_layernorm"
    directory = make("w8a8")
    alter(directory, {f"{norm}.module.weight": torch.ones(128).half()})
    assert found(directory, None) == [
        (15, f"{norm}.module.weight", "belongs to the MindIE form, ascendV1 must not have it")
    ]
    directory = make("w8a8s-mindie")
    alter(directory, {f"{norm}.module.weight": torch.ones(128).half()})
    assert found(directory, None) == [(15, f"{norm}.module.weight", f"differs from {norm}.weight")]
    alter(directory, {f"{norm}.module.bias": None})
    assert found(directory, None) == [(15, f"{norm}.module.bias", f"is missing beside {norm}.module.weight")]


def test_a_norm_bias_that_engines_ignore_is_found(make: Make) -> None:
    directory = make("w8a8")
    ignored, added = f"{LAYER}.post_mlp_layernorm.bias", f"{LAYER}.post_attention_layernorm.bias"
    alter(directory, {ignored: torch.ones(128), added: torch.ones(128)})
    lost, ignored_bias = sorted(found(directory, None))
    assert lost[:2] == (11, f"{LAYER}.mlp.gate_up_proj.quant_bias")  # nothing gives back what that norm adds
    assert ignored_bias == (15, ignored, "is not zero, but the engine ignores the bias of this norm")
