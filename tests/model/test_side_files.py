"""Tokenizer, processor and template files of other ages, and what of them the engines get."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import edit_json
from PIL import Image

from glmq.checkpoint.disk import LFS_POINTER
from glmq.errors import CheckpointError, ModelError
from glmq.model.config import FAMILY, read_config
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.side_files import check_needed_files, engine_side_files, find_template
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES

TEMPLATE = (TINY_CHECKPOINT / "chat_template.jinja").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small files of the embedded model."""
    for path in TINY_CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def encoded(folder: Path, *, chat_template: Path | None = None) -> ModelInputs:
    made = Preprocessor(
        folder, read_config(folder), max_pixels=None, trust_remote_code=False, chat_template=chat_template
    )
    with Image.open(sorted(TINY_PICTURES.iterdir())[0]) as image:
        return made.encode(image, "What is it?", "A square.")


def changed(folder: Path, *, for_mindie: bool = True) -> dict[str, bytes]:
    return engine_side_files(folder, FAMILY, for_mindie=for_mindie, chat_template=None)


def write(path: Path, document: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


def in_tokenizer_config(folder: Path, template: object) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))


PLACES = {
    "tokenizer_config.json": lambda f: in_tokenizer_config(f, TEMPLATE),
    "named in tokenizer_config.json": lambda f: in_tokenizer_config(
        f, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    ),
    "chat_template.json": lambda f: write(f / "chat_template.json", {"chat_template": TEMPLATE}),
    "a folder": lambda f: write(f / "additional_chat_templates" / "default.jinja", TEMPLATE),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_wherever_it_lies_and_written_where_engines_look(place: str, folder: Path) -> None:
    assert changed(folder) == {}
    wanted = encoded(folder)
    (folder / "chat_template.jinja").unlink()
    PLACES[place](folder)
    assert changed(folder) == {"chat_template.jinja": TEMPLATE.encode()}
    assert torch.equal(encoded(folder).ids, wanted.ids)


def test_of_several_templates_without_a_default_one_must_be_chosen(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    in_tokenizer_config(folder, [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}])
    with pytest.raises(ModelError) as caught:
        find_template(folder)
    assert str(caught.value) == (
        f"{folder}/tokenizer_config.json: has the chat templates 'rag, tool_use', none of them called default; "
        "choose one with --chat-template FILE"
    )


def test_a_chosen_template_is_used_and_written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    wanted = encoded(folder)
    own = tmp_path_factory.mktemp("own") / "my.jinja"
    (folder / "chat_template.jinja").rename(own)
    assert find_template(folder) is None
    assert torch.equal(encoded(folder, chat_template=own).ids, wanted.ids)
    made = engine_side_files(folder, FAMILY, for_mindie=False, chat_template=own)
    assert made == {"chat_template.jinja": TEMPLATE.encode()}


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_a_git_lfs_pointer_is_named(name: str, folder: Path) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError) as caught:
        encoded(folder)
    assert str(caught.value) == f"{folder}/{name}: {LFS_POINTER}"


def as_version_5(folder: Path) -> None:
    """The tokenizer's files as transformers 5 saves them."""

    def edit(config: dict) -> None:
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
        del config["added_tokens_decoder"]
        config.update(tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=True)

    edit_json(folder / "tokenizer_config.json", edit)
    (folder / "special_tokens_map.json").unlink()


def test_a_tokenizer_of_transformers_5_gives_the_same_tokens_and_is_written_for_older_ones(folder: Path) -> None:
    wanted = encoded(folder)
    as_version_5(folder)
    assert torch.equal(encoded(folder).ids, wanted.ids)
    for name, content in changed(folder).items():
        (folder / name).write_bytes(content)
    assert changed(folder) == {}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|image|>" in config["additional_special_tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # as the engine does
    assert tokenizer("<|image|>a", add_special_tokens=False).input_ids[0] == read_config(folder).image_token_id


def test_settings_inside_processor_config_are_used_and_written_apart(folder: Path) -> None:
    wanted = encoded(folder)
    image, video = (
        json.loads((folder / name).read_text())
        for name in ("preprocessor_config.json", "video_preprocessor_config.json")
    )
    for part in (image, video):
        part.pop("processor_class", None)
    write(folder / "processor_config.json",
          {"image_processor": image, "processor_class": "Glm46VProcessor", "video_processor": video})  # fmt: skip
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    found = encoded(folder)
    assert found.pixel_values is not None
    assert torch.equal(found.pixel_values, wanted.pixel_values)
    made = {name: json.loads(content) for name, content in changed(folder).items()}
    assert made["preprocessor_config.json"] == image | {"processor_class": "Glm4vProcessor"}
    assert made["video_preprocessor_config.json"] == video | {"processor_class": "Glm4vProcessor"}
    assert made["processor_config.json"]["processor_class"] == "Glm4vProcessor"
    assert changed(folder, for_mindie=False) == {}


def test_processor_classes_that_the_engine_does_not_know_are_written_by_their_older_names(folder: Path) -> None:
    wanted = encoded(folder)
    edit_json(
        folder / "preprocessor_config.json",
        lambda c: c.update(image_processor_type="Glm46VImageProcessor", processor_class="Glm46VProcessor"),
    )
    assert torch.equal(encoded(folder).pixel_values, wanted.pixel_values)
    made = changed(folder)
    assert list(made) == ["preprocessor_config.json"]
    config = json.loads(made["preprocessor_config.json"])
    assert config["image_processor_type"] == "Glm4vImageProcessor"
    assert config["processor_class"] == "Glm4vProcessor"
    assert hasattr(transformers, config["image_processor_type"])


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_what_no_engine_can_do_without_is_asked_for(name: str, folder: Path) -> None:
    check_needed_files(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        check_needed_files(folder)
