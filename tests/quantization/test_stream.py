import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, calibrate, edit_json, edit_tensors, quantize, refused, run_ranks, tree, without_checksums
from make_checkpoint import Size, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import CHECKSUMS, read_checksums
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.model.config import FAMILY, read_config
from glmq.model.streamed import StreamedModel
from glmq.numerics.rate import RateCurve, mean_rule_bits, solve_bits
from glmq.progress import Event, Note
from glmq.quantization.fold import RowFolds
from glmq.quantization.group import FloatLinear
from glmq.quantization.layer import GroupResult, quantize_group
from glmq.quantization.measure import rate_checkpoint
from glmq.quantization.options import Options
from glmq.quantization.output import plan_output
from glmq.quantization.passes import QuantizationRun
from glmq.quantization.plan import plan_groups
from glmq.quantization.recipe import make_recipe
from glmq.quantization.stream import quantize_checkpoint
from glmq.ranks import Ranks

MODES = {
    "W8A8S fp16": W8A8S,
    "W8A8S by fraction": {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16", "fraction": 0.05},
    "W8A8 bf16": {},
    "W8A8 fp16": {"torch_dtype": "fp16", "act_method": 1},
}

FILE = "model-00001-of-00001.safetensors"
LAYER = "model.language_model.layers.1"
U = 2.0**-24
"""Unit roundoff of float32."""


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as the format's own reader sees it."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def quantized_linears(folder: Path) -> list[str]:
    config = read_config(folder)
    ends = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_up_proj"]
    return [f"model.language_model.layers.{i}.{end}" for i in range(config.layers) for end in ends]


@pytest.fixture(scope="module")
def outputs(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model quantized in each mode."""
    base = tmp_path_factory.mktemp("quantized")
    return {name: quantize(small, small_stats, base / name, **options) for name, options in MODES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_output_has_exactly_the_tensors_that_the_engines_read(
    mode: str, outputs: dict[str, Path], small: Path
) -> None:
    config, linears = read_config(small), quantized_linears(small)
    half = torch.bfloat16 if mode == "W8A8 bf16" else torch.float16
    static = torch.bfloat16 if mode == "W8A8 bf16" else torch.float32
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in config.family.shapes(config).items():
        wanted[name] = (torch.int8 if name.removesuffix(".weight") in linears else half, shape)
    for norm in config.family.rms_norms(config):
        wanted[f"{norm}.bias"] = (torch.float32, wanted[f"{norm}.weight"][1])
    for linear in linears:
        rows = wanted[f"{linear}.weight"][1][0]
        wanted[f"{linear}.input_scale"] = wanted[f"{linear}.input_offset"] = (static, (1,))
        wanted[f"{linear}.quant_bias"] = (torch.int32, (rows,))
        wanted[f"{linear}.deq_scale"] = (torch.float32 if half is torch.bfloat16 else torch.int64, (rows,))
        if mode.startswith("W8A8 "):
            wanted[f"{linear}.weight_scale"] = wanted[f"{linear}.weight_offset"] = (half, (rows, 1))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in weights(outputs[mode]).items()} == wanted


@pytest.mark.parametrize("mode", MODES)
def test_the_stored_numbers_fit_together_as_the_kernel_needs_them(
    mode: str, outputs: dict[str, Path], small: Path
) -> None:
    found = weights(outputs[mode])
    for linear in quantized_linears(small):
        q, offset = found[f"{linear}.weight"], float(found[f"{linear}.input_offset"])
        scale, deq = found[f"{linear}.input_scale"].float(), found[f"{linear}.deq_scale"]
        assert float(scale) > 0
        assert offset in range(-128, 128)
        if deq.dtype is torch.int64:  # the bits of float32 numbers
            assert ((deq > 0) & (deq < 2**31)).all()
            deq = deq.to(torch.int32).view(torch.float32)
        if f"{linear}.weight_scale" in found:
            assert torch.equal(deq, (found[f"{linear}.weight_scale"].float() * scale).reshape(-1))
            assert not found[f"{linear}.weight_offset"].any()
        sums = q.sum(1, dtype=torch.int64).double()
        bias = found.get(f"{linear}.bias", torch.zeros(len(q)))
        wanted = torch.round(bias.double() / deq.double() - offset * sums)
        assert torch.equal(found[f"{linear}.quant_bias"].double(), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_linears_of_one_input_share_its_scale_and_offset(mode: str, outputs: dict[str, Path], small: Path) -> None:
    found = weights(outputs[mode])
    for i in range(read_config(small).layers):
        for field in ("input_scale", "input_offset"):
            values = {float(found[f"model.language_model.layers.{i}.self_attn.{n}_proj.{field}"]) for n in "qkv"}
            assert len(values) == 1


def test_an_unsmoothed_input_by_min_and_max_covers_just_what_was_seen(
    outputs: dict[str, Path], small: Path, small_stats: Path
) -> None:
    found, site = weights(outputs["W8A8 fp16"]), f"{LAYER}.self_attn.o_proj"
    stats = Statistics.open(small_stats).input(site)
    low, high = stats.minimum.min(), stats.maximum.max()
    scale = (high - low) / 255
    assert float(found[f"{site}.input_scale"]) == float(scale)
    assert float(found[f"{site}.input_offset"]) == float(torch.round(-128 - low / scale))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_quantized_is_copied(mode: str, outputs: dict[str, Path], small: Path) -> None:
    found, source = weights(outputs[mode]), weights(small)
    smoothed = {
        f"{norm}.weight"
        for norm in read_config(small).family.rms_norms(read_config(small))
        if norm.endswith(("input_layernorm", "post_attention_layernorm"))
    }
    for name, tensor in source.items():
        if name.endswith("v_proj.bias"):  # its rows may be divided by the scales of o_proj's input, powers of two
            ratio = (tensor.float() / found[name].float()).log2()
            assert torch.equal(ratio, ratio.round())
        elif name.removesuffix(".weight") not in quantized_linears(small) and name not in smoothed:
            assert torch.equal(found[name], tensor.to(found[name].dtype))
    assert all(not found[f"{norm}.bias"].any() for norm in read_config(small).family.rms_norms(read_config(small)))


@pytest.mark.parametrize("mode", MODES)
def test_the_description_says_the_type_of_every_tensor(mode: str, outputs: dict[str, Path], small: Path) -> None:
    document = json.loads((outputs[mode] / "quant_model_description.json").read_text())
    kind, linears = mode.split()[0], quantized_linears(small)
    assert list(document)[:2] == ["version", "model_quant_type"]
    assert (document.pop("version"), document.pop("model_quant_type")) == ("1.0.0", kind)
    wanted = {}
    for name in weights(outputs[mode]):
        base, _, suffix = name.rpartition(".")
        wanted[name] = kind if base in linears and suffix != "bias" else "FLOAT"
    assert {name: document.get(name) for name in wanted} == wanted
    # The rest are aliases for engines that pack and split linears otherwise, or ask for them by a shorter name.
    aliases = {name.rpartition(".")[0] for name in set(document) - set(wanted)}
    block = "model.visual.blocks.0"
    assert aliases == {
        *(f"model.language_model.layers.{i}.mlp.{half}_proj" for i in range(2) for half in ("gate", "up")),
        *(f"{block}.attn.{name}_proj" for name in "qkv"), f"{block}.mlp.gate_up_proj", "model.visual.merger.gate_up_proj",
        *(f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"),
        *(f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "gate_up", "down")),
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_config_changes_its_dtypes_alone(mode: str, outputs: dict[str, Path], small: Path) -> None:
    config = json.loads((outputs[mode] / "config.json").read_text())
    source = json.loads((small / "config.json").read_text())
    dtype = "bfloat16" if mode == "W8A8 bf16" else "float16"
    assert (config["torch_dtype"], config["text_config"]["dtype"]) == (dtype, dtype)
    source["torch_dtype"] = source["text_config"]["dtype"] = dtype
    assert config == source
    assert "quantize" not in config
    assert "quantization_config" not in config


def test_the_side_files_are_copied_and_everything_has_the_modes_that_the_engine_checks(
    outputs: dict[str, Path], small: Path
) -> None:
    out = outputs["W8A8S fp16"]
    made = {"config.json", "quant_model_description.json", "quant_model_weight_w8a8s.safetensors"}
    reports = {"glmq_report.json", "glmq_report.csv", "glmq_report.html", "glmq_checksums.json", "README.md"}
    copied = {path.name for path in small.iterdir()} - {"config.json", FILE, "model.safetensors.index.json"}
    assert {
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    } <= copied
    assert {path.name for path in out.iterdir()} == made | reports | copied
    assert all((out / name).read_bytes() == (small / name).read_bytes() for name in copied)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_parts_hold_the_same_tensors_each_below_the_limit(
    small: Path, small_stats: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    # The smallest limit is a megabyte, which the small model does not reach: one numbered part and an index.
    out = quantize(small, small_stats, tmp_path / "out", shard_bytes=2**20, **W8A8S)
    stem = "quant_model_weight_w8a8s"
    assert [path.name for path in sorted(out.glob("*.safetensors"))] == [f"{stem}-00001-of-00001.safetensors"]
    index = json.loads((out / f"{stem}.safetensors.index.json").read_text())
    whole = weights(outputs["W8A8S fp16"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"] == dict.fromkeys(sorted(whole), f"{stem}-00001-of-00001.safetensors")
    found = weights(out)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_parts_are_filled_one_after_the_other(tmp_path: Path, pictures: Path) -> None:
    model = tmp_path / "model"
    make_checkpoint(model, Size(hidden=128, intermediate=256, vocab=3072))
    stats = calibrate(model, tmp_path / "stats", pictures, limit=1, texts=False)
    out = quantize(model, stats, tmp_path / "out", shard_bytes=2**20, is_dynamic=True)
    stem = "quant_model_weight_w8a8_dynamic"
    files = sorted(out.glob("*.safetensors"))
    assert [path.name for path in files] == [f"{stem}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    assert all(size < 2**20 for size in sizes)
    found, whole = weights(out), weights(quantize(model, stats, tmp_path / "whole", is_dynamic=True))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_statistics_made_on_the_way_give_the_same_bytes_as_stored_ones(
    small: Path, pictures: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    calibration = CalibrationOptions(images=pictures, limit=2)
    quantize(small, None, tmp_path / "out", calibration=calibration, **W8A8S)
    assert tree(tmp_path / "out") == tree(outputs["W8A8S fp16"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_statistics_the_model_is_never_run(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(StreamedModel, "__init__", refuse)
    quantize(small, small_stats, tmp_path / "out")


@pytest.mark.parametrize("mode", ["W8A8S fp16", "W8A8 bf16"])
@pytest.mark.parametrize(("group", "norm"), [(0, "input_layernorm"), (2, "post_attention_layernorm")])
def test_norm_and_scaled_weights_compose_to_the_original(
    mode: str, group: int, norm: str, outputs: dict[str, Path], small: Path, small_stats: Path
) -> None:
    stats, original, result, linears = smooth(mode, group, norm, small, small_stats)
    scales, new = result.scales, result.norm_weight
    assert torch.equal(weights(outputs[mode])[f"{LAYER}.{norm}.weight"], new)
    assert (scales != 1).any()
    # The scales are the float32 quotient of the original norm and the stored one, so their product misses the original
    # by one rounding: the storage dtype's own rounding is absorbed by the scales.
    assert ((new.double() * scales.double() - original.double()).abs() <= U * original.double().abs()).all()
    for linear in linears:
        x, w = stats.sample, linear.weight
        smoothed = (x / scales).double() @ (w * scales).double().T
        # Both factors of each product are rounded once.
        bound = (2 * U + U * U) * x.abs().double() @ w.abs().double().T
        assert ((smoothed - x.double() @ w.double().T).abs() <= bound).all()


def smooth(
    mode: str, group: int, norm: str, model: Path, stats_path: Path
) -> tuple[object, Tensor, GroupResult, list[FloatLinear]]:
    """One group of LAYER, quantized by itself as the run does it."""
    options = (
        Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16") if mode == "W8A8S fp16" else Options()
    )
    recipe, source = make_recipe(options), weights(model)
    shapes = read_config(model).family.text_block(read_config(model), 1).groups[group]
    linears = [
        FloatLinear(
            s.name, source[f"{s.name}.weight"].float(), source[f"{s.name}.bias"].float() if s.has_bias else None
        )
        for s in shapes.linears
    ]
    stats = Statistics.open(stats_path).input(shapes.site)
    original = source[f"{LAYER}.{norm}.weight"]
    result = quantize_group(linears, stats, recipe.scheme, norm_weight=original, dtype=recipe.dtype)
    return stats, original, result, linears


def test_without_outlier_suppression_no_norm_changes(small: Path, small_stats: Path, tmp_path: Path) -> None:
    found = weights(quantize(small, small_stats, tmp_path / "out", anti_method="none"))
    source = weights(small)
    assert all(
        torch.equal(found[f"{norm}.weight"], source[f"{norm}.weight"])
        for norm in read_config(small).family.rms_norms(read_config(small))
    )


def test_the_older_mindie_layout(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = quantize(small, small_stats, tmp_path / "out", mindie_format=True, **W8A8S)
    found, norms = weights(out), list(read_config(small).family.rms_norms(read_config(small)))
    document = json.loads((out / "quant_model_description_w8a8s.json").read_text())
    assert "version" not in document
    assert document.pop("model_quant_type") == "W8A8S"
    assert document.keys() == found.keys()
    for norm in norms:
        assert torch.equal(found[f"{norm}.module.weight"], found[f"{norm}.weight"])
        assert torch.equal(found[f"{norm}.module.bias"], found[f"{norm}.bias"])
        assert {document[f"{norm}.module.{end}"] for end in ("weight", "bias")} == {"W8A8S"}
    config = json.loads((out / "config.json").read_text())
    assert config["quantize"] == "w8a8s"
    assert config["quantization_config"] == {
        "group_size": 0, "act_method": 2, "anti_method": "m2", "is_lowbit": True, "mm_tensor": False, "w_sym": True,
        "open_outlier": True, "is_dynamic": False, "w_bit": 4, "a_bit": 8, "dev_type": "npu",
    }  # fmt: skip
    assert not (out / "quant_model_description.json").exists()


def test_the_older_mindie_layout_says_the_group_size_that_a_rule_gives(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    rule = ("*.o_proj=W4A8_DYNAMIC",)
    out = quantize(small, small_stats, tmp_path / "out", mindie_format=True, is_dynamic=True, layer=rule)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == 64


def test_the_older_mindie_layout_says_how_the_weights_were_made(small: Path, small_stats: Path, tmp_path: Path) -> None:
    def said(name: str, **options: object) -> list[object]:
        out = quantize(small, small_stats, tmp_path / name, mindie_format=True, reports=False, **options)
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        return [settings[key] for key in ("anti_method", "is_lowbit", "open_outlier", "is_dynamic", "w_bit")]

    four_bits = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "torch_dtype": "fp16"}
    assert said("groups", anti_method="none", **four_bits) == ["none", True, False, True, 4]
    assert said("smooth", do_smooth=True) == ["smoothquant", False, True, False, 8]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "version 5"])
def test_another_layout_of_the_config_gives_the_same_weights_and_the_nested_config(
    layout: str, small_copy: Path, pictures: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    def flatten(config: dict) -> None:
        text = config.pop("text_config")
        config.update({key: text[key] for key in text if key not in ("model_type", "dtype") and "token_id" not in key})

    def rename(config: dict) -> None:
        text = config["text_config"]
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["rope_parameters"]["partial_rotary_factor"] = text.pop("partial_rotary_factor")

    edit_json(small_copy / "config.json", flatten if layout == "flat" else rename)
    calibration = CalibrationOptions(images=pictures, limit=2)
    out = quantize(small_copy, None, tmp_path / "out", calibration=calibration, **MODES["W8A8 fp16"])
    wanted = weights(outputs["W8A8 fp16"])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(out).items())
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["dtype"] == "float16"
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [1, 1, 2]}
    assert ("rope_parameters" in text) is (layout == "version 5")  # transformers 5 reads it, MindIE the older fields


def refused_quantization(model: Path, stats: Path, out: Path, **options: object) -> tuple[int, str]:
    """Exit code and the error's sentence; whatever lay around the output must be as before."""
    before = tree(out.parent)
    said = refused(lambda: quantize(model, stats, out, **options))
    assert tree(out.parent) == before
    return said


DAMAGE: dict[str, tuple[str, Callable[[Tensor], object], dict[str, object], str]] = {
    "a quantized weight with NaN": (
        f"{LAYER}.mlp.gate_up_proj.weight", lambda t: t[5, 3:5].fill_(torch.nan), {},
        f"{FILE}: tensor '{LAYER}.mlp.gate_up_proj.weight' holds 2 NaN or infinite values of 12288; "
        "download the file again or repair the checkpoint",
    ),
    "a copied weight with infinity": (
        "model.visual.merger.up_proj.weight", lambda t: t[0, 0].fill_(-torch.inf), {},
        f"{FILE}: tensor 'model.visual.merger.up_proj.weight' holds 1 NaN or infinite values of 6144; "
        "download the file again or repair the checkpoint",
    ),
    "a bias with NaN": (
        f"{LAYER}.self_attn.k_proj.bias", lambda t: t[0].fill_(torch.nan), {},
        f"{FILE}: tensor '{LAYER}.self_attn.k_proj.bias' holds 1 NaN or infinite values of 32; "
        "download the file again or repair the checkpoint",
    ),
    "a norm with NaN": (
        f"{LAYER}.input_layernorm.weight", lambda t: t[0].fill_(torch.nan), {},
        f"{FILE}: tensor '{LAYER}.input_layernorm.weight' holds 1 NaN or infinite values of 64; "
        "download the file again or repair the checkpoint",
    ),
    "a copied weight beyond float16": (
        "lm_head.weight", lambda t: t[3, 4].fill_(1e6), W8A8S,
        f"{FILE}: tensor 'lm_head.weight' reaches 999424, float16 ends at 65504; "
        "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint",
    ),
    "a copied norm beyond float16": (
        f"{LAYER}.post_mlp_layernorm.weight", lambda t: t[3].fill_(-1e6), W8A8S,
        f"{LAYER}.post_mlp_layernorm.weight: its largest magnitude is 999424, which float16 cannot hold; "
        "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint",
    ),
    "a bias beyond float16": (
        f"{LAYER}.self_attn.v_proj.bias", lambda t: t[3].fill_(1e6), W8A8S,
        f"{LAYER}.self_attn.v_proj.bias: its largest magnitude is 999424, which float16 cannot hold; "
        "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_weight_that_cannot_be_stored_is_named_and_nothing_is_left(
    what: str, small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    name, damage, options, sentence = DAMAGE[what]
    edit_tensors(small_copy, lambda tensors: damage(tensors[name]))
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    older = without_checksums(small_stats, tmp_path / "stats")  # they take any weights of that layout
    assert refused_quantization(small_copy, older, out, **options) == (4, sentence)


def changed(tensors: dict[str, Tensor], name: str) -> None:
    """One value of a tensor, as a fine-tune would."""
    tensors[name].view(-1)[0] += 1


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight",
        "model.visual.patch_embed.proj.bias", "model.visual.merger.up_proj.weight", f"{LAYER}.mlp.gate_up_proj.weight",
        f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.self_attn.k_proj.bias", f"{LAYER}.input_layernorm.weight",
    ],
)  # fmt: skip
def test_statistics_of_other_weights_of_the_same_layout_are_refused_by_the_tensor(
    name: str, small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    edit_tensors(small_copy, lambda tensors: changed(tensors, name))
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    assert refused_quantization(small_copy, small_stats, out) == (
        4,
        f"{small_copy / FILE}: tensor {name!r} is not the one that the statistics in {small_stats} come from; "
        "run `glmq calibrate` on this model",
    )


def test_damaged_statistics_are_refused_and_nothing_is_left(small: Path, small_stats: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    shutil.copytree(small_stats, stats)
    path = stats / f"{LAYER}.safetensors"
    content = bytearray(path.read_bytes())
    content[Checkpoint.open(stats).info(f"{LAYER}.self_attn.q_proj.maximum").start] ^= 1
    path.write_bytes(content)
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    assert refused_quantization(small, stats, out, **W8A8S) == (
        4,
        f"{path}: tensor '{LAYER}.self_attn.q_proj.maximum' is not the one that `glmq calibrate` wrote; "
        "copy the folder again or run `glmq calibrate` again",
    )


@pytest.mark.slow
def test_statistics_without_checksums_are_used_and_named_and_every_run_writes_the_same_bytes(
    small: Path, small_stats: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    older = without_checksums(small_stats, tmp_path / "stats")
    events: list[Event] = []
    quantize(small, older, tmp_path / "out", watch=events.append, **W8A8S)
    assert (
        f"note: the statistics in {older} have no checksums, an older glmq wrote them: only damage that makes them "
        "impossible is found, and not whether the weights are those that they come from"
    ) in [event.text for event in events if isinstance(event, Note)]
    found, wanted = tree(tmp_path / "out"), tree(outputs["W8A8S fp16"])
    assert found.pop(CHECKSUMS) != wanted.pop(CHECKSUMS)
    assert found == wanted
    assert (read_checksums(tmp_path / "out").source, len(read_checksums(outputs["W8A8S fp16"]).source) > 0) == (
        {},
        True,
    )


def test_a_failed_run_leaves_an_existing_output_as_it_was(small_copy: Path, small_stats: Path, tmp_path: Path) -> None:
    out = quantize(small_copy, small_stats, tmp_path / "outputs" / "out")
    edit_tensors(small_copy, lambda tensors: tensors["lm_head.weight"][0, 0].fill_(torch.nan))
    code, sentence = refused_quantization(small_copy, small_stats, out, overwrite=True)
    assert (code, "lm_head.weight" in sentence) == (4, True)


def test_a_large_norm_that_smoothing_moves_into_the_weights_is_no_overflow(
    small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    name = f"{LAYER}.input_layernorm.weight"
    edit_tensors(small_copy, lambda tensors: tensors[name][3].fill_(1e6))
    older = without_checksums(small_stats, tmp_path / "stats")
    found = weights(quantize(small_copy, older, tmp_path / "out", **W8A8S))
    assert torch.isfinite(found[name]).all()


def test_a_quantized_checkpoint_is_no_source(outputs: dict[str, Path], small_stats: Path, tmp_path: Path) -> None:
    code, sentence = refused_quantization(outputs["W8A8S fp16"], small_stats, tmp_path / "out", **W8A8S)
    assert code == 4
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert sentence == (
        f"quant_model_weight_w8a8s.safetensors: tensor '{name}' is I8, one of F64, F32, F16, BF16 is needed; "
        "give the float weights, not a quantized checkpoint"
    )


@pytest.mark.parametrize("name", [f"{LAYER}.self_attn.o_proj.bias", f"{LAYER}.input_layernorm.bias", "lm_head.bias"])
def test_a_foreign_tensor_of_a_module_of_the_model_is_refused(
    name: str, small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    edit_tensors(small_copy, lambda tensors: tensors.update({name: torch.zeros(64)}))
    (small_copy / "model.safetensors.index.json").unlink()
    assert refused_quantization(small_copy, small_stats, tmp_path / "out") == (
        4, f"{FILE}: tensor '{name}' is no part of a GLM-4.1V or GLM-4.6V-Flash; give the float release's weights",
    )  # fmt: skip


def test_missing_tensors_are_counted_and_the_first_is_named(
    small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            del tensors[name]

    edit_tensors(small_copy, drop)
    (small_copy / "model.safetensors.index.json").unlink()
    code, sentence = refused_quantization(small_copy, small_stats, tmp_path / "out")
    total = len(read_config(small_copy).family.shapes(read_config(small_copy)))
    assert code == 4
    assert sentence == (
        f"{small_copy}: 13 of the model's {total} tensors are missing, "
        f"the first is '{LAYER}.input_layernorm.weight'; download the checkpoint again"
    )


def test_a_config_of_another_size_is_refused_by_the_first_tensor_that_differs(
    small_copy: Path, small_stats: Path, tmp_path: Path
) -> None:
    edit_json(small_copy / "config.json", lambda c: c["text_config"].update(num_attention_heads=8, head_dim=16))
    assert refused_quantization(small_copy, small_stats, tmp_path / "out") == (
        4,
        f"{FILE}: tensor '{FAMILY.text}.layers.0.self_attn.q_proj.weight' has shape (64, 64), "
        "config.json asks for (128, 64); take both from the same release",
    )


def test_an_input_without_statistics_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Permission is hereby granted."}\n')
    stats = calibrate(small, tmp_path / "stats", None, samples_file=tmp_path / "texts.jsonl")
    assert refused_quantization(small, stats, tmp_path / "out", layer=("model.visual.*=W8A8",)) == (
        4,
        f"{stats}: has no statistics of 'model.visual.blocks.0.attn.proj'; run `glmq calibrate` on this model",
    )


def test_statistics_of_other_weights_are_refused(small: Path, tmp_path: Path, small_stats: Path) -> None:
    other = tmp_path / "other"
    make_checkpoint(other, Size(layers=1))
    with Checkpoint.open(small) as one, Checkpoint.open(other) as two:
        theirs, ours = one.fingerprint()[:12], two.fingerprint()[:12]
    assert refused_quantization(other, small_stats, tmp_path / "out") == (
        4,
        f"{small_stats}: these statistics come from another checkpoint "
        f"(theirs {theirs}, this model's {ours}); run `glmq calibrate` on this model",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_weights_of_another_dtype_are_taken(
    dtype: torch.dtype, small_copy: Path, pictures: Path, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights(small_copy).items()}
    save_file(tensors, small_copy / FILE, metadata={"format": "pt"})
    out = quantize(small_copy, None, tmp_path / "out", calibration=CalibrationOptions(images=pictures, limit=1))
    assert torch.equal(weights(out)["lm_head.weight"], tensors["lm_head.weight"].bfloat16())


def test_the_reports_bytes_are_those_of_the_files(outputs: dict[str, Path], small: Path) -> None:
    report = json.loads((outputs["W8A8S fp16"] / "glmq_report.json").read_text())
    for side, folder in (("before", small), ("after", outputs["W8A8S fp16"])):
        found: dict[str, int] = {}
        for name, tensor in weights(folder).items():
            area = FAMILY.area(name).value
            found[area] = found.get(area, 0) + tensor.nbytes
        assert {entry["part"]: entry[side] for entry in report["bytes"]} == found


def test_the_report_measures_what_was_written(outputs: dict[str, Path], small: Path) -> None:
    found = weights(outputs["W8A8S fp16"])
    report = json.loads((outputs["W8A8S fp16"] / "glmq_report.json").read_text())
    assert [row["name"] for row in report["linears"]] == quantized_linears(small)
    for row in report["linears"]:
        q = found[f"{row['name']}.weight"]
        counts = [int((q == value).sum()) for value in range(-128, 128)]
        shares = [count / q.numel() for count in counts if count]
        assert (row["rows"], row["cols"]) == tuple(q.shape)
        assert row["entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-12)
        assert row["zero_share"] == counts[128] / q.numel()
        assert row["outlier_share"] == int((q.int().abs() > 7).sum()) / q.numel()
        scale = float(found[f"{row['name']}.input_scale"])
        offset = float(found[f"{row['name']}.input_offset"])
        assert (row["input_low"], row["input_high"]) == ((-128 - offset) * scale, (127 - offset) * scale)
        steps = found[f"{row['name']}.deq_scale"].to(torch.int32).view(torch.float32) / scale
        # deq_scale is the float32 product of step and scale: dividing it again rounds twice.
        assert row["step_min"] == pytest.approx(float(steps.min()), rel=2 * U)
        assert row["step_max"] == pytest.approx(float(steps.max()), rel=2 * U)
        assert row["sqnr_db"] == -20 * math.log10(row["output_error"])


def quantize_by_ranks(small: Path, small_stats: Path, out: Path, ranks: Ranks, *, blocks: int | None = None) -> None:
    """The engine's two passes of README's sparse command on one rank of several, or only some blocks of the second."""
    out.mkdir(exist_ok=True)
    config = read_config(small)
    recipe = make_recipe(Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16"))
    with Checkpoint.open(small) as source:
        plan = plan_output(source, config, recipe, plan_groups(recipe, config), None, {})
        journal = Journal(out, {}, writes=ranks.place.is_first)
        work = QuantizationRun(source, config, RowFolds(source, Statistics.open(small_stats)), journal, ranks)
        curves: list[RateCurve] = [c for block in rate_checkpoint(work, recipe, plan.groups) for c in block.curves]
        bits = solve_bits(curves, mean_rule_bits(curves))
        planned = {curve.name: wanted for curve, wanted in zip(curves, bits, strict=True)}
        records = quantize_checkpoint(work, recipe, plan, out, bits=planned)
        done = [block.done.name for _, block in zip(range(blocks or 99), records)]
        ranks.barrier()  # rank 0 has journalled
        records.close()
        if blocks is None:
            assert done[1:] == [
                "model.visual.merger", "model.language_model.layers.0", "model.language_model.layers.1", "lm_head",
                "embeddings and side files",
            ]  # fmt: skip
            if ranks.place.is_first:
                (out / "journal.jsonl").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "before", "blocks"), [(3, 1, 0), (3, 2, 1), (2, 3, 2), (2, 4, 5)])
def test_several_ranks_write_the_bytes_of_one_whoever_began(
    world: int, before: int, blocks: int, small: Path, small_stats: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if blocks:
        begun = run_ranks(before, lambda g: quantize_by_ranks(small, small_stats, out, g, blocks=blocks))
        assert begun == [""] * before
    assert run_ranks(world, lambda group: quantize_by_ranks(small, small_stats, out, group)) == [""] * world
    wanted = tree(outputs["W8A8S fp16"])
    reports = {name for name in wanted if name.startswith(("glmq_report", "README"))}  # the command writes these
    assert reports
    again, whole = read_checksums(out), read_checksums(outputs["W8A8S fp16"])
    assert (again.tensors, again.headers) == (whole.tensors, whole.headers)
    assert again.files == {name: checksum for name, checksum in whole.files.items() if name not in reports}
    left = {*reports, CHECKSUMS}
    found = {name: sha for name, sha in tree(out).items() if name != CHECKSUMS}
    assert found == {name: sha for name, sha in wanted.items() if name not in left}
