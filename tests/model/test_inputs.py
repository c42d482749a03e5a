import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import edit_json
from PIL import Image

from glmq.errors import InputError, ModelError, SampleError
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT

PROMPT = "Please describe this picture in detail."
IMAGE_TOKEN = 14
HEAD = [2, 4, 7]
"""[gMASK], <sop>, <|user|> in the tiny model's vocabulary."""


def preprocessor(folder: Path = TINY_CHECKPOINT, *, max_pixels: int | None = None) -> Preprocessor:
    return Preprocessor(folder, read_config(TINY_CHECKPOINT), max_pixels=max_pixels, trust_remote_code=False)


def picture(width: int, height: int) -> Image.Image:
    """A smooth coloured picture."""
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.fixture
def side_files(tmp_path: Path) -> Path:
    """The tiny model's tokenizer and processor files, to be damaged."""
    for path in TINY_CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    # Sides are rounded to multiples of 28 and patches are 14 wide; below 12544 / 2 pixels the image is enlarged.
    [(112, 112, (1, 8, 8)), (224, 84, (1, 6, 16)), (640, 480, (1, 34, 46)), (28, 28, (1, 6, 6)), (100, 41, (1, 4, 10))],
)
def test_one_placeholder_stands_for_each_merged_patch(width: int, height: int, grid: tuple[int, ...]) -> None:
    inputs = preprocessor().encode(picture(width, height), PROMPT, None)
    assert tuple(inputs.grid[0].tolist()) == grid
    patches = grid[1] * grid[2]
    assert int((inputs.ids == IMAGE_TOKEN).sum()) == patches // 4
    assert tuple(inputs.pixel_values.shape) == (patches, 3 * 2 * 14 * 14)
    assert inputs.pixel_values.dtype is torch.float32


@pytest.mark.slow
def test_an_image_beyond_the_models_limit_is_shrunk_to_6032_tokens() -> None:
    config = replace(read_config(TINY_CHECKPOINT), max_tokens=65536)
    large = Preprocessor(TINY_CHECKPOINT, config, max_pixels=None, trust_remote_code=False)
    inputs = large.encode(Image.new("RGB", (3840, 2160)), PROMPT, None)
    assert inputs.grid.tolist() == [[1, 116, 208]]
    assert int((inputs.ids == IMAGE_TOKEN).sum()) == 6032


def test_the_prompts_ids_are_the_templates_with_the_placeholder_repeated() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    template = f"[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>{PROMPT}<|assistant|>\n"
    wanted = tokenizer(template, add_special_tokens=False).input_ids
    at = wanted.index(IMAGE_TOKEN)
    inputs = preprocessor().encode(picture(112, 112), PROMPT, None)
    assert inputs.ids.tolist() == [wanted[:at] + [IMAGE_TOKEN] * 16 + wanted[at + 1 :]]
    assert inputs.ids[0, :3].tolist() == HEAD
    assert inputs.answer_start == inputs.tokens == len(wanted) + 15


def test_an_answer_follows_the_prompt() -> None:
    from transformers import AutoTokenizer

    answer = "A grey picture."
    alone = preprocessor().encode(picture(112, 112), PROMPT, None)
    inputs = preprocessor().encode(picture(112, 112), PROMPT, answer)
    tail = AutoTokenizer.from_pretrained(TINY_CHECKPOINT)(answer, add_special_tokens=False).input_ids
    assert inputs.ids.tolist() == [alone.ids[0].tolist() + tail]
    assert inputs.answer_start == alone.tokens


def test_a_prompt_alone_goes_through_the_template_without_an_image() -> None:
    inputs = preprocessor().encode(None, PROMPT, None)
    assert inputs.ids[0, :3].tolist() == HEAD
    assert not (inputs.ids == IMAGE_TOKEN).any()
    assert inputs.pixel_values is None
    assert inputs.grid is None


def test_an_answer_alone_is_plain_text() -> None:
    inputs = preprocessor().encode(None, None, "feature")
    assert inputs.answer_start == 0
    assert preprocessor().decode(inputs.ids[0].tolist()) == "feature"


def test_decoding_leaves_special_tokens_and_outer_space_out() -> None:
    inputs = preprocessor().encode(picture(112, 112), "Why?", " Because. ")
    assert preprocessor().decode(inputs.ids[0, inputs.answer_start - 2 :].tolist()) == "Because."


@pytest.mark.parametrize("prompt", [None, ""])
def test_a_sample_with_nothing_in_it_is_refused(prompt: str | None) -> None:
    with pytest.raises(SampleError) as caught:
        preprocessor().encode(None, None, prompt)
    assert str(caught.value) == "a sample has neither image nor prompt nor text; give at least one"


@pytest.mark.parametrize(
    ("sample", "found", "wanted"),
    [
        ((picture(112, 112), "What is <|image|>?", None), 32, 16),
        ((picture(112, 112), PROMPT, "An <|image|>."), 17, 16),
        ((None, "What is <|image|>?", None), 1, 0),
        ((None, None, "<|image|><|image|>"), 2, 0),
    ],
)
def test_a_text_with_the_image_placeholder_is_refused(
    sample: tuple[Image.Image | None, str | None, str | None], found: int, wanted: int
) -> None:
    with pytest.raises(SampleError) as caught:
        preprocessor().encode(*sample)
    assert str(caught.value) == (
        f"has {found} image placeholder{'s' * (found > 1)} where {wanted} are needed: <|image|> must not be part of a prompt "
        "or answer"
    )


def test_a_limit_of_pixels_shrinks_larger_images_and_keeps_their_shape() -> None:
    limited = preprocessor(max_pixels=112 * 112)
    assert limited.encode(picture(448, 448), PROMPT, None).grid.tolist() == [[1, 8, 8]]
    assert limited.encode(picture(448, 112), PROMPT, None).grid.tolist() == [[1, 4, 16]]


def test_a_limit_of_pixels_leaves_smaller_images_alone() -> None:
    image = picture(112, 112)
    free = preprocessor().encode(image, PROMPT, None)
    bounded = preprocessor(max_pixels=112 * 112).encode(image, PROMPT, None)
    assert torch.equal(free.pixel_values, bounded.pixel_values)


def test_the_files_own_limit_counts_the_pixels_of_two_frames(side_files: Path) -> None:
    edit_json(side_files / "preprocessor_config.json", lambda c: c["size"].update(longest_edge=2 * 112 * 112))
    assert preprocessor(side_files).encode(picture(448, 448), PROMPT, None).grid.tolist() == [[1, 8, 8]]


def test_a_limit_above_the_files_own_does_not_lift_it(side_files: Path) -> None:
    edit_json(side_files / "preprocessor_config.json", lambda c: c["size"].update(longest_edge=2 * 112 * 112))
    found = preprocessor(side_files, max_pixels=10**6).encode(picture(448, 448), PROMPT, None)
    assert found.grid.tolist() == [[1, 8, 8]]


def test_mean_and_deviation_are_read_from_the_file(side_files: Path) -> None:
    edit_json(side_files / "preprocessor_config.json", lambda c: c.update(image_mean=[0.0] * 3, image_std=[1.0] * 3))
    white = Image.new("RGB", (112, 112), "white")
    assert torch.equal(preprocessor(side_files).encode(white, PROMPT, None).pixel_values, torch.ones(64, 1176))


def test_a_picture_with_transparency_or_a_palette_is_taken_as_rgb() -> None:
    image = picture(112, 112)
    wanted = preprocessor().encode(image, PROMPT, None).pixel_values
    for mode in ("RGBA", "L"):
        assert torch.equal(preprocessor().encode(image.convert(mode), PROMPT, None).pixel_values, wanted)


@pytest.mark.parametrize(("width", "height"), [(27, 500), (500, 27), (28 * 201, 28), (28, 28 * 201)])
def test_an_image_that_the_model_cannot_take_is_refused_with_its_size(width: int, height: int) -> None:
    with pytest.raises(SampleError) as caught:
        preprocessor().encode(picture(width, height), PROMPT, None)
    assert str(caught.value) == (
        f"its image has {width} x {height} pixels; the model needs sides of at least 28 pixels "
        "and an aspect ratio of at most 200"
    )


def test_the_narrowest_and_the_smallest_image_are_taken() -> None:
    assert preprocessor().encode(picture(28 * 200, 28), PROMPT, None).grid.tolist() == [[1, 2, 400]]


def test_a_missing_tokenizer_is_named(side_files: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (side_files / name).unlink()
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}: has no tokenizer.json, which is the tokenizer; copy it from the model's release"
    )


def test_a_folder_whose_name_is_no_utf_8_is_refused_as_such_and_read_through_a_link(side_files: Path) -> None:
    named = Path(os.fsdecode(os.fsencode(side_files.parent) + b"/" + "模型问题".encode("gbk")))
    side_files.rename(named)
    with pytest.raises(ModelError) as caught:
        preprocessor(named)
    assert str(caught.value).endswith(
        ": has a name that is no UTF-8 here, which the tokenizer's library cannot open; rename the folder, or give a link to it"
    )
    side_files.symlink_to(named)
    assert preprocessor(side_files).encode(None, PROMPT, None).tokens > 0


def test_a_missing_chat_template_is_named(side_files: Path) -> None:
    (side_files / "chat_template.jinja").unlink()
    edit_json(side_files / "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}: has no chat template (a base model comes without); choose one with --chat-template FILE, "
        "e.g. the chat_template.jinja of GLM-4.1V-9B-Thinking"
    )


@pytest.mark.parametrize("text", ["", "\n", "{{ messages[0].role }}", "<|image|><|image|>"])
def test_a_template_that_does_not_place_one_picture_is_refused(text: str, side_files: Path, tmp_path: Path) -> None:
    (side_files / "chat_template.jinja").write_text(text)
    (tmp_path / "own.jinja").write_text(text)
    for given, named in ((None, side_files), (tmp_path / "own.jinja", tmp_path / "own.jinja")):
        with pytest.raises(ModelError) as caught:
            Preprocessor(
                side_files, read_config(side_files), max_pixels=None, trust_remote_code=False, chat_template=given
            )
        assert str(caught.value) == (
            f"{named}: the chat template puts {text.count('image')} <|image|> (image_token_id 14 of config.json) where a "
            "picture belongs, not one; take template, tokenizer and config.json from the same release"
        )


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    config = replace(read_config(TINY_CHECKPOINT), image_token_id=151343)
    with pytest.raises(ModelError) as caught:
        Preprocessor(TINY_CHECKPOINT, config, max_pixels=None, trust_remote_code=False)
    assert str(caught.value) == (
        f"{TINY_CHECKPOINT}: its tokenizer has no token 151343, the image_token_id of config.json; "
        "take both from the same release"
    )


def test_a_missing_processor_file_is_named(side_files: Path) -> None:
    (side_files / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == f"{side_files}: has no preprocessor_config.json; copy it from the model's release"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
               "download or write it again"),
        (b"[]", "wanted a JSON object, found list; download or write it again"),
        (b'{"size": 5}', "size is 5, an object with shortest_edge and a positive longest_edge is needed; copy it again"),
        (b'{"size": {"longest_edge": "x"}}',
         "size is {'longest_edge': 'x'}, an object with shortest_edge and a positive longest_edge is needed; copy it again"),
        (b'{"image_mean": 0.5}', "image_mean is 0.5, 3 numbers from 0 to 1 are needed; copy it again"),
        (b'{"image_mean": [1, null, 1]}', "image_mean is [1, None, 1], 3 numbers from 0 to 1 are needed; copy it again"),
        (b'{"image_std": [0, 1, 1]}', "image_std is [0, 1, 1], 3 numbers from 0.001 to 1 are needed; copy it again"),
    ],
)  # fmt: skip
def test_a_damaged_processor_file_is_named(content: bytes, what: str, side_files: Path) -> None:
    path = side_files / "preprocessor_config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == f"{path}: {what}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not JSON (Expecting value: line 1 column 1 (char 0)); copy it from the model's release"),
        (b'{"version": "1.0", "model": {"type": "BPE", "voc',
         "is not JSON (Unterminated string starting at: line 1 column 45 (char 44)); copy it from the model's release"),
        (b"[1]", "describes no tokenizer; copy it from the model's release"),
        (b'{"model": null}', "describes no tokenizer; copy it from the model's release"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_sentence_about_its_file(content: bytes, what: str, side_files: Path) -> None:
    path = side_files / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == f"{path}: {what}"


def test_a_tokenizer_that_is_json_but_no_tokenizer_is_one_line(side_files: Path) -> None:
    edit_json(side_files / "tokenizer.json", lambda t: t["model"].update(vocab=7, merges="x"))
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value).startswith(f"{side_files}/tokenizer.json: describes no tokenizer (data did not match any ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [b"[]", b'{"tokenizer_class": 5}', b'{"added_tokens_decoder": [1]}', b"[" * 9999, b'{"a": 9' + b"9" * 5000],
)
def test_a_damaged_tokenizer_config_is_one_line(content: bytes, side_files: Path) -> None:
    (side_files / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        preprocessor(side_files)
    assert str(side_files) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "a", "\x1b[31m": 1}}}),
        ("tokenizer_config.json", {"pad_token": {"__type": "AddedToken", "content": "a", "\x1b[31m": 1}}),
        ("special_tokens_map.json", {"eos_token": {"content": "a", "\x1b[31m": 1}}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "a", "\x1b[31m": 1}]}),
    ],
)
def test_a_tokens_unknown_setting_is_refused_and_never_printed(
    name: str, tokens: dict[str, object], side_files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(side_files / name, lambda document: document.update(tokens))
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}: a token of its tokenizer has the setting '\\x1b[31m', which no tokenizer knows; "
        "copy the tokenizer files of the release there"
    )
    assert capfd.readouterr() == ("", "")


TEMPLATES = {
    "{% for %}": "TemplateSyntaxError: Expected an expression, got 'end of statement block'",
    "{{ raise_exception('no pictures') }}": "TemplateError: no pictures",
    "{{ messages.nothing.at_all }}": "UndefinedError: 'list object' has no attribute 'nothing'",
    "{{ 'x' * 10**11 }}": "it takes more than 512 MiB of memory",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "it makes a text of more than 16 MiB",
    "{{ 9 ** (9 ** 9) }}": "it takes more than 1 seconds",
}


@pytest.mark.parametrize(
    "template",
    [pytest.param(template, marks=[pytest.mark.slow] * ("seconds" in why)) for template, why in TEMPLATES.items()],
)
def test_a_template_that_fails_or_never_ends_is_one_sentence(
    template: str, side_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.model.bounded.CPU_SECONDS", 1)
    (side_files / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}: its chat template cannot be used ({TEMPLATES[template]}); copy chat_template.jinja of the release there"
    )


def judged(case: dict[str, str | None]) -> dict[str, object]:
    """A sample as the independent judge of quantized checkpoints builds it, with transformers' own classes."""
    from transformers import AutoTokenizer, Glm4vImageProcessor

    config = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    tokenizer, vision = AutoTokenizer.from_pretrained(TINY_CHECKPOINT), config["vision_config"]
    processor = Glm4vImageProcessor(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
    )
    token = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    found: dict[str, object] = {"pixel_values": None, "grid": None}
    head = []
    if case["prompt"] or case["image"]:
        content = ([{"type": "image"}] if case["image"] else []) + [{"type": "text", "text": case["prompt"] or ""}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if case["image"]:
            made = processor(images=Image.open(TINY_CASES / case["image"]).convert("RGB"), return_tensors="pt")
            text = text.replace(token, token * (int(made["image_grid_thw"].prod()) // 4))
            found |= {"pixel_values": made["pixel_values"].float(), "grid": made["image_grid_thw"]}
        head = tokenizer(text, add_special_tokens=False).input_ids
    tail = tokenizer(case["text"], add_special_tokens=False).input_ids
    return found | {"ids": torch.tensor([head + tail]), "answer_start": len(head)}


@pytest.mark.parametrize(("file", "number"), [("images.jsonl", 0), ("images.jsonl", 17), ("texts.jsonl", 0)])
def test_inputs_are_those_of_an_independent_judge(file: str, number: int) -> None:
    case = json.loads((TINY_CASES / file).read_text().splitlines()[number])
    wanted = judged(case)
    image = Image.open(TINY_CASES / case["image"]) if case["image"] else None
    found = preprocessor().encode(image, case["prompt"], case["text"])
    assert torch.equal(found.ids, wanted["ids"])
    assert found.answer_start == wanted["answer_start"]
    for name in ("pixel_values", "grid"):
        tensor, other = getattr(found, name), wanted[name]
        assert (tensor is None) == (other is None)
        assert tensor is None or torch.equal(tensor, other)


def test_memory_that_is_used_up_is_no_damage_of_the_tokenizer(
    side_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(side_files / "tokenizer_config.json", lambda document: document.update(own=1))  # loaded by no test before

    def used_up(*_: object, **__: object) -> None:
        raise RuntimeError("memory allocation of 9 bytes failed")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", used_up)
    with pytest.raises(RuntimeError, match="memory allocation of"):
        preprocessor(side_files)


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    largest = max(preprocessor().encode(None, PROMPT, None).ids[0].tolist())
    config = replace(read_config(TINY_CHECKPOINT), vocab_size=largest)
    with pytest.raises(ModelError) as caught:
        Preprocessor(TINY_CHECKPOINT, config, max_pixels=None, trust_remote_code=False).encode(None, PROMPT, None)
    assert str(caught.value) == (
        f"{TINY_CHECKPOINT}: its tokenizer gives token {largest}, but the model has {largest} (vocab_size of config.json); "
        "take tokenizer and weights from the same release"
    )


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("do_normalize", False, True),
        ("do_resize", False, True),
        ("patch_size", 16, 14),
        ("merge_size", 1, 2),
        ("image_processor_type", "Qwen2VLImageProcessor", "Glm4vImageProcessor"),
    ],
)
def test_other_pixels_than_the_engines_are_refused(key: str, value: object, wanted: object, side_files: Path) -> None:
    edit_json(side_files / "preprocessor_config.json", lambda c: c.update({key: value}))
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}/preprocessor_config.json: {key} is {value!r}, the model needs {wanted!r}: engines would show it other "
        "pixels than those that it is calibrated on; restore the file"
    )


def test_a_template_that_is_no_text_is_named_and_not_the_tokenizer(side_files: Path) -> None:
    (side_files / "chat_template.jinja").write_bytes("{{ x }}".encode("utf-16"))
    with pytest.raises(ModelError) as caught:
        preprocessor(side_files)
    assert str(caught.value) == (
        f"{side_files}/chat_template.jinja: is no UTF-8 text, which a chat template is; give another file"
    )
