"""Description, weight files and their index, config.json, side files, modes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from handmade import K, Make, Q, alter, configure, describe, found
from safetensors.torch import load_file, save_file

from glmq.checkpoint.reader import Checkpoint
from glmq.verification import files
from glmq.verification.findings import Check, Finding
from glmq.verification.structure import check_structure


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
    assert found(directory, None) == [(2, "", f"{path}: 'model_quant_type' is 3, wanted a text; write the file again")]


NO_GROUPS = "is 64, wanted only in an ascendV1 description with W4A8_DYNAMIC linears"
FOREIGN = "the description has this key, which switches another feature on, even if null"


@pytest.mark.parametrize(
    ("label", "changes", "expected"),
    [
        ("w8a8", {"fa_quant_type": None}, (2, "fa_quant_type", FOREIGN)),
        ("w8a8", {"version": "2.0.0"}, (2, "version", "is '2.0.0', ascendV1 wants '1.0.0'")),
        ("w8a8", {"version": "-"}, (2, "version", "is None, ascendV1 wants '1.0.0'")),
        ("w8a8s-mindie", {"version": "1.0.0"}, (2, "version", "is '1.0.0', the MindIE form wants None")),
        ("w8a8", {"group_size": None}, (2, "group_size", "is null in the description; the key must be absent instead")),
        ("w8a8", {"group_size": 64}, (3, "group_size", NO_GROUPS)),
        ("w4a8-mindie", {"group_size": 64}, (3, "group_size", NO_GROUPS)),
        ("w4a8", {"group_size": "-"}, (3, "group_size", "is missing or 0, wanted one of 64, 128, 256")),
    ],
)  # fmt: skip
def test_wrong_keys_of_the_description_are_found(
    make: Make, label: str, changes: dict[str, object], expected: tuple[int, str, str]
) -> None:
    directory = make(label)
    describe(directory, changes)
    assert found(directory, None) == [expected]


@pytest.mark.parametrize("size", [32, 512])
def test_a_group_size_that_only_other_engines_take_is_a_warning(make: Make, size: int) -> None:
    directory = make("w4a8")
    describe(directory, {"group_size": size})
    first, *rest = check_structure(directory, None)
    assert first == Finding(Check.GROUP_SIZE, "warning", "group_size", f"is {size}, which the MindIE engine refuses")
    assert {finding.check for finding in rest} == {Check.SHAPES}


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
    wanted = "is W8A8SC, wanted one of W8A8, W8A8S, W8A8_DYNAMIC, W4A8_DYNAMIC, W8A16"
    assert findings[0] == (2, "model_quant_type", wanted)
    belongs = (
        "quant_model_weight_w8a8.safetensors does not belong to a W8A8SC checkpoint; engines take every weight file"
    )
    assert findings[1:3] == [(4, "", belongs), (4, "", "quant_model_weight_w8a8sc.safetensors is missing")]
    assert [check for check, _, _ in findings[3:]] == [12]  # the types of linears, read from the file that is there


def test_the_names_and_notes_of_the_vendors_one_command_flow_are_taken(make: Make) -> None:
    directory = make("w8a8")
    describe(directory, {"metadata": {}, "optional": {"x": 1}, "group_size": 0})
    assert found(directory, None) == []
    (weights,) = directory.glob("*.safetensors")
    weights.rename(directory / "quant_model_weights.safetensors")
    assert found(directory, None) == []
    directory = make("w4a8")
    describe(directory, {"group_size": 0})
    assert found(directory, None)[0] == (3, "group_size", "is missing or 0, wanted one of 64, 128, 256")


def test_weights_of_another_name_are_looked_into_all_the_same(make: Make) -> None:
    directory = make("w8a8")
    (weights,) = directory.glob("*.safetensors")
    weights.rename(directory / "model.safetensors")
    names = [
        (4, "", "model.safetensors does not belong to a W8A8 checkpoint; engines take every weight file"),
        (4, "", "quant_model_weight_w8a8.safetensors is missing"),
    ]
    assert found(directory, None) == names
    alter(directory, {f"{Q}.deq_scale": None})
    assert found(directory, None) == [*names, (7, f"{Q}.deq_scale", "is missing, a W8A8 linear has it")]


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
            "vision_config.dtype bfloat16; write the dtype of the float tensors in all places"
        ],
    ),
    "another dtype for the text layers": (
        "w8a8s",
        "text_config",
        {"dtype": "bfloat16"},
        [
            "the dtypes in config.json differ: torch_dtype float16, text_config.dtype bfloat16; write the dtype of the float "
            "tensors in all places"
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


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("text_config", {"attention_bias": "-"}, "is None: "),
        ("text_config", {"attention_bias": False}, "is False: "),
        ("", {"attention_bias": True}, "is None, and true at the root, where nothing reads it: "),
    ],
)
def test_a_config_with_which_vllm_drops_biases_is_a_warning(
    make: Make, section: str, changes: dict[str, object], said: str
) -> None:
    folded, dynamic = make("w8a8"), make("w4a8")
    configure(dynamic, "text_config", {"attention_bias": True})
    assert not list(check_structure(dynamic, None))
    for directory in (folded, dynamic):
        configure(directory, "text_config", {"attention_bias": "-"})
        configure(directory, section, changes)
    assert not list(check_structure(folded, None))  # quant_bias has them
    [finding] = check_structure(dynamic, None)
    assert (finding.check.number, finding.severity) == (17, "warning")
    assert finding.message == (
        f"text_config.attention_bias {said}vLLM leaves out {K}.bias and 2 more without a word; set it to true"
    )


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
    assert (finding.check.number, finding.severity) == (17, "warning")
    assert finding.message.startswith(f"cannot be compared with the source: {bare / 'config.json'}: cannot be read (")


def test_missing_and_changed_side_files_are_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    (directory / "tokenizer.json").write_text("{}")
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
    (directory / "lost+found").mkdir(0o700)  # of the file system, where the folder is a whole disk
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
        Finding(
            Check.FILE_MODES,
            "warning",
            "",
            f"{moved}: the engine refuses such a path; use letters, digits, _ . / - only",
        )
    ]
