"""Whole checkpoints in the compressed-tensors form: verified, compared, and run by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, edit_json, edit_tensors, quantize, refused, tree
from safetensors import safe_open
from torch import Tensor, nn

from glmq.checkpoint.linears import decode_linear, integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.inspection.folder import Kind, scan_folder
from glmq.jobs.compare import compare
from glmq.jobs.verify import verify
from glmq.numerics.grouped import expand_groups
from glmq.numerics.int8_linear import run_linear
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import Form

CT = {"format": "compressed-tensors"}
OPTIONS: dict[str, dict[str, object]] = {
    "W8A8": CT,
    "W8A8_DYNAMIC": CT | {"is_dynamic": True},
    "W8A16": CT | {"a_bit": 16},
    "W4A16": CT | {"w_bit": 4, "a_bit": 16},
}
TEXT = "model.language_model.layers.0"


@pytest.fixture(scope="module")
def written(half: Path, half_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained layers in every type of the form, bf16."""
    folder = tmp_path_factory.mktemp("compressed")
    return {name: quantize(half, half_stats, folder / name, **options) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def few(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of the small model, whose ten linears are quicker to read."""
    folder = tmp_path_factory.mktemp("few")
    return {name: quantize(small, small_stats, folder / name, **options) for name, options in OPTIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", OPTIONS)
def test_what_is_written_passes_verify_and_is_known_to_inspect(
    quant_type: str, written: dict[str, Path], half: Path
) -> None:
    folder = written[quant_type]
    report = verify(folder, reference=half)
    assert report.findings == []
    assert len(report.linears) == 15
    assert {linear.type for linear in report.linears} == {"INT4" if quant_type == "W4A16" else "INT8"}
    assert report.what == f"quantized checkpoint, {quant_type} (compressed-tensors), bfloat16 floats"
    scanned = scan_folder(folder)
    assert (scanned.kind, scanned.form, scanned.quant_type) == (Kind.QUANTIZED, Form.COMPRESSED_TENSORS, quant_type)
    assert scanned.problems == ()
    assert {t.name for t in scanned.tensors if t.quant_type == "?"} == set()
    assert not list(folder.glob("quant_model_description*"))


@pytest.mark.parametrize("quant_type", OPTIONS)
def test_inspect_compares_the_weights_that_the_integers_stand_for(
    quant_type: str, few: dict[str, Path], small: Path
) -> None:
    for one, other in ((small, few[quant_type]), (few[quant_type], small)):
        diff = compare(one, other)
        linears = [d for d in diff.diffs if "INT4" in (d.type_a, d.type_b) or "INT8" in (d.type_a, d.type_b)]
        assert len(linears) == 10
        # 4 bits in groups of 64: steps of max / 7.5, 1 / sqrt(12) of a step is a tenth of the norm; compensation moves more.
        assert all(0 < d.relative_l2 < (0.3 if quant_type == "W4A16" else 0.03) for d in linears)
        assert diff.only_a == diff.only_b == []


def test_every_linear_is_a_target_or_ignored_by_its_exact_name(few: dict[str, Path], small: Path) -> None:
    document = json.loads((few["W8A8"] / "config.json").read_text())["quantization_config"]
    (group,) = document["config_groups"].values()
    assert len(group["targets"]) == 10
    assert all(re.fullmatch(r"model\.language_model\.layers\.\d\.\S+", name) for name in group["targets"])
    named = {*document["ignore"], *group["targets"]}
    with Checkpoint.open(small) as source:
        matrices = {n.removesuffix(".weight") for n in source if n.endswith(".weight") and len(source[n].shape) == 2}
    floats = {"model.language_model.embed_tokens", "model.visual.embeddings.position_embedding"}
    assert matrices - named == floats
    # What is no tensor is what vLLM calls the fused linears of the vision tower.
    assert {re.sub(r"\d", "N", name) for name in named - matrices} == {
        "model.visual.blocks.N.attn.q_proj", "model.visual.blocks.N.attn.k_proj", "model.visual.blocks.N.attn.v_proj",
        "model.visual.blocks.N.mlp.gate_up_proj", "model.visual.merger.gate_up_proj",
    }  # fmt: skip
    assert not [name for name in named if name.startswith("re:")]


def test_types_may_be_mixed_by_layer(small: Path, small_stats: Path, tmp_path: Path) -> None:
    rules = ("*.gate_up_proj=W4A16", "*.layers.1.*o_proj=W8A8_DYNAMIC")
    quantize(small, small_stats, tmp_path / "out", layer=rules, **CT)
    assert verify(tmp_path / "out", reference=small).findings == []
    document = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert document["format"] == "mixed-precision"
    assert [len(group["targets"]) for group in document["config_groups"].values()] == [7, 2, 1]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert decode_linear(f"{TEXT}.mlp.gate_up_proj", checkpoint).quant_type.value == "W4A16"
        assert decode_linear(f"{TEXT}.self_attn.o_proj", checkpoint).quant_type.value == "W8A8"


def test_shards_are_named_as_transformers_looks_for_them(small: Path, small_stats: Path, tmp_path: Path) -> None:
    options = OPTIONS["W4A16"] | {"group_size": 32, "torch_dtype": "fp16"}
    quantize(small, small_stats, tmp_path / "out", shard_bytes=200_000, **options)
    files = sorted(path.name for path in (tmp_path / "out").glob("*safetensors*"))
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    assert verify(tmp_path / "out", reference=small).findings == []


def test_w8a16_in_ascend_v1_has_a_step_for_each_row(small: Path, small_stats: Path, tmp_path: Path) -> None:
    quantize(small, small_stats, tmp_path / "out", a_bit=16)
    assert verify(tmp_path / "out", reference=small).findings == []
    with safe_open(tmp_path / "out/quant_model_weight_w8a16.safetensors", "pt") as file:
        found = {n.rpartition(".")[2]: file.get_tensor(n) for n in file.keys() if n.startswith(f"{TEXT}.self_attn.o_")}  # noqa: SIM118
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in found.items()} == {
        "weight": (torch.int8, (64, 64)),
        "weight_scale": (torch.bfloat16, (64, 1)),
        "weight_offset": (torch.bfloat16, (64, 1)),
    }
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert decode_linear(f"{TEXT}.self_attn.o_proj", checkpoint).quant_type.value == "W8A16"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            CT | {"mindie_format": True},
            "--mindie_format True with --format compressed-tensors: they name two forms; drop one of them",
        ),
        (
            CT | W8A8S,
            "W8A8S is not written in the compressed-tensors form; pass --format ascendv1 or mindie",
        ),
        (
            {"w_bit": 4, "a_bit": 16},
            "W4A16 is not written in the ascendv1 form; pass --format compressed-tensors",
        ),
        (
            {"a_bit": 16, "mindie_format": True},
            "W8A16 is not written in the mindie form; pass --format ascendv1 or compressed-tensors",
        ),
        (
            {"a_bit": 16, "is_dynamic": True},
            "--is_dynamic True with --a_bit 16: activations stay float and weights dense there; drop one of them",
        ),
        ({"a_bit": 16, "group_size": 256}, "--group_size 256: one of 32, 64, 128 is needed"),
        (
            {"a_bit": 16, "method": "reference"},
            "--method reference with --a_bit 16: the vendor's tool makes no W8A16 of this model; drop one of them",
        ),
        (
            CT | {"bias_correction": True},
            "--bias-correction with --format compressed-tensors: it stores no quant_bias to correct; drop one of them",
        ),
        (
            {"layer": ("*.o_proj=W4A16",)},
            "--layer '*.o_proj=W4A16': W4A16 is not written in the ascendv1 form; pass --format compressed-tensors",
        ),
        (
            CT | {"target": "mindie-800i-a2"},
            "--format compressed-tensors with --target mindie-800i-a2: MindIE does not read it; drop one of them",
        ),
        ({"format": "gguf"}, "--format gguf: one of ascendv1, mindie, compressed-tensors is needed"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], sentence: str) -> None:
    assert refused(lambda: make_recipe(Options(**options))) == (2, sentence)


def test_the_older_form_may_be_named_too(small: Path, small_stats: Path, tmp_path: Path) -> None:
    quantize(small, small_stats, tmp_path / "one", mindie_format=True)
    quantize(small, small_stats, tmp_path / "two", format="mindie")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


DAMAGES = {
    "a scale that is not finite": (10, lambda t: t[f"{TEXT}.self_attn.q_proj.weight_scale"].fill_(float("inf"))),
    "a missing zero point": (7, lambda t: t.pop(f"{TEXT}.self_attn.q_proj.input_zero_point")),
    "a tensor of another form": (7, lambda t: t.update({f"{TEXT}.self_attn.q_proj.quant_bias": torch.zeros(64)})),
    "a norm's bias": (6, lambda t: t.update({f"{TEXT}.input_layernorm.bias": torch.zeros(64)})),
    "another input scale for one of q, k, v": (12, lambda t: t[f"{TEXT}.self_attn.q_proj.input_scale"].mul_(2)),
    "weights of another model": (16, lambda t: t[f"{TEXT}.mlp.gate_up_proj.weight"].random_(-127, 127)),
    "a changed float": (6, lambda t: t["lm_head.weight"][0].add_(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, few: dict[str, Path], small: Path, tmp_path: Path) -> None:
    check, edit = DAMAGES[damage]
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in few["W8A8"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_tensors(folder, edit)
    assert check in {finding.check.number for finding in verify(folder, reference=small).findings}


def test_a_linear_that_is_named_nowhere_is_found(few: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in few["W4A16"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_json(folder / "config.json", lambda d: d["quantization_config"]["ignore"].remove("lm_head"))
    found = [(f.check.number, f.tensor, f.message) for f in verify(folder).findings if f.check.number == 36]
    assert found == [
        (36, "lm_head", "is neither a target nor ignored in quantization_config, wanted one group or ignore")
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("packing_library")
@pytest.mark.parametrize("quant_type", OPTIONS)
def test_transformers_computes_what_verify_computes(quant_type: str, written: dict[str, Path]) -> None:
    """Every linear, on the inputs that it gets in transformers' own model of the folder, in float32.

    transformers multiplies x' = s (xq - z) with w' = q t in float32, glmq the integers, exactly: each factor is rounded once
    and the sum of K products K times at most, so (K + 4) 2^-24 of the sum of the magnitudes bounds the difference. Few inputs
    are so near to a tie that the two round them to different integers.

    Per token, the library's scale is max|x| / 127.5, where engines' kernels (vLLM's too) take max|x| / 127: each is within
    half a step of x, so they differ by a step of max|x| / 127 for every input at most.
    """
    from transformers import AutoModelForImageTextToText

    folder = written[quant_type]
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    assert {key: list(value) for key, value in info.items() if value} == {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(
            lambda _, given, y: seen.update({name: (given[0].flatten(0, -2), y.flatten(0, -2))})
        )

    for name, module in model.named_modules():
        if name.endswith("_proj") and "language_model" in name and "down_proj" not in name:
            note(name, module)
    with torch.no_grad():
        model(input_ids=torch.arange(20, 60)[None])
    with Checkpoint.open(folder) as checkpoint:
        assert set(seen) == set(integer_linears(checkpoint))
        for name, (x, y) in seen.items():
            linear, columns = decode_linear(name, checkpoint), x.shape[1]
            weight = linear.weight.abs() * expand_groups(linear.weight_scale, columns)
            reach = x.abs()
            if linear.activation is not None:  # a clipped input counts with what its integer stands for
                reach = reach + 256 * linear.activation.scale
            sizes = reach @ weight.T + (0 if linear.bias is None else linear.bias.abs())
            bound = (columns + 4) * 2.0**-24 * sizes
            if quant_type == "W8A8_DYNAMIC":
                bound = bound + x.abs().amax(1, keepdim=True) / 127 * weight.sum(1)
            off = (run_linear(x, linear) - y).abs() > bound
            assert float(off.float().mean()) <= 0.02, name
