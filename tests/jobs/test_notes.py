from pathlib import Path

import pytest

from glmq.calibration.convergence import assess
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import (
    describe_convergence,
    describe_kernel,
    describe_large_weights,
    describe_limits,
    describe_path,
)
from glmq.model.config import read_config
from glmq.quantization.options import Options
from glmq.quantization.plan import plan_groups
from glmq.quantization.recipe import make_recipe
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


RELEASES = (
    "warning: W4A8_DYNAMIC of a dense linear depends on the release of vLLM-Ascend: 0.18 to 0.26: loaded, its "
    "activations are not quantized; 0.27, 0.28 to 0.30: NotImplementedError"
)


def test_what_engines_do_not_run_is_said_before_the_work(small: Path) -> None:
    def said(**options: object) -> list[str]:
        asked = make_recipe(Options(**options))  # type: ignore[arg-type]
        return describe_limits(asked, plan_groups(asked, read_config(small)).values())

    four_bits = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
    assert said(**four_bits) == [
        RELEASES,
        "warning: vLLM-Ascend runs W4A8_DYNAMIC linears without their bias, which 6 of them have, "
        "model.language_model.layers.0.self_attn.q_proj first: its answers will be wrong; give those another type: "
        "--layer '*.self_attn.[qkv]_proj=W8A8_DYNAMIC'",
    ]
    without = ("*.self_attn.[qkv]_proj=W8A8_DYNAMIC",)
    assert said(**four_bits, layer=without) == [RELEASES]
    assert said(**four_bits, layer=without, group_size=256) == [
        RELEASES,
        "warning: vLLM-Ascend takes groups of more than 128 columns with VLLM_ASCEND_ENABLE_NZ=0 alone",
    ]
    assert said(**four_bits, format="mindie") == []
    assert said(a_bit=16) == [
        "warning: vLLM-Ascend runs W8A16 in float16 only, not in bfloat16: its kernel takes no bfloat16 bias, which q_proj, "
        "k_proj and v_proj have (its issue 7039)"
    ]
    assert said(a_bit=16, torch_dtype="fp16") == said() == said(is_dynamic=True) == []
    assert len(said(is_dynamic=True, torch_dtype="fp16")) == 2
    sparse = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
    assert said(**sparse) == []
    assert said(**sparse, target="vllm-ascend") == [
        "warning: vLLM-Ascend does not run GLM-4.1V on the Atlas 300I Duo, where its rotary kernel has no interleaved mode; "
        "MindIE does"
    ]
    assert said(**sparse, format="mindie") == [
        "warning: `glmq compress` takes the ascendV1 form alone; to compress, quantize without --mindie_format"
    ]
    assert said(layer=("lm_head=W8A8", "*.mlp.down_proj=W8A8")) == [
        "warning: MindIE reads the vision tower and lm_head in float alone, and 2 of their linears become integers, "
        "model.visual.blocks.0.mlp.down_proj first"
    ]
    mixed = ("*.o_proj=W8A8_DYNAMIC",)
    assert said(layer=mixed) == [
        "warning: MindIE reads one type per model, here W8A8, and 2 linears will be W8A8_DYNAMIC, "
        "model.language_model.layers.0.self_attn.o_proj first"
    ]
    assert said(layer=mixed, target="vllm-ascend") == said(is_dynamic=True, layer=("*.o_proj=W8A8",)) == []
    packed = {"format": "compressed-tensors"}
    assert said(**packed, layer=("lm_head=W8A8",)) == said(**packed, a_bit=16) == []
    assert len(said(**packed, is_dynamic=True, torch_dtype="fp16")) == 1
