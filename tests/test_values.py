"""What the library is told to do and cannot is refused as on the command line, before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import glmq
from glmq.engines import Engine
from glmq.errors import UsageError
from glmq.jobs.restore import restore
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import FloatDtype

MISSING = "no such folder"
TARGETS = "mindie-300i-duo, mindie-800i-a2, vllm-ascend, generic"
REFUSED: dict[str, Callable[[], object]] = {
    "--limit 0: at least 1 is needed": lambda: glmq.CalibrationOptions(limit=0),
    "--limit '3': a whole number is needed": lambda: glmq.CalibrationOptions(limit="3"),  # type: ignore[arg-type]
    "--limit 2.5: a whole number is needed": lambda: glmq.CaseOptions(limit=2.5),  # type: ignore[arg-type]
    "--generate 0: at least 1 is needed": lambda: glmq.CalibrationOptions(generate=0),
    "--max-pixels 1: at least 784 is needed": lambda: glmq.CalibrationOptions(max_pixels=1),
    "--max-pixels 783: at least 784 is needed": lambda: glmq.CaseOptions(max_pixels=783),
    "--device-type cuda: one of cpu, npu is needed": lambda: glmq.CalibrationOptions(device_type="cuda"),
    "--compute-dtype float16: one of auto, fp32, bf16, fp16 is needed": lambda: glmq.CalibrationOptions(
        compute_dtype="float16"
    ),
    "images with options.images: they name the same folder; give one of them": lambda: glmq.calibrate(
        MISSING, images="a", out="b", options=glmq.CalibrationOptions(images=Path("c"))
    ),
    "--sort size: one of name, bytes, type, role is needed": lambda: glmq.Choice(sort="size"),  # type: ignore[arg-type]
    "--limit -1: at least 1 is needed": lambda: glmq.Choice(limit=-1),
    "--layout ascend: one of mindie, vllm-ascend, sglang is needed": lambda: glmq.CompressionOptions(
        layout="ascend"  # type: ignore[arg-type]
    ),
    "--jobs 0: at least 1 is needed": lambda: glmq.CompressionOptions(jobs=0),
    "--jobs -1: at least 1 is needed": lambda: restore(MISSING, out="b", jobs=-1),
    "--tp 0: at least 1 is needed": lambda: glmq.compress(MISSING, out="b", tp=0),
    "--codec zip: one of auto, portable, ascend is needed": lambda: glmq.compress(
        MISSING,
        out="b",
        codec="zip",  # type: ignore[call-overload]
    ),
    "engines mindy: one of mindie, vllm-ascend, sglang is needed": lambda: glmq.verify(
        MISSING,
        engines=["mindy"],  # type: ignore[list-item]
    ),
    "chip 310: one of 800I A2, 300I Duo is needed": lambda: glmq.verify(MISSING, chip="310"),  # type: ignore[arg-type]
    "--max-kl -1: at least 0.0 is needed": lambda: glmq.Limits(max_kl=-1),
    "--max-kl nan: at least 0.0 is needed": lambda: glmq.Limits(max_kl=float("nan")),
    "--min-top1 5: a number from 0.0 to 1.0 is needed": lambda: glmq.Limits(min_top1=5),
    "--fallback-topk -1: at least 0 is needed": lambda: glmq.Variant("a", glmq.Recipe.w8a8(), fallback_topk=-1),
    "--max-error -0.5: at least 0.0 is needed": lambda: glmq.Variant("a", glmq.Recipe.w8a8(), max_error=-0.5),
    "--max-pixels 3: at least 784 is needed": lambda: glmq.ask(MISSING, max_pixels=3),
    "--target-bits 9: a number from 0.5 to 8 is needed": lambda: glmq.Recipe.w8a8s(target_bits=9),
    "--target-ratio 2: a number from 0.0625 to 1 is needed": lambda: make_recipe(Options(target_ratio=2)),
    "--fraction 0.5: a number from 0.01 to 0.1 is needed": lambda: glmq.Recipe.w8a8s(fraction=0.5),
    "--torch_dtype fp32: one of bf16, fp16, float16, bfloat16 is needed": lambda: glmq.Recipe.w8a8(dtype="fp32"),
    "--anti_method m4: one of m2, none is needed": lambda: make_recipe(Options(anti_method="m4")),
    "--method gptq: one of plain, compensated, reference is needed": lambda: make_recipe(Options(method="gptq")),
    "--allocate bits: one of answer, error is needed": lambda: make_recipe(Options(allocate="bits")),
    f"--target npu: one of {TARGETS} is needed": lambda: make_recipe(Options(target="npu")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_value_that_is_none_is_refused(sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        REFUSED[sentence]()
    assert str(caught.value) == sentence
    assert not list(tmp_path.iterdir())


def test_an_answer_has_at_least_one_token(tiny: Path) -> None:
    with pytest.raises(UsageError) as caught:
        glmq.ask(tiny, max_new_tokens=0)
    assert str(caught.value) == "--max-new-tokens 0: at least 1 is needed"


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "FP16"), ("float16", "FP16")],
)
def test_a_dtype_may_have_the_name_that_torch_gives_it(word: str, dtype: str) -> None:
    assert glmq.Recipe.w8a8(dtype=word).dtype is FloatDtype[dtype]
    assert glmq.Recipe.w8a8(dtype=word) == glmq.Recipe.w8a8(dtype=FloatDtype[dtype].value)


def test_paths_may_be_text_and_engines_may_be_words() -> None:
    given = glmq.CalibrationOptions(images="a", samples_file="b", work_dir="c", chat_template="d")  # type: ignore[arg-type]
    assert given == glmq.CalibrationOptions(
        images=Path("a"), samples_file=Path("b"), work_dir=Path("c"), chat_template=Path("d")
    )
    assert glmq.CaseOptions(cases="a") == glmq.CaseOptions(cases=Path("a"))  # type: ignore[arg-type]
    layout = glmq.CompressionOptions(layout="vllm-ascend", split_dir="a")  # type: ignore[arg-type]
    assert layout == glmq.CompressionOptions(layout=Engine.VLLM_ASCEND, split_dir=Path("a"))
    assert glmq.SweepOptions(keep="a").keep == Path("a")  # type: ignore[arg-type]
