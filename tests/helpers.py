"""What several test rooms do with folders and checkpoints."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from typer.testing import Result

    from glmq.model.config import ModelConfig
    from glmq.model.inputs import ModelInputs


def run(*args: object) -> Result:
    """Run `glmq` with these arguments in this process; whatever the exit code."""
    from typer.testing import CliRunner

    from glmq.cli.app import app

    return CliRunner().invoke(app, [str(arg) for arg in args])


def glmq(*args: object) -> Result:
    """Run `glmq` with these arguments in this process; it must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint with one weight file in place; its index, if any, stays as it is."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder with its sha256, hidden ones included; folders with an empty string."""
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def streamed_logits(folder: Path, config: ModelConfig, inputs: ModelInputs, dtype: torch.dtype) -> Tensor:
    """The logits [tokens, vocabulary] of one sample, with one block placed at a time."""
    from glmq.checkpoint.reader import Checkpoint
    from glmq.model.blocks import VISION_STEM, VISION_TAIL, StreamedModel
    from glmq.model.glm4v import LM_HEAD, TEXT, VISION

    has_image = inputs.pixel_values is not None
    with Checkpoint.open(folder) as source:
        model = StreamedModel(source, config, device=torch.device("cpu"), dtype=dtype)
        vision = None
        if has_image:
            with model.placed(*VISION_STEM):
                vision = model.vision_call(inputs)
            for index in range(config.vision_depth):
                with model.placed(f"{VISION}.blocks.{index}"):
                    vision.hidden = model.replay(f"{VISION}.blocks.{index}", vision)
        with model.placed(*((*VISION_STEM, *VISION_TAIL) if has_image else ())), model.embedding_rows(inputs.ids):
            call = model.text_call(inputs, vision)
        for index in range(config.layers):
            with model.placed(f"{TEXT}.layers.{index}"):
                call.hidden = model.replay(f"{TEXT}.layers.{index}", call)
        with model.placed(f"{TEXT}.norm", LM_HEAD):
            return model.logits(call.hidden)


def load_full(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A float checkpoint as transformers itself loads it, whole."""
    from transformers import Glm4vForConditionalGeneration

    return Glm4vForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype).eval()


def full_model_kwargs(inputs: ModelInputs, model: nn.Module) -> dict[str, object]:
    """What a user of transformers would call a whole model with."""
    kwargs: dict[str, object] = {
        "input_ids": inputs.ids,
        "attention_mask": torch.ones_like(inputs.ids),
        "use_cache": False,
    }
    if "mm_token_type_ids" in inspect.signature(model.model.forward).parameters:  # transformers 5
        kwargs["mm_token_type_ids"] = (inputs.ids == model.config.image_token_id).int()
    if inputs.pixel_values is not None:
        kwargs |= {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.grid}
    return kwargs


def slow_histogram(values: list[float]) -> tuple[int, list[int]]:
    """Exponent and counts of one channel, value by value: 256 bins of width 2^(exponent - 7) from -2^exponent on."""
    exponent = -40
    while not max(abs(value) for value in values) < 2.0**exponent:
        exponent += 1
    counts = [0] * 256
    for value in values:
        counts[math.floor(value / 2.0 ** (exponent - 7)) + 128] += 1
    return exponent, counts


class StandInNpu:
    """What glmq uses of torch.npu, with a record of the calls."""

    def __init__(self, *, available: bool = True, bf16: bool = True) -> None:
        self.calls: list[str] = []
        self._available, self._bf16 = available, bf16

    def is_available(self) -> bool:
        return self._available

    def is_bf16_supported(self) -> bool:
        return self._bf16

    def current_device(self) -> int:
        return 0

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
