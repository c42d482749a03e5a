"""Answers of a streamed checkpoint against those of transformers' own generation."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from glmq.checkpoint.linears import integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import read_config
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT
from glmq.records import BlockDone
from glmq.verification.answering import Answering
from glmq.verification.behaviour import generate, whole_model

TOKENS = 24
ENOUGH = 2**30


@pytest.fixture(scope="module")
def question() -> ModelInputs:
    preprocessor = Preprocessor(TINY_CHECKPOINT, read_config(TINY_CHECKPOINT), max_pixels=None, trust_remote_code=False)
    with Image.open(TINY_CASES / "images" / "000.png") as image:
        return preprocessor.encode(image, "Please describe this picture in detail.", None)


def answer(folder: Path, question: ModelInputs, memory_bytes: int, max_tokens: int = TOKENS) -> list[int]:
    with (
        Checkpoint.open(folder) as source,
        Answering(source, read_config(folder), memory_bytes=memory_bytes) as model,
    ):
        return [step for step in model.steps(question, max_tokens) if isinstance(step, int)]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["half", "half_seed"])
def test_the_answer_is_the_whole_models_however_much_stays_in_memory(
    folder: str, question: ModelInputs, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    with whole_model(path) as model:
        wanted = generate(model, question, TOKENS)
    assert len(wanted) > 10
    ends = read_config(path).eos_token_ids
    for memory_bytes in (ENOUGH, 2_000_000, 0):
        made = answer(path, question, memory_bytes)
        assert [token for token in made if token not in ends] == wanted
        assert made[-1] in ends or len(made) == TOKENS
    assert answer(path, question, ENOUGH, 1) == wanted[:1]


def test_the_plan_counts_what_a_token_runs_through(half: Path, half_seed: Path) -> None:
    plans = []
    for folder, memory_bytes in ((half, ENOUGH), (half, 0), (half_seed, ENOUGH)):
        with (
            Checkpoint.open(folder) as source,
            Answering(source, read_config(folder), memory_bytes=memory_bytes) as model,
        ):
            plans.append(model.plan)
    kept, streamed, quantized = plans
    with Checkpoint.open(half) as source:
        floats = sum(
            4 * info.nbytes // 2
            for name, info in source.items()
            if name.startswith(("model.language_model.layers.", "lm_head."))
        )
    assert (kept.token_bytes, kept.kept_bytes) == (floats, floats)
    assert (streamed.token_bytes, streamed.kept_bytes) == (floats, 0)
    with Checkpoint.open(half_seed) as source:
        integers = sum(source[f"{name}.weight"].nbytes for name in integer_linears(source))
    assert integers > 0
    # Integers come without the linears' biases, and norms with one: some vectors beside matrices.
    assert quantized.token_bytes == pytest.approx(floats - 3 * integers, rel=0.01)
    assert min(plan.token_seconds for plan in plans) > 0


def test_a_second_question_about_a_picture_does_not_look_at_it_again(half: Path, question: ModelInputs) -> None:
    with Checkpoint.open(half) as source, Answering(source, read_config(half), memory_bytes=ENOUGH) as model:
        first, second = (list(model.steps(question, 4)) for _ in range(2))
        other = ModelInputs(
            question.ids,
            question.answer_start,
            torch.zeros_like(question.pixel_values),
            question.grid,
            question.image_token_id,
        )
        assert model.prompt_blocks(other) == 6
    names = [step.name for step in first if isinstance(step, BlockDone)]
    assert names == [
        *(f"model.visual.blocks.{i}" for i in range(3)),
        *(f"model.language_model.layers.{i}" for i in range(3)),
    ]
    assert [step.name for step in second if isinstance(step, BlockDone)] == names[3:]
    assert [step for step in first if isinstance(step, int)] == [step for step in second if isinstance(step, int)]
