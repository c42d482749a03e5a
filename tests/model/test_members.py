"""Which released model a folder holds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import edit_json

from glmq.model.config import read_config
from glmq.model.members import describe_member
from glmq.model.tiny import TINY_CHECKPOINT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small files of the embedded model."""
    place = tmp_path / "weights"
    place.mkdir()
    for path in TINY_CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, place / path.name)
    return place


def flash(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", lambda c: c.update(processor_class="Glm46VProcessor"))
    edit_json(
        folder / "config.json", lambda c: c["text_config"].update(rope_theta=500000, max_position_embeddings=131072)
    )


def flash_by_its_tokens(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(image_token_id=151363))
    edit_json(folder / "config.json", lambda c: c["text_config"].update(vocab_size=151552))


RELEASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "as released": (lambda folder: None, "GLM-4.1V-9B-Thinking or one made from it"),
    "processor": (flash, "GLM-4.6V-Flash or one made from it"),
    "tokens": (flash_by_its_tokens, "GLM-4.6V-Flash or one made from it"),
    "rope": (
        lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(rope_theta=500000)),
        "Glyph or one made from it",
    ),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "GLM-4.1V-9B-Base or one made from it"),
}


@pytest.mark.parametrize("release", RELEASES)
def test_released_models_are_told_apart_by_their_files(release: str, folder: Path) -> None:
    change, wanted = RELEASES[release]
    change(folder)
    found = describe_member(folder, read_config(folder))
    assert found.startswith(f"{wanted} (")
    if release == "processor":
        assert found.endswith("(Glm46VProcessor, image token 14, rope_theta 500000, 131072 positions)")


def test_a_name_of_the_folder_or_of_the_hubs_cache_counts_more(folder: Path) -> None:
    cache = folder.parent / "models--zai-org--AutoGLM-Phone-9B" / "snapshots" / "0123"
    cache.parent.mkdir(parents=True)
    folder.rename(cache)
    assert describe_member(cache, read_config(cache)).startswith("AutoGLM-Phone-9B, by the folder's name (")
