"""Images, prompts and answers -> what the model is called with.

The image processor and the tokenizer's chat template are transformers'; the expansion of the image placeholder is ours,
because transformers' own processor class cannot be made without torchvision (for videos that GLM-4.1V calibration lacks).
Pictures come in RGB and upright, as transformers' `load_image` gives them to the serving engines.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from PIL import Image
from torch import Tensor

from glmq.checkpoint.disk import read_input
from glmq.checkpoint.json_file import SURROGATE, JsonValue, read_json_object
from glmq.errors import PictureError, SampleError, SideFileError
from glmq.machine import is_out_of_memory
from glmq.model.bounded import BoundedError, run_bounded
from glmq.model.config import ModelConfig
from glmq.model.lean import lean_transformers
from glmq.model.side_files import (
    TOKENIZER_CONFIG,
    find_template,
    older_tokenizer,
    processor_settings,
    read_template,
)
from glmq.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANNELS: Final = 3
_PIXEL_STEPS: Final = ("do_resize", "do_rescale", "do_normalize")
"""What the image processor does to every picture, by its settings."""
SMALLEST_DEVIATION: Final = 1e-3
_TOKEN_SETTINGS: Final = frozenset({"__type", "content", "single_word", "lstrip", "rstrip", "normalized", "special"})
"""Of one token in the tokenizer's files."""
MAX_TOKENIZER_BYTES: Final = 100_000_000
"""Of tokenizer.json; GLM-4.1V's has 20 MB."""
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

    def without_pixels(self) -> ModelInputs:
        """The same inputs for `StreamedModel.text_call`, which takes what the vision tower has made of the pixels instead."""
        return replace(self, pixel_values=None if self.pixel_values is None else self.pixel_values[:0].clone())


class Preprocessor:
    """Makes ModelInputs with the tokenizer and processor settings of a model folder.

    Args:
        directory: the model folder.
        config: its configuration.
        max_pixels: images with more pixels are shrunk first, keeping their shape; None leaves the model's own limit.
        trust_remote_code: let the tokenizer run code from the folder. The family needs none.
        chat_template: file of the chat template; None: the folder's own.

    Raises:
        ModelError: tokenizer, chat template or processor settings are missing or unusable.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        *,
        max_pixels: int | None,
        trust_remote_code: bool,
        chat_template: Path | None = None,
    ) -> None:
        processor = config.family.image_processor
        with lean_transformers():
            from transformers.utils import logging

            logging.set_verbosity_error()  # transformers 5 warns that torchvision is missing, which we do not want
            import transformers

            processor_class = getattr(transformers, processor.class_name)  # imports its module
        self._config = config
        settings = _read_processor_settings(directory, config)
        frames = config.temporal_patch_size
        longest = processor.max_pixels if settings.longest_edge is None else settings.longest_edge
        own_limit = min(longest, processor.max_pixels) // frames
        bound = own_limit if max_pixels is None else min(max_pixels, own_limit)
        # At the processor's own limit it resizes by itself, once; below it the picture is resized here first.
        self._max_pixels = None if bound == processor.max_pixels // frames else bound
        self._images = processor_class(
            patch_size=config.patch_size,
            temporal_patch_size=frames,
            merge_size=config.merge_size,
            size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
            **settings.normalization,
        )
        self._directory = directory
        template = find_template(directory) if chat_template is None else read_template(chat_template)
        self._tokenizer = _load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if template is None:
            raise SideFileError(
                f"{directory}: has no chat template (a base model comes without); choose one with --chat-template FILE, "
                "e.g. the chat_template.jinja of GLM-4.1V-9B-Thinking"
            )
        self._tokenizer.chat_template = template
        self._render = functools.cache(self._render_once)  # pictures of a folder share their prompt
        rendered = self._render(True, "")
        image_token: str | None = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        if image_token is None:
            raise SideFileError(
                f"{directory}: its tokenizer has no token {config.image_token_id}, the image_token_id of config.json; "
                "take both from the same release"
            )
        if (found := rendered.count(image_token)) != 1:
            raise SideFileError(
                f"{chat_template or directory}: the chat template puts {found} {image_token} (image_token_id "
                f"{config.image_token_id} of config.json) where a picture belongs, not one; take template, tokenizer "
                "and config.json from the same release"
            )
        self._image_token = image_token

    def encode(self, image: Image.Image | None, prompt: str | None, answer: str | None) -> ModelInputs:
        """One sample: image and prompt through the chat template, then the answer's tokens.

        With neither image nor prompt the answer's text stands alone.

        Raises:
            SampleError: the image is too small or too narrow for the model, a text holds the image placeholder, the sample
                has no token, or more than the model takes.
            ModelError: the tokenizer gives a token that the model does not have.
        """
        head: list[int] = []
        count = 0
        pixel_values = grid = None
        if image is not None or prompt is not None:
            text = self._render(image is not None, prompt or "")
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
                f"has {counted(found, 'image placeholder')} where {count} {'is' if count == 1 else 'are'} needed: "
                f"{self._image_token} must not be part of a prompt or answer"
            )
        self.check_length(len(head) + len(tail), has_image=image is not None)
        largest = max(head + tail)
        if largest >= self._config.vocab_size:
            raise SideFileError(
                f"{self._directory}: its tokenizer gives token {largest}, but the model has {self._config.vocab_size} "
                "(vocab_size of config.json); take tokenizer and weights from the same release"
            )
        return ModelInputs(
            ids=torch.tensor([head + tail]),
            answer_start=len(head),
            pixel_values=pixel_values,
            grid=grid,
            image_token_id=self._config.image_token_id,
        )

    def check_length(self, tokens: int, *, has_image: bool, generated: int = 0) -> None:
        """Raise SampleError if a sequence is longer than the model takes, `generated` tokens of an answer included."""
        most = self._config.max_tokens
        if tokens + generated <= most:
            return
        answer, shorten = "", f"shorten its texts{', or its picture with --max-pixels' if has_image else ''}"
        if tokens <= most:
            answer, shorten = f" and up to {generated} of an answer", "lower --generate"
        raise SampleError(
            f"has {tokens} tokens{answer}, the model takes {most} (max_position_embeddings of config.json); {shorten}"
        )

    def _render_once(self, has_image: bool, prompt: str) -> str:
        """The text of a prompt with or without an image, by the model's chat template."""
        content = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": prompt})

        def render() -> str:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            return text

        try:
            return run_bounded(render)
        except BoundedError as error:
            raise SideFileError(
                f"{self._directory}: its chat template cannot be used ({error}); copy chat_template.jinja of the release there"
            ) from error

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def _bounded(self, image: Image.Image) -> Image.Image:
        family, (width, height) = self._config.family, image.size
        defect = family.picture_defect(width, height)
        if defect is not None:
            raise PictureError(f"its image {defect}")
        smallest = family.image_processor.smallest_side
        rgb = image.convert("RGB")
        if self._max_pixels is None or width * height <= self._max_pixels:
            return rgb
        ratio = math.sqrt(self._max_pixels / (width * height))
        size = (max(smallest, int(width * ratio)), max(smallest, int(height * ratio)))
        return rgb.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class _ProcessorSettings:
    """What glmq takes from preprocessor_config.json; None or nothing where it says nothing."""

    longest_edge: int | None
    """Most pixels of a still image's two frames together."""
    normalization: Mapping[str, list[float]]
    """`image_mean` and `image_std`, one number per channel."""


def _read_processor_settings(directory: Path, config: ModelConfig) -> _ProcessorSettings:
    path, found = processor_settings(directory)
    wanted: dict[str, JsonValue] = dict.fromkeys(_PIXEL_STEPS, True)
    wanted |= {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
    }
    processor, kind = config.family.image_processor.class_name, found.get("image_processor_type")
    wanted["image_processor_type"] = kind if kind in {f"{processor}Fast", *config.family.older_classes} else processor
    for key, value in wanted.items():
        if found.get(key) not in (None, value):
            raise SideFileError(
                f"{path}: {key} is {found[key]!r:.60}, the model needs {value!r}: engines would show it other pixels than "
                "those that it is calibrated on; restore the file"
            )
    size = found.get("size")
    longest = size.get("longest_edge") if isinstance(size, dict) else None
    edges = isinstance(size, dict) and "shortest_edge" in size and type(longest) is int and longest > 0
    if size is not None and not edges:
        raise SideFileError(
            f"{path}: size is {size!r:.60}, an object with shortest_edge and a positive longest_edge is needed; copy it again"
        )
    normalization: dict[str, list[float]] = {}
    for key, lowest in (("image_mean", 0.0), ("image_std", SMALLEST_DEVIATION)):
        values = found.get(key)
        if values is None:
            continue
        items = values if isinstance(values, list) else []
        numbers = [float(item) for item in items if type(item) in (int, float)]
        if len(numbers) != CHANNELS or len(items) != CHANNELS or not all(lowest <= v <= 1 for v in numbers):
            raise SideFileError(
                f"{path}: {key} is {values!r:.60}, {CHANNELS} numbers from {lowest:g} to 1 are needed; copy it again"
            )
        normalization[key] = numbers
    return _ProcessorSettings(longest, normalization)


def _load_tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError that names the file that is to blame, where one is."""
    with lean_transformers():
        from transformers import AutoTokenizer, Glm4vConfig, PreTrainedTokenizerFast

    if not str(directory).isascii() and SURROGATE.search(str(directory)):
        raise SideFileError(
            f"{directory}: has a name that is no UTF-8 here, which the tokenizer's library cannot open; rename the folder, "
            "or give a link to it"
        )
    _check_added_tokens(directory)
    path = directory / TOKENIZER_CONFIG
    found = read_json_object(path) if path.exists() else {}
    older = older_tokenizer(found)
    try:
        tokenizer: PreTrainedTokenizerBase
        if older == found:
            # Only the kind of model counts here: transformers 5.24 trips over a config.json whose dtype is "auto".
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=Glm4vConfig(), local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:  # as transformers 5 saves it; one before 5 would not know the class, or what to do with a list
            extra = older.get("additional_special_tokens") or []
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                directory, local_files_only=True, extra_special_tokens={}, additional_special_tokens=extra
            )
        return tokenizer
    except BaseException as error:  # whatever a damaged file trips transformers or its compiled tokenizer over
        if not _is_of_a_file(error):
            raise
        _check_tokenizer_file(directory / "tokenizer.json", has_code=trust_remote_code)
        reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
        raise SideFileError(
            f"{directory}: its tokenizer cannot be loaded ({reason:.200}); copy the tokenizer files of the release there"
        ) from error


def _check_added_tokens(directory: Path) -> None:
    """Read the tokenizer's small files. The compiled tokenizer would print every setting of a token that it does not know,
    whatever its name holds, to standard output.

    Raises:
        CheckpointError: one is no JSON object.
        ModelError: such a setting.
    """
    documents = {
        name: read_json_object(directory / name) if (directory / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    listed = documents["tokenizer_config.json"].get("added_tokens_decoder")
    tokens: list[JsonValue] = list(listed.values()) if isinstance(listed, dict) else []
    stack: list[JsonValue] = [documents["tokenizer_config.json"]]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
            if value.get("__type") == "AddedToken":
                tokens.append(value)
        elif isinstance(value, list):
            stack += value
    for value in documents["special_tokens_map.json"].values():
        tokens += value if isinstance(value, list) else [value]
    for token in tokens:
        for setting in token if isinstance(token, dict) else ():
            if setting not in _TOKEN_SETTINGS:
                raise SideFileError(
                    f"{directory}: a token of its tokenizer has the setting {setting!a:.60}, which no tokenizer knows; "
                    "copy the tokenizer files of the release there"
                )


def _check_tokenizer_file(path: Path, *, has_code: bool) -> None:
    """Raise ModelError if this is what keeps the tokenizer from being loaded.

    Args:
        has_code: the tokenizer may be the model's own code, which needs no such file.
    """
    if not path.exists():
        if has_code:
            return
        raise SideFileError(
            f"{path.parent}: has no {path.name}, which is the tokenizer; copy it from the model's release"
        )
    raw = read_input(path, MAX_TOKENIZER_BYTES)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SideFileError(f"{path}: is not JSON ({f'{error}':.100}); copy it from the model's release") from error
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise SideFileError(f"{path}: describes no tokenizer; copy it from the model's release")
    from transformers import PreTrainedTokenizerFast

    try:
        PreTrainedTokenizerFast(tokenizer_file=str(path))
    except BaseException as error:
        if not _is_of_a_file(error):
            raise
        raise SideFileError(
            f"{path}: describes no tokenizer ({f'{error}':.100}); copy it from the model's release"
        ) from error


def _is_of_a_file(error: BaseException) -> bool:
    """Whether a tokenizer's library fails by what it reads: not by the memory, and not because the run was stopped."""
    is_panic = type(error).__name__ == "PanicException"
    return (isinstance(error, Exception) or is_panic) and not is_out_of_memory(error)
