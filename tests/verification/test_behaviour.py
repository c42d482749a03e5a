"""Float against candidate, side by side, against the same numbers from whole models."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import edit_tensors, full_model_kwargs
from PIL import Image
from torch import Tensor, nn

from glmq.checkpoint.ascend import decode_linear
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.model.config import read_config
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT
from glmq.numerics.int8_linear import run_linear
from glmq.verification import predictions
from glmq.verification.behaviour import BlockBehaviour, compare_behaviour, generate, whole_model
from glmq.verification.cases import Case
from glmq.verification.checks import judge_block
from glmq.verification.int8_model import open_model, placed
from glmq.verification.limits import Limits
from glmq.verification.predictions import Predictions

LAYER = "model.language_model.layers.2"
Q = f"{LAYER}.self_attn.q_proj"
O = f"{LAYER}.self_attn.o_proj"


@dataclass(frozen=True)
class Compared:
    """What one comparison yields."""

    blocks: list[BlockBehaviour]
    predictions: Predictions


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return Preprocessor(TINY_CHECKPOINT, read_config(TINY_CHECKPOINT), max_pixels=None, trust_remote_code=False)


@pytest.fixture(scope="module")
def inputs(preprocessor: Preprocessor) -> list[ModelInputs]:
    """Two pictures with answers and one text alone."""
    made = []
    for line in (TINY_CASES / "images.jsonl").read_text().splitlines()[:2]:
        case = json.loads(line)
        with Image.open(TINY_CASES / case["image"]) as image:
            made.append(preprocessor.encode(image, case["prompt"], case["text"]))
    made.append(preprocessor.encode(None, None, "Return the number of items in a container."))
    return made


def cases_of(inputs: Sequence[ModelInputs]) -> list[Case]:
    return [Case(f"case {i}", one.grid is not None, partial(lambda x: x, one)) for i, one in enumerate(inputs)]


def compare(reference: Path, candidate: Path, inputs: Sequence[ModelInputs]) -> Compared:
    with Checkpoint.open(reference) as one, Checkpoint.open(candidate) as other:
        records = list(compare_behaviour(one, other, read_config(reference), cases_of(inputs)))
    blocks = [record for record in records if isinstance(record, BlockBehaviour)]
    (predictions,) = [record for record in records if isinstance(record, Predictions)]
    return Compared(blocks, predictions)


@pytest.fixture(scope="module")
def compared(half: Path, half_seed: Path, inputs: list[ModelInputs]) -> Compared:
    return compare(half, half_seed, inputs)


def logits_of(folder: Path, inputs: Sequence[ModelInputs]) -> Iterator[Tensor]:
    with whole_model(folder) as model, torch.no_grad():
        for one in inputs:
            yield model.model(**model.arguments(one)).logits[0].double()


def test_every_block_reports_once_and_in_order(compared: Compared) -> None:
    names = [block.done.name for block in compared.blocks]
    assert names == [
        *(f"model.visual.blocks.{i}" for i in range(3)), "model.visual.merger",
        *(f"model.language_model.layers.{i}" for i in range(3)),
    ]  # fmt: skip
    assert [block.done.index for block in compared.blocks] == list(range(7))
    assert {block.done.total for block in compared.blocks} == {7}
    # The tower is float16 in one and bfloat16 in the other: casting loses subnormal numbers only.
    assert all(block.error < 1e-6 for block in compared.blocks[:4])
    assert all(0.001 < block.error < 0.1 for block in compared.blocks[4:])


def test_predictions_are_those_of_the_whole_models(
    compared: Compared, half: Path, half_seed: Path, inputs: list[ModelInputs]
) -> None:
    kl = top1 = nll_float = nll_candidate = count = 0.0
    pairs = zip(
        inputs, logits_of(half, inputs), logits_of(half_seed, inputs), compared.predictions.samples, strict=True
    )
    for one, a, b, sample in pairs:
        start = max(one.answer_start, 1)
        p, q = a[start - 1 : -1].log_softmax(-1), b[start - 1 : -1].log_softmax(-1)
        targets = one.ids[0, start:, None]
        own = float((p.exp() * (p - q)).sum())
        # The streamed logits come from other matrix shapes than the whole model's: float32 rounding moves them by 1e-6.
        assert sample.kl == pytest.approx(own / len(p), rel=1e-3, abs=1e-7)
        assert sample.positions == len(p)
        kl, count = kl + own, count + len(p)
        top1 += int((p.argmax(-1) == q.argmax(-1)).sum())
        nll_float -= float(p.gather(1, targets).sum())
        nll_candidate -= float(q.gather(1, targets).sum())
    found = compared.predictions
    assert (found.positions, found.top1) == (count, top1 / count)
    assert found.kl == pytest.approx(kl / count, rel=1e-3)
    assert found.nll_float == pytest.approx(nll_float / count, rel=1e-5)
    assert found.nll_candidate == pytest.approx(nll_candidate / count, rel=1e-4)


def test_a_linears_error_is_measured_on_the_float_models_own_input(
    compared: Compared, half: Path, half_seed: Path, inputs: list[ModelInputs]
) -> None:
    noise = signal = 0.0
    with Checkpoint.open(half_seed) as other:
        linear = decode_linear(Q, other)
        norm = other.read(f"{LAYER}.input_layernorm.weight").float()
    with whole_model(half) as model, torch.no_grad():

        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        seen: list[Tensor] = []
        handles = [
            model.module(f"{LAYER}.input_layernorm").register_forward_pre_hook(watch),
            model.module(Q).register_forward_hook(lambda _, args, y: seen.append(y)),
        ]
        for one in inputs:
            seen.clear()
            model.model(**model.arguments(one))
            x, y = seen[0][0], seen[1][0]
            normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
            noise += float((run_linear(normed, linear) - y).double().square().sum())
            signal += float(y.double().square().sum())
        for handle in handles:
            handle.remove()
    (found,) = [x for block in compared.blocks for x in block.linears if x.name == Q]
    # A rounding that falls on the other side of a half moves one input by a step: a few of 40 000.
    assert found.error == pytest.approx(math.sqrt(noise / signal), rel=1e-3)


def test_a_checkpoint_behaves_like_itself(half: Path, inputs: list[ModelInputs]) -> None:
    same = compare(half, half, inputs[:1])
    assert [block.error for block in same.blocks] == [0.0] * 7
    assert (same.predictions.kl, same.predictions.top1) == (0.0, 1.0)
    assert same.predictions.nll_float == same.predictions.nll_candidate


def test_the_head_may_come_in_pieces_of_any_size(
    compared: Compared, half: Path, half_seed: Path, inputs: list[ModelInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "HEAD_ROWS", 100)
    found = compare(half, half_seed, inputs[2:])
    wanted = compared.predictions.samples[2]
    assert found.predictions.samples[0].top1 == wanted.top1
    assert found.predictions.kl == pytest.approx(wanted.kl, rel=1e-5)
    assert len(found.blocks) == 3  # without a picture the tower does not run


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_tie_is_a_token_that_the_float_model_finds_nearly_as_likely_as_its_own(rows: int) -> None:
    one = torch.tensor([[1.0, 0.56, 0.0, 0.0], [0.0, 0.54, 1.0, 0.9], [0.0, 3.0, 0.0, 2.56], [0.0, 0.0, 0.0, 1.0]])
    other = torch.tensor([[0.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 9.0]])
    sums = predictions.HeadSums(torch.full((4,), -1))
    for start in range(0, 4, rows):
        sums.add(start, one[:, start : start + rows], other[:, start : start + rows])
    assert predictions.summarize(sums, ["a"], [4]).top1 == 0.25
    assert predictions.summarize(sums, ["a"], [4]).ties == 2


def test_inputs_without_an_answer_are_scored_after_their_image(
    half: Path, half_seed: Path, preprocessor: Preprocessor
) -> None:
    with Image.open(TINY_CASES / "images" / "000.png") as image:
        question = preprocessor.encode(image, "What is it?", None)
    found = compare(half, half_seed, [question])
    last = int((question.ids[0] == question.image_token_id).nonzero()[-1])
    assert found.predictions.positions == question.tokens - last
    assert (found.predictions.nll_float, found.predictions.nll_candidate) == (None, None)


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_inputs_that_clip_are_told_with_their_sample(
    compared: Compared, half: Path, half_seed: Path, inputs: list[ModelInputs], tmp_path: Path
) -> None:
    candidate = copy_of(half_seed, tmp_path / "clips")
    edit_tensors(candidate, lambda tensors: tensors.update({f"{O}.input_scale": tensors[f"{O}.input_scale"] / 4}))
    found = compare(half, candidate, inputs[:2])
    (before,), (after,) = (
        [x for block in result.blocks for x in block.linears if x.name == O] for result in (compared, found)
    )
    assert after.covered_high == pytest.approx(before.covered_high / 4, rel=1e-6)
    assert after.clipped_share > 10 * before.clipped_share
    assert after.excess_sample in ("case 0", "case 1")
    width, half = after.covered_high - after.covered_low, (after.covered_high - after.covered_low) / 510
    beyond = max(after.covered_low - half - after.seen_low, after.seen_high - after.covered_high - half)
    assert after.excess == pytest.approx(beyond / width, rel=1e-6)
    assert after.error > before.error


@pytest.mark.parametrize(("factor", "is_wrong"), [(2.0, False), (8.0, True)])
def test_a_range_that_wastes_more_than_two_bits_is_an_error(
    half: Path, half_seed: Path, inputs: list[ModelInputs], tmp_path: Path, factor: float, is_wrong: bool
) -> None:
    folder = Path(shutil.copytree(half_seed, tmp_path / "wide"))

    def widen(tensors: dict[str, Tensor]) -> None:  # o_proj has no bias, so that no other tensor contradicts it
        deq = tensors[f"{O}.deq_scale"].int().view(torch.float32) * factor
        tensors[f"{O}.deq_scale"] = deq.view(torch.int32).long()
        tensors[f"{O}.input_scale"] *= factor

    edit_tensors(folder, widen)
    (block,) = [b for b in compare(half, folder, inputs[:1]).blocks if b.done.name == LAYER]
    wasted = [f for f in judge_block(block, Limits(max_error=100), is_fp16=True) if "bits are wasted" in f.message]
    assert [(f.tensor, f.severity) for f in wasted] == [(O, "error")] * is_wrong


def test_an_int8_head_and_norm_biases_are_honoured(
    half: Path, half_seed: Path, inputs: list[ModelInputs], tmp_path: Path
) -> None:
    candidate = copy_of(half_seed, tmp_path / "int8 head")

    def edit(tensors: dict[str, Tensor]) -> None:
        weight = tensors["lm_head.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors["lm_head.weight"] = (weight / scale).round().to(torch.int8)
        tensors["lm_head.weight_scale"] = scale
        tensors["lm_head.weight_offset"] = torch.zeros_like(scale)
        tensors["model.language_model.norm.bias"] += 0.01

    edit_tensors(candidate, edit)
    found = compare(half, candidate, inputs[2:])
    (logits,), (float_logits,) = logits_of(candidate, inputs[2:]), logits_of(half, inputs[2:])
    p, q = float_logits[:-1].log_softmax(-1), logits[:-1].log_softmax(-1)
    assert found.predictions.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_caption_is_what_transformers_itself_generates(
    tiny: Path, full_model: nn.Module, preprocessor: Preprocessor
) -> None:
    with Image.open(TINY_CASES / "images" / "001.png") as image:
        question = preprocessor.encode(image, "Please describe this picture in detail.", None)
    kwargs = full_model_kwargs(question, full_model)
    kwargs |= {"use_cache": True}
    wanted = full_model.generate(**kwargs, do_sample=False, max_new_tokens=40)[0, question.tokens :].tolist()
    ends = read_config(tiny).eos_token_ids
    with whole_model(tiny) as model:
        ids = generate(model, question, 40)
        assert generate(model, question, 3) == ids[:3]
    assert ids == [token for token in wanted if token not in ends]
    assert preprocessor.decode(ids).startswith("The background is")


def test_compressed_weights_are_refused(half: Path, half_seed: Path, tmp_path: Path) -> None:
    candidate = copy_of(half_seed, tmp_path / "renamed")

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.o_proj.weight"] = tensors.pop(f"{O}.weight")

    edit_tensors(candidate, edit)
    with Checkpoint.open(candidate) as checkpoint, pytest.raises(CheckpointError) as error:
        open_model(checkpoint, read_config(half))
    assert str(error.value) == (
        f"{candidate}: language_model.o_proj.weight is int8, but language_model.o_proj is no linear of the model; "
        "is this a compressed or sharded checkpoint? Run `glmq compress --decompress` first"
    )


def test_integers_are_in_memory_only_while_they_are_placed(half_seed: Path) -> None:
    with Checkpoint.open(half_seed) as checkpoint:
        model = open_model(checkpoint, read_config(half_seed))
        linear = model.module(O)
        with placed(model, LAYER):
            assert linear.linear.weight.shape == (192, 192)
        with pytest.raises(AssertionError, match=f"{O} is not placed"):
            assert linear.linear
