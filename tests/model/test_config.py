import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import edit_json, streamed_logits
from PIL import Image

from glmq.checkpoint.json_file import JsonObject, read_json_object
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, ModelError
from glmq.model.config import ModelConfig, parse_config, read_config
from glmq.model.glm4v import GLM4V
from glmq.model.inputs import Preprocessor
from glmq.model.streamed import StreamedModel
from glmq.model.tiny import TINY_CHECKPOINT

NESTED = read_json_object(TINY_CHECKPOINT / "config.json")
"""The layout of the hub since 2025-10-25."""


def nested() -> JsonObject:
    """A fresh copy."""
    copy: JsonObject = json.loads(json.dumps(NESTED))
    return copy


def flat() -> JsonObject:
    """The layout before 2025-10-25: text fields at the root, no `dtype` of the text part."""
    config = nested()
    text = config.pop("text_config")
    for key in ("model_type", "dtype", "image_token_id", "video_token_id"):
        del text[key]
    return text | config


def version_5() -> JsonObject:
    """The layout that transformers 5 writes: `rope_parameters`, `dtype`."""
    config = nested()
    text = config["text_config"]
    rope = {key: text.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    text["rope_parameters"] = text.pop("rope_scaling") | rope
    config["dtype"] = config.pop("torch_dtype")
    return config


LAYOUTS = {"nested": nested, "flat": flat, "version 5": version_5}


def sizes(config: ModelConfig) -> ModelConfig:
    """The config without the layout's own dictionary."""
    return replace(config, nested={})


def test_the_tiny_models_config_is_read_number_by_number() -> None:
    assert parse_config(nested(), "config.json") == ModelConfig(
        nested=NESTED, ties_embeddings=False,
        hidden_size=192, intermediate_size=512, layers=6, heads=6, kv_heads=2, head_dim=32, vocab_size=1536,
        vision_hidden=96, vision_depth=3, vision_out=192, vision_intermediate=512,
        patch_size=14, temporal_patch_size=2, merge_size=2, image_size=112, in_channels=3,
        family=GLM4V, image_token_id=14, max_tokens=4096, eos_token_ids=(0, 7),
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_sizes(layout: str) -> None:
    found = parse_config(LAYOUTS[layout](), "config.json")
    assert sizes(found) == sizes(parse_config(nested(), "config.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_text_fields_where_the_engine_reads_them(layout: str) -> None:
    text = parse_config(LAYOUTS[layout](), "config.json").nested["text_config"]
    wanted = {key: value for key, value in NESTED["text_config"].items() if not key.endswith("token_id")}
    assert {key: text[key] for key in wanted} == wanted
    assert ("rope_parameters" in text) is (layout == "version 5")  # the newest transformers reads it


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("said", [None, False])
def test_the_text_has_the_biases_that_the_family_has_whatever_a_file_says(layout: str, said: bool | None) -> None:
    document = LAYOUTS[layout]()
    text = document.get("text_config", document)
    del text["attention_bias"]
    if said is not None:
        text["attention_bias"] = said
    assert parse_config(document, "config.json").nested["text_config"]["attention_bias"] is True


def test_the_flat_layout_leaves_no_text_field_at_the_root() -> None:
    root = parse_config(flat(), "config.json").nested
    assert set(root) == set(NESTED)


def test_what_is_wrong_in_a_flat_file_is_named_where_it_stands() -> None:
    for key, value, what in (
        ("num_hidden_layers", "2", "num_hidden_layers is '2', a positive integer is needed"),
        ("vocab_size", 10**9, "vocab_size is 1000000000, at most 2097152 is possible"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0, a number from 1e-12 to 0.01 is needed"),
    ):
        with pytest.raises(ModelError) as caught:
            parse_config(flat() | {key: value}, "config.json")
        assert str(caught.value) == f"config.json: {what}; restore the file"
    with pytest.raises(ModelError, match=r"^config.json: has no rope_scaling.mrope_section \(found None\); "):
        parse_config(flat() | {"rope_scaling": None}, "config.json")


def test_a_flat_config_without_a_dtype_is_taken_for_the_releases_bfloat16() -> None:
    config = flat()
    del config["torch_dtype"]
    assert parse_config(config, "config.json").nested["text_config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_changes_nothing_in_the_document(layout: str) -> None:
    document = LAYOUTS[layout]()
    parse_config(document, "config.json")
    assert document == LAYOUTS[layout]()


@pytest.fixture(scope="module")
def logits_by_layout(tiny: Path, pictures: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, make in LAYOUTS.items():
        config = parse_config(make(), "config.json")
        preprocessor = Preprocessor(tiny, config, max_pixels=None, trust_remote_code=False)
        inputs = preprocessor.encode(Image.open(pictures / "00.png"), "What is this?", None)
        found[name] = streamed_logits(tiny, config, inputs, torch.float32)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "nested"])
def test_every_layout_gives_the_same_logits_bit_for_bit(layout: str, logits_by_layout: dict[str, torch.Tensor]) -> None:
    assert logits_by_layout["nested"].abs().max() > 1
    assert torch.equal(logits_by_layout[layout], logits_by_layout["nested"])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("glm4v_moe", ": GLM-4.5V and GLM-4.6V are mixtures of experts"),
        ("chatglm", ": glm-4v-9b is the older ChatGLM architecture"),
        ("glm_ocr", ": GLM-OCR has another text model"),
        ("glm4", ": GLM-4 has no vision tower"),
        ("glm4v_text", ": this is the text part alone"),
        ("llama", ""),
        (None, ""),
        (["glm4v"], ""),
    ],
)
def test_another_model_is_refused_by_its_kind(kind: object, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(nested() | {"model_type": kind}, "there/config.json")
    assert str(caught.value) == (
        f"there/config.json: model_type is {kind!r}{why}, but glmq needs 'glm4v' "
        "(GLM-4.1V-9B, GLM-4.6V-Flash, AutoGLM-Phone-9B, Glyph); "
        "give the folder of a GLM-4.1V or GLM-4.6V-Flash"
    )


def without(*path: str) -> Callable[[], JsonObject]:
    """The nested layout without one key."""

    def make() -> JsonObject:
        config = nested()
        section = config
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]
        return config

    return make


def with_value(section: str, key: str, value: object) -> JsonObject:
    config = nested()
    (config[section] if section else config)[key] = value
    return config


def test_a_layout_that_is_none_of_the_three_is_refused() -> None:
    config = flat()
    del config["hidden_size"]
    with pytest.raises(ModelError) as caught:
        parse_config(config, "config.json")
    assert str(caught.value) == (
        "config.json: has neither text_config nor hidden_size, so its layout is none of the three known ones; "
        "take the config.json that belongs to the weights"
    )


def test_a_model_without_a_vision_tower_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(without("vision_config")(), "config.json")
    assert str(caught.value) == (
        "config.json: has no vision_config, so it is no GLM-4.1V or GLM-4.6V-Flash, which see pictures; restore the file"
    )


@pytest.mark.parametrize(
    ("rope", "shown"), [(None, "None"), ({"rope_type": "default"}, "{'rope_type': 'default'}"), ("x", "'x'")]
)
def test_a_config_without_sections_of_the_rotary_positions_is_refused(rope: object, shown: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("text_config", "rope_scaling", rope), "config.json")
    assert str(caught.value) == (
        f"config.json: text_config has no rope_scaling.mrope_section (found {shown}); "
        "without it the positions of image tokens are wrong: take the config.json that belongs to the weights"
    )


def test_a_rope_type_of_another_model_is_refused() -> None:
    rope = {"rope_type": "yarn", "mrope_section": [2, 3, 3]}
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("text_config", "rope_scaling", rope), "config.json")
    assert str(caught.value) == "config.json: rope_type 'yarn' is unknown, a GLM-4.1V or GLM-4.6V-Flash uses 'default'"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("text_config", "hidden_size"), ("text_config", "intermediate_size"), ("text_config", "num_hidden_layers"),
        ("text_config", "num_attention_heads"), ("text_config", "num_key_value_heads"), ("text_config", "vocab_size"),
        ("vision_config", "hidden_size"), ("vision_config", "depth"), ("vision_config", "out_hidden_size"),
        ("vision_config", "intermediate_size"), ("vision_config", "patch_size"),
        ("vision_config", "temporal_patch_size"), ("vision_config", "spatial_merge_size"),
        ("vision_config", "image_size"), ("vision_config", "in_channels"), ("", "image_token_id"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, "64", 64.0, True, None, [64]])
def test_a_size_that_is_no_positive_integer_is_refused(section: str, key: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value(section, key, value), "config.json")
    place = f"{section}.{key}" if section else key
    assert str(caught.value) == f"config.json: {place} is {value!r}, a positive integer is needed; restore the file"


@pytest.mark.parametrize(
    ("section", "key", "largest"),
    [
        ("text_config", "num_hidden_layers", 512), ("vision_config", "depth", 512), ("text_config", "hidden_size", 2**15),
        ("text_config", "vocab_size", 2**21), ("vision_config", "image_size", 2**13), ("", "image_token_id", 1535),
    ],
)  # fmt: skip
def test_a_size_that_no_model_of_the_family_has_is_refused_at_once(section: str, key: str, largest: int) -> None:
    for value in (10**8, 10**39):
        with pytest.raises(ModelError) as caught:
            parse_config(with_value(section, key, value), "config.json")
        place = f"{section}.{key}" if section else key
        assert str(caught.value) == (
            f"config.json: {place} is {value}, at most {largest} is possible; restore the file"
        )


@pytest.mark.parametrize(
    ("section", "key", "value", "wanted"),
    [
        ("text_config", "rms_norm_eps", "x", "is 'x', a number from 1e-12 to 0.01 is needed"),
        ("vision_config", "rms_norm_eps", [1e-5], "is [1e-05], a number from 1e-12 to 0.01 is needed"),
        ("text_config", "rms_norm_eps", 0, "is 0, a number from 1e-12 to 0.01 is needed"),
        ("text_config", "rms_norm_eps", True, "is True, a number from 1e-12 to 0.01 is needed"),
        ("text_config", "rope_theta", -1.0, "is -1.0, a number from 1 to 1e+12 is needed"),
        ("text_config", "rope_theta", float("nan"), "is nan, a number from 1 to 1e+12 is needed"),
        ("text_config", "partial_rotary_factor", 2, "is 2, a number from 0.01 to 1 is needed"),
        ("vision_config", "attention_dropout", {}, "is {}, a number from 0 to 1 is needed"),
        ("text_config", "hidden_act", 5, "is 5, a text is needed"),
        ("text_config", "hidden_act", [["a" * 99]], f"is [['{'a' * 57}, a text is needed"),
        ("text_config", "dtype", {"a": 1}, "is {'a': 1}, a text is needed"),
        ("", "torch_dtype", 16, "is 16, a text is needed"),
        ("", "tie_word_embeddings", "no", "is 'no', true or false is needed"),
        ("text_config", "attention_bias", 0, "is 0, true or false is needed"),
        ("vision_config", "attention_bias", 0, "is 0, true or false is needed"),
        ("vision_config", "num_heads", 0, "is 0, a positive integer is needed"),
        ("vision_config", "num_heads", "4", "is '4', a positive integer is needed"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_or_range_is_refused(section: str, key: str, value: object, wanted: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value(section, key, value), "config.json")
    place = f"{section}.{key}" if section else key
    assert str(caught.value) == f"config.json: {place} {wanted}; restore the file"


def test_fields_that_may_be_left_out_may_be_null() -> None:
    for key in ("rms_norm_eps", "rope_theta", "hidden_act", "use_cache", "eos_token_id"):
        parse_config(with_value("text_config", key, None), "config.json")


@pytest.mark.parametrize(
    "sections", [[], [8], [2, 3, 3, 0], [2, 3, 4], [8, 0, 0], [-1, 3, 6], ["2", "3", "3"], [[2], 3, 3]]
)
def test_rotary_sections_of_the_wrong_shape_are_refused(sections: object) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("text_config", "rope_scaling", {"mrope_section": sections}), "config.json")
    assert str(caught.value) == (
        f"config.json: rope_scaling.mrope_section is {sections!r}, three positive integers with the sum 8 are needed; "
        "take the config.json that belongs to the weights"
    )


@pytest.mark.parametrize("value", ["7", [0, None], [True], -1, 1.0, {"a": 1}])
def test_an_end_token_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("text_config", "eos_token_id", value), "config.json")
    assert str(caught.value) == (
        f"config.json: eos_token_id is {value!r}, a token's number or a list of them is needed; restore the file"
    )


def test_a_vision_tower_whose_heads_do_not_divide_its_width_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("vision_config", "num_heads", 7), "config.json")
    assert str(caught.value) == ("config.json: a vision tower of width 96 does not divide by 7 heads; restore the file")


def test_a_vision_tower_of_another_output_width_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("vision_config", "out_hidden_size", 96), "config.json")
    assert str(caught.value) == (
        "config.json: vision_config.out_hidden_size is 96, text_config.hidden_size 192, but they are the same width; "
        "restore the file"
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "num_labels", 10**12), ("text_config", "num_labels", 10**12), ("vision_config", "id2label", {"0": 1}),
        ("text_config", "label2id", [1]),
    ],
)  # fmt: skip
def test_classes_of_a_classifier_are_not_built(section: str, key: str, value: object, small: Path) -> None:
    config = read_config(small)
    nested = json.loads(json.dumps(config.nested))
    (nested[section] if section else nested)[key] = value
    with Checkpoint.open(small) as source:
        StreamedModel(source, replace(config, nested=nested), device=torch.device("cpu"), dtype=torch.float32)


def test_whatever_transformers_trips_over_is_one_sentence(small: Path) -> None:
    config = read_config(small)
    nested = json.loads(json.dumps(config.nested))
    nested["text_config"]["pad_token_id"] = 10**9
    with Checkpoint.open(small) as source, pytest.raises(ModelError) as caught:
        StreamedModel(source, replace(config, nested=nested), device=torch.device("cpu"), dtype=torch.float32)
    assert str(caught.value) == (
        "config.json: transformers cannot build a GLM-4.1V or GLM-4.6V-Flash from it "
        "(AssertionError: Padding_idx must be within num_embeddings)"
    )


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(with_value("text_config", "num_key_value_heads", 4), "config.json")
    assert str(caught.value) == "config.json: 6 attention heads do not divide by 4 key-value heads"


def test_a_head_size_that_is_given_wins_over_the_quotient() -> None:
    config = with_value("text_config", "head_dim", 64)
    config["text_config"]["rope_scaling"] = {"mrope_section": [4, 6, 6]}
    assert parse_config(config, "config.json").head_dim == 64


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path / "none")
    assert str(caught.value) == (
        f"{tmp_path / 'none'}: no such folder; give the folder of the float weights as --model-path"
    )


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "part0-of-2").mkdir()
    (tmp_path / "part0-of-2" / "config.json").touch()
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has no config.json, so it is not a model folder; give the folder that holds it"
    )
    (tmp_path / "config.json").symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError) as refused:
        read_config(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'config.json'}: is a link to ../../blobs/abc, which is not there; mount or copy what it leads to as well "
        "(cp -rL copies the files themselves)"
    )
    (tmp_path / "config.json").unlink()
    (tmp_path / "GLM-4.6V-Flash").mkdir()
    (tmp_path / "GLM-4.6V-Flash" / "config.json").touch()
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has no config.json, so it is not a model folder; its sub-folder GLM-4.6V-Flash may be meant; give "
        f"{tmp_path / 'GLM-4.6V-Flash'}"
    )


def test_a_config_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: is not JSON (Expecting value: line 1 column 16 (char 15)); "
        "download or write it again"
    )


def test_a_config_that_transformers_cannot_build_is_refused_with_its_reason(small_copy: Path) -> None:
    edit_json(small_copy / "config.json", lambda c: c["text_config"].update(pad_token_id=10**9))
    config = read_config(small_copy)
    with Checkpoint.open(small_copy) as source, pytest.raises(ModelError) as caught:
        StreamedModel(source, config, device=torch.device("cpu"), dtype=torch.float32)
    assert str(caught.value) == (
        "config.json: transformers cannot build a GLM-4.1V or GLM-4.6V-Flash from it (AssertionError: Padding_idx must be "
        "within num_embeddings)"
    )


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_function_that_engines_do_not_compute_is_refused(section: str, small_copy: Path) -> None:
    edit_json(small_copy / "config.json", lambda c: c[section].update(hidden_act="gelu"))
    with pytest.raises(ModelError) as caught:
        read_config(small_copy)
    assert str(caught.value) == (
        f"{small_copy}/config.json: {section}.hidden_act is 'gelu', but engines compute silu; restore the file"
    )


def test_without_a_share_of_rotation_the_whole_head_is_rotated(small_copy: Path) -> None:
    edit_json(small_copy / "config.json", lambda c: c["text_config"].pop("partial_rotary_factor"))
    with pytest.raises(ModelError) as caught:
        read_config(small_copy)
    assert str(caught.value).startswith(
        f"{small_copy}/config.json: rope_scaling.mrope_section is [1, 1, 2], three positive integers with the sum 8 are needed;"
    )


def test_what_engines_look_up_first_is_as_the_tensors_are(small_copy: Path) -> None:
    wanted = read_config(small_copy).nested

    def edit(config: dict) -> None:
        config["architectures"] = ["Glm4vForSequenceClassification"]
        config["text_config"]["attention_bias"] = False

    edit_json(small_copy / "config.json", edit)
    assert read_config(small_copy).nested == wanted
    assert wanted["architectures"] == ["Glm4vForConditionalGeneration"]
    assert wanted["text_config"]["attention_bias"] is True


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "auto", "float8_e4m3fn", None])
def test_a_dtype_that_none_is_does_not_keep_the_model_from_being_built(dtype: str | None, small_copy: Path) -> None:
    edit_json(small_copy / "config.json", lambda c: (c.update(torch_dtype=dtype), c["text_config"].update(dtype=dtype)))
    with Checkpoint.open(small_copy) as source:
        StreamedModel(source, read_config(small_copy), device=torch.device("cpu"), dtype=torch.bfloat16)
