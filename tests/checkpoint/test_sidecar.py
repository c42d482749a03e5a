import json
from pathlib import Path

import pytest

from glmq.checkpoint import sidecar
from glmq.checkpoint.disk import LFS_POINTER
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.sidecar import MindieSettings, copy_side_files, edit_config, list_side_files
from glmq.errors import CheckpointError
from glmq.model.config import parse_config
from glmq.spec import FloatDtype, QuantType

TINY = Path(__file__).parents[2] / "glmq" / "model" / "tiny_glm4v"
SETTINGS = MindieSettings(group_size=0, act_method=2, anti_method="m2", is_lowbit=True, open_outlier=True)


def tiny_config() -> JsonObject:
    config = json.loads((TINY / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def flat_config() -> JsonObject:
    """The layout before 2025-10-25: the text fields at the root, no text_config."""
    config = tiny_config()
    text = config.pop("text_config")
    return {key: value for key, value in text.items() if key not in ("dtype", "model_type")} | config


def v5_config() -> JsonObject:
    """The layout of transformers 5: rope_parameters, and `dtype` at the root."""
    config = tiny_config()
    text = config["text_config"]
    rope = text.pop("rope_scaling")
    rope |= {key: text.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    config["dtype"] = config.pop("torch_dtype")
    return config | {"text_config": text | {"rope_parameters": rope}}


@pytest.mark.parametrize("make", [flat_config, tiny_config, v5_config])
def test_every_layout_gets_its_dtypes_and_nothing_else_changes(make: object) -> None:
    nested = parse_config(make(), "config.json").nested
    edited = edit_config(nested, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8S, settings=None)
    assert edited["torch_dtype"] == "float16"
    assert edited["text_config"]["dtype"] == "float16"
    assert "bfloat16" not in json.dumps(edited)
    edited["text_config"]["dtype"] = "bfloat16"
    for key in ("torch_dtype", "dtype"):
        if key in nested:
            edited[key] = "bfloat16"
        else:
            edited.pop(key, None)
    assert edited == nested


def test_a_nested_config_keeps_its_order_and_its_source_is_untouched() -> None:
    source = tiny_config()
    edited = edit_config(source, dtype=FloatDtype.BF16, quant_type=QuantType.W8A8, settings=None)
    assert json.dumps(edited) == json.dumps(source)
    edit_config(source, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8, settings=None)
    assert source == tiny_config()


def test_every_dtype_key_that_exists_is_set() -> None:
    source = {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16"},
        "vision_config": {"dtype": "float32", "torch_dtype": "bfloat16", "depth": 2},
    }
    assert edit_config(source, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8, settings=None) == {
        "dtype": "float16",
        "torch_dtype": "float16",
        "text_config": {"torch_dtype": "float16", "dtype": "float16"},
        "vision_config": {"dtype": "float16", "torch_dtype": "float16", "depth": 2},
    }


def test_stale_quantization_keys_are_removed_in_ascend_v1_and_set_in_the_mindie_form() -> None:
    source = tiny_config() | {"quantize": "w8a8sc", "quantization_config": {"bits": 8}}
    edited = edit_config(source, dtype=FloatDtype.BF16, quant_type=QuantType.W8A8S, settings=None)
    assert edited == tiny_config()
    edited = edit_config(source, dtype=FloatDtype.BF16, quant_type=QuantType.W8A8S, settings=SETTINGS)
    assert edited == tiny_config() | {
        "quantize": "w8a8s",
        "quantization_config": {
            "group_size": 0, "act_method": 2, "anti_method": "m2", "is_lowbit": True, "mm_tensor": False,
            "w_sym": True, "open_outlier": True, "is_dynamic": False, "w_bit": 4, "a_bit": 8, "dev_type": "npu",
        },
    }  # fmt: skip


def test_a_flat_config_must_be_brought_into_the_nested_layout_first() -> None:
    with pytest.raises(CheckpointError) as caught:
        edit_config(flat_config(), dtype=FloatDtype.FP16, quant_type=QuantType.W8A8S, settings=None)
    assert str(caught.value) == (
        "config.json: has no text_config, where the engine looks for the dtype; give the nested layout"
    )


KEPT = [
    "LICENSE", "LICENSE.txt", "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "processing_glm4v.py", "tokenizer.json", "tokenizer.model", "video_preprocessor_config.json",
]  # fmt: skip
LEFT = [
    ".hidden.json", "LICENSE_x", "README.md", "adapter_config.json", "trainer_state.json", "zero_to_fp32.py",
    "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "quant_model_description.json",
    "quant_model_description_w8a8.json", "quant_model_weight_w8a8.safetensors.index.json",
]  # fmt: skip


def test_small_files_are_copied_and_weights_index_description_and_config_are_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in KEPT + LEFT:
        (source / name).write_text(f'"{name}"')
    (source / "folder.json").mkdir()
    assert copy_side_files(source, out) == KEPT
    assert sorted(path.name for path in out.iterdir()) == KEPT
    assert all((out / name).read_text() == f'"{name}"' for name in KEPT)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_links_of_a_hub_cache_become_files(tmp_path: Path) -> None:
    source = tmp_path / "models--zai-org--GLM-4.1V" / "snapshots" / "a1b2"
    source.mkdir(parents=True)
    blobs = source.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "c3d4").write_text("{}")
    (source / "tokenizer.json").symlink_to("../../blobs/c3d4")
    (source / "vocab.json").symlink_to("tokenizer.json")
    assert copy_side_files(source, tmp_path / "out") == ["tokenizer.json", "vocab.json"]
    for copied in (tmp_path / "out").iterdir():
        assert not copied.is_symlink()
        assert copied.read_text() == "{}"


@pytest.mark.parametrize("layout", ["plain", "snapshots"])
def test_a_link_out_of_the_folder_is_refused(layout: str, tmp_path: Path) -> None:
    source = tmp_path / layout / "source"
    source.mkdir(parents=True)
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    (source / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError) as caught:
        copy_side_files(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{source / 'LICENSE'}: is a link to {secret}, outside of its folder, so its contents are not copied into the output; "
        "put a copy of the file in its place"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_huge_file_is_no_side_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merges.txt").write_text("12345678")
    (tmp_path / "vocab.txt").write_text("123456789")
    monkeypatch.setattr(sidecar, "_MAX_SIDE_FILE_BYTES", 8)
    assert list_side_files(tmp_path) == ["merges.txt"]


def test_a_side_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.json").write_text("{}")

    def denied(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("glmq.checkpoint.disk.os.open", denied)
    with pytest.raises(CheckpointError) as caught:
        list_side_files(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'vocab.json'}: cannot be read (Permission denied); check the path and its permissions"
    )


def test_a_side_file_that_an_engine_could_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for content, why in ((b"", "Expecting value"), (b"[" * 99999, "maximum recursion depth")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            list_side_files(tmp_path)
        assert str(caught.value).startswith(f"{path}: is not JSON ({why}")
        assert str(caught.value).endswith("); download it again, or remove it if nothing needs it")
    path.rename(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError) as caught:
        list_side_files(tmp_path)
    assert str(caught.value).endswith("); download it again")
    (tmp_path / "tokenizer.json").unlink()
    path.symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError) as caught:
        list_side_files(tmp_path)
    assert str(caught.value) == (
        f"{path}: is a link to ../../blobs/abc, which is not there; mount or copy what it leads to as well "
        "(cp -rL copies the files themselves)"
    )


def test_a_side_file_that_git_left_a_pointer_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError) as caught:
        list_side_files(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'vocab.json'}: {LFS_POINTER}"


def test_the_embedded_model_has_what_an_engine_needs() -> None:
    assert list_side_files(TINY) == [
        "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
    ]  # fmt: skip
