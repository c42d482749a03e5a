from dataclasses import replace
from pathlib import Path

import pytest

from glmq.calibration.convergence import assess
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import (
    describe_convergence,
    describe_kernel,
    describe_large_weights,
    describe_path,
    describe_releases,
)
from glmq.quantization.recipe import Recipe
from glmq.spec import Form


def test_settled_statistics_are_told_in_two_lines(tiny_stats: Path) -> None:
    lines = list(describe_convergence(assess(Statistics.open(tiny_stats).settled(), samples=24), unanswered=0))
    assert lines[0].startswith("settled: against half of the samples, ranges changed by 5%, mean squares 8%, corr")
    assert lines[1].startswith("  changed most: layers.")
    assert len(lines) == 2


def test_one_sample_alone_is_told_to_show_nothing() -> None:
    assert list(describe_convergence(None, unanswered=0)) == [
        "warning: one sample alone does not show whether the statistics have settled; give more images"
    ]


def test_weights_that_float16_cannot_hold_are_told_with_the_reason_why_they_may_stay() -> None:
    beyond = {"a.q_proj.weight", "a.k_proj.weight", "lm_head.weight"}
    assert describe_large_weights(["a.q_proj", "a.k_proj", "a.o_proj"], beyond) == [
        "note: a.q_proj.weight and 1 more goes beyond 65504, where float16 ends: integers and their float32 scales hold it"
    ]
    assert describe_large_weights(["a.o_proj"], beyond) == []


def test_rounding_that_was_not_compiled_is_told_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels, told in (
        (("avx2-fma",), []),
        ((), ["note: this glmq has no compiled rounding: torch does it, in 1.5 times the time; see glmq doctor"]),
    ):
        monkeypatch.setattr("glmq.numerics.gptq.KERNELS", kernels)
        assert describe_kernel() == told


def test_a_path_that_mindie_does_not_open_is_told_before_the_work() -> None:
    assert describe_path(Path("/data/w8a8"), Form.ASCEND_V1) == []
    assert describe_path(Path("/data/my model"), Form.COMPRESSED_TENSORS) == []
    for path in ("/data/my model", "/data/\u6a21\u578b"):
        assert describe_path(Path(path), Form.MINDIE) == [
            f"note: MindIE opens no path like {path}: letters, digits, _ . / - only; move the output for it"
        ]


def test_a_type_that_only_some_releases_load_is_said_with_each_release() -> None:
    assert describe_releases(Recipe.w4a8_dynamic()) == [
        "warning: W4A8_DYNAMIC of a dense linear depends on the release of vLLM-Ascend: 0.18 to 0.26: loaded, its "
        "activations are not quantized; main since September 2026: NotImplementedError"
    ]
    assert describe_releases(Recipe.w8a8_dynamic()) == []
    assert describe_releases(replace(Recipe.w4a8_dynamic(), form=Form.MINDIE)) == []
