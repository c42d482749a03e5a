"""Train another tiny GLM-4.1V, for measurements on a checkpoint and cases that are not glmq's own.

    python tests/benchmarks/train_sibling.py OUT [--minutes 25] [--seed 1]
    python tests/benchmarks/fidelity.py --model OUT --judge judge.py ...

It shares the tokenizer and the architecture with the embedded model, and nothing else: other sizes, other pictures (bar charts
with a mark in a corner), other texts (the docstrings of torch and numpy), other weights from the first step on. Afterwards
some channels of each norm are made outliers, as large models have them: the norm's weight is multiplied and the columns of
the linears that follow are divided by the same factor, which changes no output. OUT is laid out as the embedded model is:
bf16 shards, `pictures/` to calibrate on with their true answers, `cases/` held out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import torch
from fidelity import docstrings_in
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from glmq.model.config import read_config
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.tiny import TINY_CHECKPOINT

PROMPT: Final = "Read the chart and say what it shows."
GROUNDS: Final = {"a white": (250, 250, 250), "a black": (15, 15, 15), "a beige": (225, 210, 180)}
COLOURS: Final = {
    "red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210), "orange": (240, 150, 30), "pink": (240, 130, 190),
}  # fmt: skip
CORNERS: Final = {"top left": (4, 4), "top right": (94, 4), "none": None}
SIDE: Final = 112
LONGEST: Final = 4096
"""Characters of a text to train on: the embedded model, whose tokenizer this is, takes no more tokens."""
CALIBRATION, HELD_OUT, HELD_OUT_TEXTS, TEXT_CHARACTERS = 16, 96, 48, 480
BATCH, TEXTS, TOKENS = 24, 10, 128
OUTLIERS: Final = 5


def draw_chart(rng: random.Random) -> tuple[Image.Image, str]:
    """A picture and its description."""
    ground = rng.choice(sorted(GROUNDS))
    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    draw = ImageDraw.Draw(image)
    bars = [(rng.choice(sorted(COLOURS)), rng.randint(1, 7)) for _ in range(rng.randint(1, 3))]
    for number, (colour, height) in enumerate(bars):
        left = 8 + 34 * number + rng.randint(-2, 2)
        draw.rectangle((left, 108 - 12 * height, left + 22, 108), fill=COLOURS[colour])
    corner = rng.choice(sorted(CORNERS))
    if (at := CORNERS[corner]) is not None:
        draw.ellipse((*at, at[0] + 13, at[1] + 13), fill=(128, 60, 160))
    parts = ", then ".join(f"{colour} {height}" for colour, height in bars)
    mark = "It has no mark." if at is None else f"It has a mark at the {corner}."
    return image, f"On {ground} ground stand {len(bars)} bars, from the left: {parts}. {mark}"


def package_docstrings(package: ModuleType) -> list[str]:
    """Every docstring of some length in the files of a package, in sorted order."""
    assert package.__file__ is not None
    found: set[str] = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        try:
            found.update(text for text in docstrings_in(path) if len(text) >= TEXT_CHARACTERS)
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and the like
    return sorted(found)


def make_model(seed: int) -> Glm4vForConditionalGeneration:
    config = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config["vision_config"] |= {"hidden_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 256}
    torch.manual_seed(seed)
    return Glm4vForConditionalGeneration(Glm4vConfig(**config))


def batch_of(samples: Sequence[ModelInputs]) -> dict[str, Tensor]:
    """Samples of one picture size as the model takes them, padded on the right; the answers are the labels."""
    length = max(sample.ids.shape[1] for sample in samples)
    ids, mask = torch.zeros(2, len(samples), length, dtype=torch.long)
    labels = torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        n = sample.ids.shape[1]
        ids[row, :n], mask[row, :n] = sample.ids[0], 1
        labels[row, sample.answer_start : n] = sample.ids[0, sample.answer_start :]
    pixels = torch.cat([sample.pixel_values for sample in samples])  # type: ignore[misc]  # all have a picture
    grid = torch.cat([sample.grid for sample in samples])  # type: ignore[misc]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels, "image_grid_thw": grid}


def train(model: Glm4vForConditionalGeneration, batches: Iterator[Sequence[dict[str, Tensor]]], minutes: float) -> None:
    """AdamW for that many minutes, with a cosine over them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    begin, step = time.monotonic(), 0
    while (passed := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * passed)) / 2)
        optimizer.zero_grad()
        losses = []
        for batch in next(batches):
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"{100 * passed:5.1f} %  step {step}  loss {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)


@torch.no_grad()
def add_outliers(model: Glm4vForConditionalGeneration, rng: random.Random) -> None:
    """Channels of the text norms that are many times larger, the function unchanged."""
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_up_proj,)),
        ):
            for channel in rng.sample(range(norm.weight.shape[0]), OUTLIERS):
                factor = 2.0 ** rng.uniform(2, 4.5)
                norm.weight[channel] *= factor
                for linear in linears:
                    linear.weight[:, channel] /= factor


def write_samples(file: Path, pictures: Sequence[tuple[Image.Image, str]], images: Path) -> None:
    """A file of samples with answers, and the folder of its pictures."""
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, text) in enumerate(pictures):
        path = images / f"{number:03}.png"
        image.save(path)
        lines.append(json.dumps({"image": str(path.relative_to(file.parent)), "prompt": PROMPT, "text": text}) + "\n")
    file.write_text("".join(lines))


def count_right(
    model: Glm4vForConditionalGeneration, encoder: Preprocessor, cases: Sequence[tuple[Image.Image, str]]
) -> int:
    """Held-out charts that are described without a mistake."""
    right = 0
    for image, text in cases:
        inputs = encoder.encode(image, PROMPT, None)
        batch = batch_of([inputs])
        del batch["labels"]
        ids = model.generate(**batch, max_new_tokens=72, do_sample=False, pad_token_id=0)
        right += encoder.decode(ids[0, inputs.ids.shape[1] :].tolist()) == text
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    rng = random.Random(a.seed)
    a.out.mkdir(parents=True)
    encoder = Preprocessor(TINY_CHECKPOINT, read_config(TINY_CHECKPOINT), max_pixels=None, trust_remote_code=False)
    drawn = (draw_chart(rng) for _ in range(4000))
    charts = list({image.tobytes(): (image, text) for image, text in drawn}.values())  # each picture once
    calibration, charts = charts[:CALIBRATION], charts[CALIBRATION:]
    cases, charts = charts[:HELD_OUT], charts[HELD_OUT:]
    texts = package_docstrings(torch) + package_docstrings(np)
    rng.shuffle(texts)
    held_out, texts = texts[:HELD_OUT_TEXTS], texts[HELD_OUT_TEXTS:]
    end = encoder.encode(None, None, "<|endoftext|>").ids
    whole = [text for text in texts if len(text) <= LONGEST]
    stream = torch.cat([part for text in whole for part in (encoder.encode(None, None, text).ids, end)], 1)[0]
    samples = [encoder.encode(image, PROMPT, f"{text}<|endoftext|>") for image, text in charts]
    print(f"{len(samples)} charts, {len(stream)} tokens of text", flush=True)

    def batches() -> Iterator[Sequence[dict[str, Tensor]]]:
        while True:
            starts = [rng.randrange(len(stream) - TOKENS) for _ in range(TEXTS)]
            ids = torch.stack([stream[start : start + TOKENS] for start in starts])
            yield batch_of(rng.sample(samples, BATCH)), {"input_ids": ids, "labels": ids}

    model = make_model(a.seed)
    model.train()
    train(model, batches(), a.minutes)
    model.eval()
    add_outliers(model, rng)
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = 0
    print(f"{count_right(model, encoder, cases[:24])} of 24 held-out charts described without a mistake", flush=True)
    model.save_pretrained(a.out, max_shard_size="5MB")
    for path in TINY_CHECKPOINT.iterdir():
        if path.is_file() and not path.name.startswith(("model", "config", "README")):
            shutil.copy(path, a.out)
    write_samples(a.out / "pictures" / "answers.jsonl", calibration, a.out / "pictures")
    write_samples(a.out / "cases" / "images.jsonl", cases, a.out / "cases" / "images")
    lines = [{"image": None, "prompt": None, "text": text[:TEXT_CHARACTERS]} for text in held_out]
    (a.out / "cases" / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
