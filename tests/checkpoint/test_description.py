import json
from pathlib import Path

import pytest

from glmq.checkpoint.description import (
    Description,
    description_name,
    find_descriptions,
    read_description,
    tensor_types,
    write_description,
)
from glmq.errors import CheckpointError
from glmq.spec import Form, QuantType

TYPES = {"l.q_proj.weight": "W8A8S", "l.q_proj.bias": "FLOAT", "l.norm.weight": "FLOAT"}


@pytest.mark.parametrize(
    ("description", "file", "head"),
    [
        (
            Description("W8A8S", "1.0.0", None, TYPES),
            "quant_model_description.json",
            {"version": "1.0.0", "model_quant_type": "W8A8S"},
        ),
        (
            Description("W4A8_DYNAMIC", "1.0.0", 64, TYPES),
            "quant_model_description.json",
            {"version": "1.0.0", "model_quant_type": "W4A8_DYNAMIC", "group_size": 64},
        ),
        (
            Description("W8A8_DYNAMIC", None, None, TYPES),
            "quant_model_description_w8a8_dynamic.json",
            {"model_quant_type": "W8A8_DYNAMIC"},
        ),
    ],
)
def test_a_description_is_written_in_its_form_and_read_back(
    tmp_path: Path, description: Description, file: str, head: dict[str, object]
) -> None:
    path = write_description(tmp_path, description)
    assert path == tmp_path / file
    assert path.read_text() == json.dumps(head | TYPES, indent=2) + "\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert find_descriptions(tmp_path) == [path]
    assert read_description(tmp_path) == description


def test_a_folder_without_a_description_has_none(tmp_path: Path) -> None:
    assert read_description(tmp_path) is None


def test_names_of_both_forms() -> None:
    assert description_name("W8A8S", Form.ASCEND_V1) == "quant_model_description.json"
    assert description_name("W8A8S", Form.MINDIE) == "quant_model_description_w8a8s.json"


def test_two_descriptions_are_refused(tmp_path: Path) -> None:
    write_description(tmp_path, Description("W8A8", "1.0.0", None, {}))
    write_description(tmp_path, Description("W8A8", None, None, {}))
    with pytest.raises(CheckpointError) as caught:
        read_description(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has 2 descriptions (quant_model_description.json, quant_model_description_w8a8.json); "
        "remove those of other checkpoints"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_quant_type": None}, "'model_quant_type' is None, wanted a text"),
        ({"version": "0.1.0"}, "version is '0.1.0', wanted one like '1.0.0'"),
        ({"version": "1.0"}, "version is '1.0', wanted one like '1.0.0'"),
        ({"version": 1}, "'version' is 1, wanted a text"),
        ({"group_size": "64"}, "'group_size' is '64', wanted a count"),
        ({"group_size": True}, "'group_size' is True, wanted a count"),
        ({"group_size": -1}, "'group_size' is -1, wanted a count"),
        ({"a.weight": None}, "'a.weight' is None, wanted a text"),
    ],
)
def test_a_malformed_description_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "quant_model_description.json"
    path.write_text(json.dumps({"version": "1.0.0", "model_quant_type": "W8A8"} | change))
    with pytest.raises(CheckpointError) as caught:
        read_description(tmp_path)
    assert str(caught.value) == f"{path}: {message}; write the file again"


def test_keys_of_other_features_are_not_taken_for_tensors(tmp_path: Path) -> None:
    document = {"model_quant_type": "W8A8", "fa_quant_type": None, "kv_quant_type": "C8", "a.weight": "FLOAT"}
    (tmp_path / "quant_model_description_w8a8.json").write_text(json.dumps(document))
    assert read_description(tmp_path) == Description("W8A8", None, None, {"a.weight": "FLOAT"})


def test_every_tensor_of_a_quantized_linear_has_its_type_but_the_float_bias() -> None:
    names = ["l.q.weight", "l.q.bias", "l.q.deq_scale", "l.norm.weight", "l.norm.bias", "l.norm.module.weight", "x"]
    linears = {"l.q": QuantType.W8A8S}
    expected = dict.fromkeys(names, "FLOAT") | {"l.q.weight": "W8A8S", "l.q.deq_scale": "W8A8S"}
    assert tensor_types(names, linears, model_quant_type=QuantType.W8A8S, form=Form.ASCEND_V1) == expected
    expected["l.norm.module.weight"] = "W8A8S"
    assert tensor_types(names, linears, model_quant_type=QuantType.W8A8S, form=Form.MINDIE) == expected
