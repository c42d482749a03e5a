import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.checkpoint.ascend import encode_linear, encode_norm
from glmq.checkpoint.description import Description, tensor_types, vllm_aliases, write_description
from glmq.checkpoint.json_file import write_json
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import MindieSettings, copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter, TensorSpec, dtype_code, plan_shards
from glmq.errors import CheckpointError
from glmq.model.config import parse_config
from glmq.model.glm4v import expected_shapes, rms_norms, text_block
from glmq.records import ActivationQParams, Finding, QuantizedLinear
from glmq.spec import FloatDtype, QuantType
from glmq.verification import files, linears
from glmq.verification.structure import check_structure

TINY_CONFIG = Path(__file__).parents[2] / "glmq" / "model" / "tiny_glm4v" / "config.json"
LAYER = "model.language_model.layers.0"
Q, K, V, O = (f"{LAYER}.self_attn.{part}_proj" for part in "qkvo")
GATE_UP = f"{LAYER}.mlp.gate_up_proj"
GROUP = 64
SETTINGS = MindieSettings(
    group_size=0, act_method=2, anti_method="m2", is_lowbit=True, mm_tensor=False, w_sym=True, open_outlier=True,
    is_dynamic=False, w_bit=4, a_bit=8, dev_type="npu",
)  # fmt: skip
SIDE_FILES = ("chat_template.jinja", *files.NEEDED_FILES)


def small_config() -> dict[str, object]:
    """A GLM-4.1V of one text layer and one vision block."""
    config = json.loads(TINY_CONFIG.read_text())
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 64,
    }  # fmt: skip
    config["vision_config"] |= {"depth": 1, "hidden_size": 32, "out_hidden_size": 128, "intermediate_size": 64}
    assert isinstance(config, dict)
    return config


CONFIG = parse_config(small_config(), "config.json")


def make_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norm weights and biases in 0.5..1.5, everything else normal."""
    values = (
        torch.rand(shape, generator=generator) + 0.5 if len(shape) == 1 else torch.randn(shape, generator=generator)
    )
    return values.bfloat16()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    directory = tmp_path_factory.mktemp("float")
    generator = torch.Generator().manual_seed(3)
    tensors = {name: make_tensor(shape, generator) for name, shape in expected_shapes(CONFIG).items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(small_config()))
    for name in SIDE_FILES:
        (directory / name).write_text(name)
    with Checkpoint.open(directory) as checkpoint:
        yield checkpoint


def quantize(weight: Tensor, bias: Tensor | None, kind: QuantType) -> QuantizedLinear:
    """Plain rounding, by the formulas of each type; every number exact in float16 where it must be."""
    if kind is QuantType.W4A8_DYNAMIC:
        step = weight.abs().amax(1, keepdim=True) / 119
        whole = (weight / step).round()
        second = (whole.unflatten(1, (-1, GROUP)).abs().amax(2) / 7).round().clamp_min(1)
        q = (whole / second.repeat_interleave(GROUP, 1)).round().clamp(-8, 7).to(torch.int8)
        return QuantizedLinear(kind, q, step, bias, weight_scale_second=second)
    step = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / step).round().to(torch.int8)
    if not kind.is_static:
        return QuantizedLinear(kind, q, step, bias)
    scale, offset = 0.0625, 5
    deq = (step * scale).flatten()
    folded = (0 if bias is None else bias.double() / deq.double()) - offset * q.sum(1).double()
    return QuantizedLinear(kind, q, step, bias, ActivationQParams(scale, offset), deq, folded.round().to(torch.int32))


def build(
    source: Checkpoint, out: Path, kind: QuantType, dtype: FloatDtype, *, mindie: bool, shard_bytes: int | None
) -> None:
    """Quantize the text layer's linears but down_proj, with channel scales 2^0, 2^1, 2^2, ... in the norms before them."""
    tensors: dict[str, Tensor] = {}
    norms = set(rms_norms(CONFIG))
    types: dict[str, QuantType] = {}
    scales = 2.0 ** (torch.arange(128) % 3)
    for group in text_block(CONFIG, 0).groups[:3]:
        for linear in group.linears:
            weight = source.read(f"{linear.name}.weight").float() * (1 if group.norm is None else scales)
            bias = source.read(f"{linear.name}.bias").float() if linear.has_bias else None
            row_parallel = linear.name == O
            tensors |= encode_linear(
                linear.name, quantize(weight, bias, kind), dtype=dtype, mindie=mindie, row_parallel=row_parallel
            )
            types[linear.name] = kind
        if group.norm is not None:
            smoothed = source.read(f"{group.norm}.weight").float() / scales
            tensors |= encode_norm(group.norm, smoothed, dtype=dtype, mindie=mindie)
    for name in source:
        base = name.removesuffix(".weight")
        if base in norms and name not in tensors:
            tensors |= encode_norm(base, source.read(name), dtype=dtype, mindie=mindie)
        elif name not in tensors:
            tensors[name] = source.read(name).to(torch.float16 if dtype is FloatDtype.FP16 else torch.bfloat16)
    specs = [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(plan_shards(specs, f"quant_model_weight_{kind.tag}", shard_bytes), out) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    described = tensor_types(tensors, types, model_quant_type=kind, mindie=mindie)
    group_size = GROUP if kind is QuantType.W4A8_DYNAMIC and not mindie else None
    described = described if mindie else described | vllm_aliases(described)
    write_description(out, Description(kind.value, None if mindie else "1.0.0", group_size, described))
    edited = edit_config(small_config(), dtype=dtype, quant_type=kind, mindie=SETTINGS if mindie else None)
    write_json(out / "config.json", edited, indent=4)
    copy_side_files(source.directory, out)


KINDS = {
    "w8a8": (QuantType.W8A8, FloatDtype.FP16, False, None),
    "w8a8-bf16": (QuantType.W8A8, FloatDtype.BF16, False, None),
    "w8a8s": (QuantType.W8A8S, FloatDtype.FP16, False, None),
    "w8a8s-mindie": (QuantType.W8A8S, FloatDtype.FP16, True, None),
    "w8a8s-parts": (QuantType.W8A8S, FloatDtype.FP16, False, 50_000),
    "dynamic": (QuantType.W8A8_DYNAMIC, FloatDtype.BF16, False, None),
    "dynamic-mindie": (QuantType.W8A8_DYNAMIC, FloatDtype.FP16, True, None),
    "w4a8": (QuantType.W4A8_DYNAMIC, FloatDtype.FP16, False, None),
    "w4a8-mindie": (QuantType.W4A8_DYNAMIC, FloatDtype.BF16, True, None),
}


@pytest.fixture(scope="module")
def good(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good checkpoint of every kind."""
    root = tmp_path_factory.mktemp("good")
    for label, (kind, dtype, mindie, shard_bytes) in KINDS.items():
        build(source, root / label, kind, dtype, mindie=mindie, shard_bytes=shard_bytes)
    return {label: root / label for label in KINDS}


Make = Callable[[str], Path]


@pytest.fixture
def make(good: dict[str, Path], tmp_path: Path) -> Make:
    """A fresh copy of a good checkpoint."""

    def copy(label: str) -> Path:
        return Path(shutil.copytree(good[label], tmp_path / label))

    return copy


def found(directory: Path, source: Checkpoint | None) -> list[tuple[int, str, str]]:
    findings = list(check_structure(directory, source))
    # A mixture of types is wrong for MindIE alone; all else is wrong for every engine.
    assert {finding.check for finding in findings if finding.severity == "warning"} <= {12}
    return [(finding.check, finding.tensor, finding.message) for finding in findings]


def alter(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the single weight file; new ones are described as FLOAT."""
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path) | changes
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path)
    description = next(directory.glob("quant_model_description*"))
    document = json.loads(description.read_text())
    for name, tensor in changes.items():
        if tensor is None:
            document.pop(name, None)
        else:
            document.setdefault(name, "FLOAT")
    description.write_text(json.dumps(document))


def describe(directory: Path, changes: dict[str, object]) -> None:
    """Replace, add or ("-") remove keys of the description."""
    path = next(directory.glob("quant_model_description*"))
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "-"}))


def configure(directory: Path, section: str, changes: dict[str, object]) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_text())
    part = document[section] if section else document
    part |= changes
    for key in [key for key, value in part.items() if value == "-"]:
        del part[key]
    path.write_text(json.dumps(document))


def stored(directory: Path, name: str) -> Tensor:
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.read(name)


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
    monkeypatch.setattr("glmq.inspection.weights.BYTES_AT_ONCE", 700)
    assert [found(path, source) for path in good.values()] == [[]] * len(KINDS)


def test_something_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        list(check_structure(tmp_path / "none", None))
    assert str(caught.value) == f"{tmp_path / 'none'}: is not a folder; give the folder of the quantized checkpoint"


# Description and files ------------------------------------------------------------------------------------------------


def test_no_description_or_two_are_found(make: Make) -> None:
    wanted = "wanted one quant_model_description.json or quant_model_description_TYPE.json, found "
    directory = make("w8a8")
    shutil.copy(directory / "quant_model_description.json", directory / "quant_model_description_w8a8.json")
    both = "quant_model_description.json, quant_model_description_w8a8.json"
    assert found(directory, None) == [(1, "", wanted + both)]
    for path in directory.glob("quant_model_description*"):
        path.unlink()
    assert found(directory, None) == [(1, "", wanted + "none")]


def test_a_broken_description_is_found(make: Make) -> None:
    directory = make("w8a8")
    path = directory / "quant_model_description.json"
    path.write_text("{")
    [(check, tensor, message)] = found(directory, None)
    assert (check, tensor) == (1, "")
    assert message.startswith(f"{path}: is not JSON (")
    path.write_text('{"model_quant_type": 3}')
    assert found(directory, None) == [
        (2, "", f"{path}: model_quant_type is 3, wanted a name like 'W8A8S'; write the file again")
    ]


FOREIGN = "the description has this key, which switches another feature on, even if null"


@pytest.mark.parametrize(
    ("label", "changes", "expected"),
    [
        ("w8a8", {"fa_quant_type": None}, (2, "fa_quant_type", FOREIGN)),
        ("w8a8", {"version": "2.0.0"}, (2, "version", "is '2.0.0', ascendV1 wants '1.0.0'")),
        ("w8a8", {"version": "-"}, (2, "version", "is None, ascendV1 wants '1.0.0'")),
        ("w8a8s-mindie", {"version": "1.0.0"}, (2, "version", "is '1.0.0', the MindIE form wants None")),
        ("w8a8", {"group_size": None}, (2, "group_size", "is null in the description; the key must be absent instead")),
        ("w8a8", {"group_size": 64}, (3, "group_size", "is 64, wanted only in an ascendV1 description of W4A8_DYNAMIC")),
        ("w4a8-mindie", {"group_size": 64}, (3, "group_size", "is 64, wanted only in an ascendV1 description of W4A8_DYNAMIC")),
        ("w4a8", {"group_size": "-"}, (3, "group_size", "is None, wanted one of 64, 128, 256")),
    ],
)  # fmt: skip
def test_wrong_keys_of_the_description_are_found(
    make: Make, label: str, changes: dict[str, object], expected: tuple[int, str, str]
) -> None:
    directory = make(label)
    describe(directory, changes)
    assert found(directory, None) == [expected]


def test_a_group_size_of_32_is_a_warning(make: Make) -> None:
    directory = make("w4a8")
    describe(directory, {"group_size": 32})
    first, *rest = check_structure(directory, None)
    assert first == Finding(3, "warning", "group_size", "is 32, which the MindIE engine refuses")
    assert {finding.check for finding in rest} == {8}


def test_a_description_of_another_type_than_its_name_or_an_unknown_type_is_found(make: Make) -> None:
    directory = make("w8a8s-mindie")
    path = directory / "quant_model_description_w8a8s.json"
    path.rename(directory / "quant_model_description_w8a8.json")
    assert found(directory, None) == [
        (1, "", "quant_model_description_w8a8.json describes W8A8S, wanted the name quant_model_description_w8a8s.json")
    ]
    directory = make("w8a8")
    describe(directory, {"model_quant_type": "W8A8SC"})
    findings = found(directory, None)
    wanted = "is W8A8SC, wanted one of W8A8, W8A8S, W8A8_DYNAMIC, W4A8_DYNAMIC"
    assert findings[0] == (2, "model_quant_type", wanted)
    belongs = (
        "quant_model_weight_w8a8.safetensors does not belong to a W8A8SC checkpoint; engines take every weight file"
    )
    assert findings[1:] == [(4, "", belongs), (4, "", "quant_model_weight_w8a8sc.safetensors is missing")]


def test_files_of_another_checkpoint_and_tensors_in_two_files_are_found(make: Make) -> None:
    directory = make("w8a8")
    save_file({f"{Q}.bias": torch.zeros(1), "x": torch.zeros(1)}, directory / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text("{}")
    rest = " does not belong to a W8A8 checkpoint; engines take every weight file"
    assert found(directory, None) == [
        (4, "", "model.safetensors" + rest),
        (4, "", "model.safetensors.index.json" + rest),
        (5, f"{Q}.bias", "is in model.safetensors and in quant_model_weight_w8a8.safetensors"),
    ]


def test_a_missing_a_damaged_and_a_doubled_part_are_found(make: Make) -> None:
    directory = make("w8a8s-parts")
    parts = sorted(directory.glob("*.safetensors"))
    raw = parts[1].read_bytes()
    shutil.copy(parts[0], parts[1])
    doubled = [finding for finding in found(directory, None) if finding[0] == 5]
    assert sorted(doubled) == [
        (5, name, f"is in {parts[0].name} and in {parts[1].name}") for name in sorted(load_file(parts[0]))
    ]
    parts[1].write_bytes(raw[:-1])
    messages = [message for check, _, message in found(directory, None) if check == 4]
    assert messages[0].startswith(f"{parts[1]}: the file is truncated")
    parts[1].unlink()
    assert (4, "", f"{parts[1].name} is missing") in found(directory, None)


def test_a_wrong_index_is_found(make: Make) -> None:
    directory = make("w8a8s-parts")
    path = directory / "quant_model_weight_w8a8s.safetensors.index.json"
    index = json.loads(path.read_text())
    total = index["metadata"]["total_size"]
    del index["weight_map"][f"{Q}.bias"]
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    assert found(directory, None) == [
        (4, "", f"the weight_map of {path.name} does not list every tensor in the file that has it"),
        (4, "", f"total_size in {path.name} is {total + 1}, the tensors have {total} bytes"),
    ]
    path.unlink()
    assert found(directory, None) == [
        (4, "", f"{path}: cannot be read (No such file or directory); check the path and its permissions")
    ]


V5_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
WRONG_CONFIGS = {
    "no dtype": ("w8a8", "", {"torch_dtype": "-"}, ["torch_dtype is None in config.json, wanted float16 or bfloat16"]),
    "two dtypes": (
        "w8a8",
        "vision_config",
        {"dtype": "bfloat16"},
        [
            "the dtypes in config.json differ: torch_dtype float16, text_config.dtype float16, "
            "vision_config.dtype bfloat16"
        ],
    ),
    "quantize": ("w8a8", "", {"quantize": "w8a8"}, ["config.json has quantize, which ascendV1 must not have"]),
    "quantization_config": (
        "w8a8",
        "",
        {"quantization_config": {}},
        ["config.json has quantization_config, which ascendV1 must not have"],
    ),
    "wrong quantize": (
        "w8a8s-mindie",
        "",
        {"quantize": "w8a8"},
        ["quantize is 'w8a8' in config.json, wanted 'w8a8s'"],
    ),
    "wrong group size": (
        "w8a8s-mindie",
        "quantization_config",
        {"group_size": 512},
        ["quantization_config.group_size is 512, wanted 0, 64, 128 or 256"],
    ),
    "other edits": (
        "w8a8",
        "text_config",
        {"rms_norm_eps": 1e-6, "extra": 1},
        [
            "text_config.extra is 1 in config.json, 'absent' in the source",
            "text_config.rms_norm_eps is 1e-06 in config.json, 1e-05 in the source",
        ],
    ),
    "layout of transformers 5": (
        "w8a8",
        "text_config",
        {"rope_scaling": "-", "rope_parameters": V5_ROPE},
        [
            "text_config.rope_scaling is None, the engine wants one with mrope_section",
            f"text_config.rope_parameters is {V5_ROPE} in config.json, 'absent' in the source",
            "text_config.rope_scaling is 'absent' in config.json, "
            "{'mrope_section': [2, 3, 3], 'rope_type': 'default'} in the source",
        ],
    ),
}


@pytest.mark.parametrize(("label", "section", "changes", "expected"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_is_found(
    make: Make, source: Checkpoint, label: str, section: str, changes: dict[str, object], expected: list[str]
) -> None:
    directory = make(label)
    configure(directory, section, changes)
    assert found(directory, source) == [(17, "", message) for message in expected]


def test_a_config_of_another_model_and_none_are_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    configure(directory, "", {"model_type": "glm4"})
    [(check, _, message)] = found(directory, None)
    assert check == 17
    assert message.startswith(f"{directory / 'config.json'}: model_type is 'glm4'")
    (directory / "config.json").unlink()
    assert found(directory, None) == [
        (17, "", f"{directory / 'config.json'}: cannot be read (No such file or directory); check the path and its permissions")
    ]  # fmt: skip


def test_a_source_without_config_is_a_warning(make: Make, source: Checkpoint, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source.directory / "model.safetensors", bare)
    with Checkpoint.open(bare) as checkpoint:
        [finding] = check_structure(make("w8a8"), checkpoint)
    assert (finding.check, finding.severity) == (17, "warning")
    assert finding.message.startswith(f"cannot be compared with the source: {bare / 'config.json'}: cannot be read (")


def test_missing_and_changed_side_files_are_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    (directory / "tokenizer.json").write_text("other")
    (directory / "preprocessor_config.json").unlink()
    (directory / "chat_template.jinja").unlink()
    assert found(directory, source) == [
        (18, "", "chat_template.jinja is missing, the source has it"),
        (18, "", "preprocessor_config.json is missing, the source has it"),
        (18, "", "tokenizer.json differs from the source's"),
    ]
    assert found(directory, None) == [
        (18, "", "preprocessor_config.json is missing; the engine cannot build its processor without it")
    ]


def test_modes_and_names_that_the_engine_refuses_are_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make("w8a8")
    (directory / "config.json").chmod(0o666)
    (directory / "a b.txt").touch(mode=0o600)
    (directory / "tokenizer.json").chmod(0o040)
    assert found(directory, None) == [
        (19, "", "'a b.txt': the engine refuses such a name; use letters, digits, _ . - only"),
        (19, "", "config.json is writable by everyone (mode 666); the engine refuses that"),
        (19, "", "tokenizer.json is not readable by its owner (mode 40)"),
    ]
    monkeypatch.setattr(files, "_MAX_ENTRIES", 5)
    count = len(os.listdir(directory))
    assert found(directory, None)[0] == (19, "", f"the folder has {count} entries, the engine stops at 5")


def test_a_path_that_the_engine_refuses_is_a_warning(make: Make, tmp_path: Path) -> None:
    moved = make("w8a8").rename(tmp_path / "a@b")
    assert list(check_structure(moved, None)) == [
        Finding(19, "warning", "", f"{moved}: the engine refuses such a path; use letters, digits, _ . / - only")
    ]


# Which tensors --------------------------------------------------------------------------------------------------------


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
        (12, f"{LAYER}.mlp.down_proj.weight", "is described as W8A8S, all of a W8A8 model is FLOAT or W8A8"),
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
    assert found(directory, None) == [lost, foreign]


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


# Shapes, dtypes, values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "name", "shape", "message"),
    [
        ("w8a8", f"{Q}.weight", (128, 64), "has shape [128, 64], wanted [128, 128]"),
        ("w8a8", f"{Q}.bias", (128, 1), "has shape [128, 1], wanted [128]"),
        ("w8a8", f"{Q}.input_scale", (), "has shape [], wanted [1]"),
        ("w8a8", f"{Q}.input_offset", (2,), "has shape [2], wanted [1]"),
        ("w8a8", f"{Q}.quant_bias", (128, 1), "has shape [128, 1], wanted [128]"),
        ("w8a8", f"{Q}.deq_scale", (64,), "has shape [64], wanted [128]"),
        ("w8a8", f"{Q}.weight_scale", (128,), "has shape [128], wanted [128, 1]"),
        ("w8a8", f"{Q}.weight_offset", (128,), "has shape [128], wanted [128, 1]"),
        ("w4a8", f"{Q}.weight", (128, 128), "has shape [128, 128], wanted [64, 128]"),
        ("w4a8", f"{Q}.weight_scale_second", (128, 4), "has shape [128, 4], wanted [128, 2]"),
        ("w4a8", f"{Q}.weight_offset_second", (128,), "has shape [128], wanted [128, 2]"),
        ("w4a8", f"{Q}.scale_bias", (128, 16), "has shape [128, 16], wanted [128, 1]"),
        ("w4a8", f"{O}.scale_bias", (128, 1), "has shape [128, 1], wanted [128, 16]"),
        ("w4a8-mindie", f"{O}.weight", (64, 128), "has shape [64, 128], wanted [128, 128]"),
        ("w8a8", "model.language_model.norm.weight", (64,), "has shape [64], wanted [128]"),
    ],
)
def test_wrong_shapes_are_found(
    make: Make, source: Checkpoint, label: str, name: str, shape: tuple[int, ...], message: str
) -> None:
    directory = make(label)
    alter(directory, {name: torch.zeros(shape, dtype=stored(directory, name).dtype)})
    assert (8, name, message) in found(directory, source)


def test_a_weight_that_is_no_matrix_is_found(make: Make) -> None:
    directory = make("w8a8")
    alter(directory, {f"{O}.weight": torch.zeros(5, dtype=torch.int8)})
    assert found(directory, None) == [(8, f"{O}.weight", "has no rows and columns to compare with")]


@pytest.mark.parametrize(
    ("label", "name", "dtype", "message"),
    [
        ("w8a8", f"{O}.weight", torch.float16, "has dtype F16, wanted I8"),
        ("w8a8", f"{Q}.bias", torch.float32, "has dtype F32, wanted F16"),
        ("w8a8-bf16", f"{Q}.bias", torch.float16, "has dtype F16, wanted BF16"),
        ("w8a8", f"{O}.quant_bias", torch.int64, "has dtype I64, wanted I32"),
        ("w8a8", f"{O}.deq_scale", torch.float32, "has dtype F32, wanted I64"),
        ("w8a8-bf16", f"{O}.deq_scale", torch.int64, "has dtype I64, wanted F32"),
        ("w8a8", f"{O}.input_scale", torch.int8, "has dtype I8, wanted F16 or BF16 or F32 or F64"),
        ("w8a8", f"{O}.weight_scale", torch.int8, "has dtype I8, wanted F16 or BF16 or F32 or F64"),
        ("w4a8", f"{O}.scale_bias", torch.float16, "has dtype F16, wanted F32"),
        ("w8a8", "lm_head.weight", torch.bfloat16, "has dtype BF16, wanted F16"),
        ("w8a8", "lm_head.weight", torch.float32, "has dtype F32, wanted F16"),
        ("w8a8", f"{LAYER}.input_layernorm.bias", torch.float64, "has dtype F64, wanted F16 or F32"),
    ],
)
def test_wrong_dtypes_are_found(
    make: Make, source: Checkpoint, label: str, name: str, dtype: torch.dtype, message: str
) -> None:
    directory = make(label)
    alter(directory, {name: stored(directory, name).to(dtype)})
    assert found(directory, source) == [(9, name, message)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_float_dtype_of_scales_is_free(make: Make, dtype: torch.dtype) -> None:
    directory = make("w8a8-bf16")
    names = [f"{O}.{suffix}" for suffix in ("input_scale", "input_offset", "weight_scale", "weight_offset")]
    alter(directory, {name: stored(directory, name).to(dtype) for name in names})
    assert found(directory, None) == []


@pytest.mark.parametrize(
    ("label", "name", "value", "message"),
    [
        ("w8a8", f"{O}.input_scale", 0.0, "must be positive, its smallest value is 0"),
        ("w8a8", f"{O}.input_scale", float("nan"), "holds NaN or infinity"),
        ("w8a8", f"{O}.input_offset", 0.5, "is 0.5, wanted an integer in -128..127"),
        ("w8a8", f"{O}.input_offset", 128.0, "is 128, wanted an integer in -128..127"),
        ("w8a8", f"{O}.weight_scale", -1.0, "must be positive, its smallest value is -1"),
        ("w8a8", f"{O}.weight_offset", 1.0, "must be zero, it reaches 1"),
        ("w8a8-bf16", f"{O}.deq_scale", 0.0, "must be positive, its smallest value is 0"),
        ("w8a8-bf16", f"{O}.deq_scale", float("inf"), "holds NaN or infinity"),
        ("w8a8", f"{O}.deq_scale", 0x7F800000, "holds NaN or infinity"),
        (
            "w8a8",
            f"{O}.deq_scale",
            0,
            f"{O}.deq_scale: has integers outside 1..2^31-1, which are not the bits of positive float32 numbers",
        ),
        ("w4a8", f"{O}.weight_scale_second", 0.0, "must be positive, its smallest value is 0"),
        ("w4a8", f"{O}.weight_offset_second", 2, "must be zero, it reaches 2"),
        ("w4a8", f"{O}.scale_bias", float("nan"), "holds NaN or infinity"),
        ("dynamic", f"{Q}.bias", float("inf"), "holds NaN or infinity"),
        ("w8a8", "lm_head.weight", float("inf"), "holds 1 NaN or infinite values"),
    ],
)
def test_wrong_values_are_found(make: Make, label: str, name: str, value: float, message: str) -> None:
    directory = make(label)
    tensor = stored(directory, name)
    tensor.view(-1)[0] = value
    alter(directory, {name: tensor})
    assert found(directory, None) == [(10, name, message)]


def test_a_quant_bias_off_by_more_than_one_is_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8s")
    name = f"{Q}.quant_bias"
    tensor = stored(directory, name)
    tensor[3] += 1
    alter(directory, {name: tensor})
    # The stored integer is the rounded one, so one more is still within the tolerance, and two more are not.
    assert found(directory, source) == []
    tensor[3] += 1
    tensor[5] -= 7
    alter(directory, {name: tensor})
    message = "differs from bias / deq_scale - input_offset * rowsum in 2 rows, by 7 in row 5"
    assert found(directory, source) == [(11, name, message)]
    assert found(directory, None) == [(11, name, message)]


def test_a_weight_scale_that_contradicts_deq_scale_is_found(make: Make) -> None:
    directory = make("w8a8")
    name = f"{O}.weight_scale"
    alter(directory, {name: stored(directory, name) * 0.996})
    assert found(directory, None) == []
    alter(directory, {name: stored(directory, name) * 0.5})
    [(check, tensor, message)] = found(directory, None)
    assert (check, tensor) == (11, name)
    assert message == "differs from deq_scale / input_scale by up to 1e+02 %"


@pytest.mark.parametrize("linear", [Q, O])
def test_a_scale_bias_that_is_not_the_sum_of_the_weights_is_found(make: Make, linear: str) -> None:
    directory = make("w4a8")
    name = f"{linear}.scale_bias"
    tensor = stored(directory, name)
    tensor[70, -1] += 32
    alter(directory, {name: tensor})
    assert found(directory, None) == [(11, name, "differs from 8 * sum(int4 * scales) by up to 32")]


# What must agree ------------------------------------------------------------------------------------------------------


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
    assert found(directory, None) == [(15, ignored, "is not zero, but the engine ignores the bias of this norm")]


# Against the source ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", f"{Q}.bias", "model.visual.blocks.0.norm1.weight"])
def test_a_float_tensor_that_is_not_the_sources_is_found(make: Make, source: Checkpoint, name: str) -> None:
    directory = make("dynamic")
    tensor = stored(directory, name)
    tensor.view(-1)[-2:] += 1
    alter(directory, {name: tensor})
    assert found(directory, source) == [(6, name, "differs from the source, cast to its dtype, in 2 values")]
    assert found(directory, None) == []


@pytest.mark.parametrize(
    ("label", "bound"), [("w8a8", "0.25"), ("w8a8s", "0.6"), ("dynamic", "0.25"), ("w4a8-mindie", "0.6")]
)
def test_a_weight_far_from_the_float_one_is_found(make: Make, source: Checkpoint, label: str, bound: str) -> None:
    directory = make(label)
    tensor = stored(directory, f"{GATE_UP}.weight").roll(1, dims=1)  # columns in the wrong order, row sums unchanged
    alter(directory, {f"{GATE_UP}.weight": tensor})
    [(check, name, message)] = found(directory, source)
    assert (check, name) == (16, f"{GATE_UP}.weight")
    # Unrelated entries: ||W_q - W||^2 / ||W||^2 is about 2; 128 x 128 normal weights scatter by a percent or two.
    assert 1.3 < float(message.split()[1]) < 1.5
    assert message.endswith(f" of the float weight's norm away from it, wanted at most {bound}")


def test_a_norm_that_does_not_undo_the_smoothing_is_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    name = f"{LAYER}.post_attention_layernorm.weight"
    alter(directory, {name: source.read(name).half()})
    assert [(check, tensor) for check, tensor, _ in found(directory, source)] == [(16, f"{GATE_UP}.weight")]


def test_a_missing_norm_does_not_stop_the_comparison(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    name = f"{LAYER}.post_attention_layernorm.weight"
    alter(directory, {name: None})
    assert [(check, tensor) for check, tensor, _ in found(directory, source)] == [
        (6, name),
        (16, f"{GATE_UP}.weight"),
    ]
