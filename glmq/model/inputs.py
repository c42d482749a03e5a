"""Images, prompts and answers -> what the model is called with.

The image processor and the tokenizer's chat template are transformers'; the expansion of the image placeholder is ours,
because transformers' own processor class cannot be made without torchvision (for videos that GLM-4.1V calibration lacks).
EXIF orientation is not applied, as the serving engine does not apply it either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from glmq.errors import ModelError, SampleError
from glmq.model.config import ModelConfig
from glmq.model.lean import no_compiler

DEFAULT_PROMPT: Final = "Please describe this picture in detail."


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One sample, ready for the model."""

    ids: Tensor
    """int64 [1, tokens]; image placeholders expanded."""
    answer_start: int
    """Index of the first answer token; equal to the number of tokens if there is no answer."""
    pixel_values: Tensor | None
    """float32 [patches, channels * temporal * patch * patch], or None without an image."""
    grid: Tensor | None
    """int64 [1, 3]: patches in time, height, width; None without an image."""
    image_token_id: int

    @property
    def tokens(self) -> int:
        """Image placeholders, prompt and answer together."""
        return int(self.ids.shape[1])

    def with_answer(self, ids: Sequence[int]) -> ModelInputs:
        """The same inputs followed by these answer tokens."""
        return replace(self, ids=torch.cat([self.ids, torch.tensor([ids])], dim=1))


class Preprocessor:
    """Makes ModelInputs with the tokenizer and processor settings of a model folder.

    Args:
        directory: the model folder.
        config: its configuration.
        max_pixels: images with more pixels are shrunk first, keeping their shape; None leaves the model's own limit.
        trust_remote_code: let the tokenizer run code from the folder. GLM-4.1V needs none.

    Raises:
        ModelError: tokenizer, chat template or processor settings are missing or unusable.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, *, max_pixels: int | None, trust_remote_code: bool
    ) -> None:
        processor = config.family.image_processor
        with no_compiler():
            from transformers.utils import logging

            logging.set_verbosity_error()  # transformers 5 warns that torchvision is missing, which we do not want
            import transformers
            from transformers import AutoTokenizer

            processor_class = getattr(transformers, processor.class_name)  # imports its module
        self._config = config
        settings = _processor_settings(directory)
        size = settings.get("size")
        longest = size.get("longest_edge") if isinstance(size, dict) else None
        frames = config.temporal_patch_size
        limit = min(longest, processor.max_pixels) if isinstance(longest, int) else processor.max_pixels
        own_limit = limit // frames
        bound = own_limit if max_pixels is None else min(max_pixels, own_limit)
        # At the processor's own limit it resizes by itself, once; below it the picture is resized here first.
        self._max_pixels = None if bound == processor.max_pixels // frames else bound
        chosen = {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
        self._images = processor_class(
            patch_size=config.patch_size,
            temporal_patch_size=frames,
            merge_size=config.merge_size,
            size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
            **chosen,
        )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"{directory}: its tokenizer cannot be loaded ({error}); copy the tokenizer files of the release there"
            ) from error
        if not self._tokenizer.chat_template:
            raise ModelError(f"{directory}: has no chat template; copy chat_template.jinja of the release there")
        image_token: str | None = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        if image_token is None:
            raise ModelError(
                f"{directory}: its tokenizer has no token {config.image_token_id}, the image_token_id of config.json; "
                "take both from the same release"
            )
        self._image_token = image_token

    def encode(self, image: Image.Image | None, prompt: str | None, answer: str | None) -> ModelInputs:
        """One sample: image and prompt through the chat template, then the answer's tokens.

        With neither image nor prompt the answer's text stands alone.

        Raises:
            SampleError: the image is too small or too narrow for the model, a text holds the image placeholder, or the
                sample has no token.
        """
        head: list[int] = []
        count = 0
        pixel_values = grid = None
        if image is not None or prompt is not None:
            content = [{"type": "image"}] if image is not None else []
            content.append({"type": "text", "text": prompt or ""})
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if image is not None:
                made = self._images(images=self._bounded(image), return_tensors="pt")
                pixel_values, grid = made["pixel_values"].float(), made["image_grid_thw"]
                count = int(grid.prod()) // self._config.merge_size**2
                text = text.replace(self._image_token, self._image_token * count)
            head = self._tokenizer(text, add_special_tokens=False).input_ids
        tail: list[int] = self._tokenizer(answer, add_special_tokens=False).input_ids if answer else []
        if not head and not tail:
            raise SampleError("a sample has neither image nor prompt nor text; give at least one")
        found = (head + tail).count(self._config.image_token_id)
        if found != count:
            raise SampleError(
                f"{found} image placeholders where {count} are needed: {self._image_token} must not be part of a prompt "
                "or answer, and the chat template must place it once"
            )
        return ModelInputs(
            ids=torch.tensor([head + tail]),
            answer_start=len(head),
            pixel_values=pixel_values,
            grid=grid,
            image_token_id=self._config.image_token_id,
        )

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def _bounded(self, image: Image.Image) -> Image.Image:
        family, (width, height) = self._config.family, image.size
        smallest, aspect = family.image_processor.smallest_side, family.image_processor.largest_aspect
        if min(width, height) < smallest or max(width, height) > aspect * min(width, height):
            raise SampleError(
                f"an image of {width} x {height} pixels: {family.title} needs sides of at least {smallest} pixels "
                f"and an aspect ratio of at most {aspect}"
            )
        rgb = image.convert("RGB")
        if self._max_pixels is None or width * height <= self._max_pixels:
            return rgb
        ratio = math.sqrt(self._max_pixels / (width * height))
        size = (max(smallest, int(width * ratio)), max(smallest, int(height * ratio)))
        return rgb.resize(size, Image.Resampling.BICUBIC)


def _processor_settings(directory: Path) -> dict[str, object]:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: has no preprocessor_config.json; copy it from the model's release")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: is not valid JSON ({error}); copy it from the model's release") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: holds a JSON {type(settings).__name__}, not an object; copy it again")
    return settings
