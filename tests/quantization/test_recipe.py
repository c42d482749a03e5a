from dataclasses import replace
from pathlib import Path

import pytest

from glmq.errors import UsageError
from glmq.model.config import ModelConfig, read_config
from glmq.quantization.options import Options
from glmq.quantization.plan import count_matches, plan_groups
from glmq.quantization.recipe import Recipe, make_recipe
from glmq.quantization.rules import LayerRule
from glmq.quantization.targets import Target
from glmq.spec import ActRange, FloatDtype, Form, Method, QuantType, Smoothing, StepRule

FP16 = {"torch_dtype": "fp16"}
LOWBIT = FP16 | {"w_bit": 4, "is_lowbit": True}
SPARSE = FP16 | {"co_sparse": True}
DYNAMIC = {"is_dynamic": True}
W4A8 = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}

LAYER = "model.language_model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")


def recipe(**options: object) -> Recipe:
    return make_recipe(Options(**options))


def refusal(**options: object) -> str:
    with pytest.raises(UsageError) as caught:
        recipe(**options)
    return str(caught.value)


@pytest.fixture(scope="module")
def config(tiny: Path) -> ModelConfig:
    return read_config(tiny)


@pytest.mark.parametrize(
    ("options", "quant_type", "rule"),
    [
        ({}, QuantType.W8A8, StepRule.ROW_MAX),
        (FP16, QuantType.W8A8, StepRule.ROW_MAX),
        (DYNAMIC, QuantType.W8A8_DYNAMIC, StepRule.ROW_MAX),
        (FP16 | DYNAMIC, QuantType.W8A8_DYNAMIC, StepRule.ROW_MAX),
        (LOWBIT, QuantType.W8A8S, StepRule.FRACTION),
        (LOWBIT | {"use_sigma": True}, QuantType.W8A8S, StepRule.SIGMA),
        (LOWBIT | {"use_sigma": True, "sigma_factor": 1.0}, QuantType.W8A8S, StepRule.SIGMA),
        (LOWBIT | {"fraction": 0.1}, QuantType.W8A8S, StepRule.FRACTION),
        (LOWBIT | {"open_outlier": False}, QuantType.W8A8S, StepRule.FRACTION),
        (SPARSE, QuantType.W8A8S, StepRule.TENSOR_FRACTION),
        (SPARSE | {"w_bit": 4}, QuantType.W8A8S, StepRule.TENSOR_FRACTION),
        (SPARSE | {"fraction": 0.05}, QuantType.W8A8S, StepRule.TENSOR_FRACTION),
        (W4A8, QuantType.W4A8_DYNAMIC, StepRule.ROW_MAX),
        (W4A8 | FP16, QuantType.W4A8_DYNAMIC, StepRule.ROW_MAX),
        (W4A8 | {"open_outlier": False}, QuantType.W4A8_DYNAMIC, StepRule.ROW_MAX),
        (W4A8 | {"group_size": 256}, QuantType.W4A8_DYNAMIC, StepRule.ROW_MAX),
        (LOWBIT | {"mindie_format": True}, QuantType.W8A8S, StepRule.FRACTION),
    ],
)
def test_the_modes_of_the_vendors_tool(options: dict[str, object], quant_type: QuantType, rule: StepRule) -> None:
    made = recipe(**options)
    assert made.quant_type is quant_type
    weight = made.scheme.weight
    assert (weight.quant_type, weight.step_rule) == (quant_type, rule)
    given = Options(**options)
    assert (weight.fraction, weight.sigma_factor, weight.keep_outliers) == (
        given.fraction,
        given.sigma_factor,
        given.open_outlier,
    )
    assert made.dtype is (FloatDtype.FP16 if given.torch_dtype == "fp16" else FloatDtype.BF16)
    assert (made.form is Form.MINDIE) is given.mindie_format
    assert weight.group_size == (given.group_size if quant_type is QuantType.W4A8_DYNAMIC else 0)


@pytest.mark.parametrize("group_size", [64, 128, 256, 512])
def test_every_group_size_of_the_vendors_tool_is_taken(group_size: int) -> None:
    assert recipe(**W4A8, group_size=group_size).scheme.weight.group_size == group_size


@pytest.mark.parametrize("model", [{}, DYNAMIC, {"a_bit": 16}], ids=["W8A8", "W8A8_DYNAMIC", "W8A16"])
def test_a_group_size_is_that_of_linears_which_a_rule_gives_groups(model: dict[str, object]) -> None:
    made = recipe(**model, layer=("*.o_proj=W4A8_DYNAMIC",), group_size=256)
    assert made.scheme.weight.group_size == 0
    assert made.scheme_of(QuantType.W4A8_DYNAMIC).weight.group_size == 256
    assert refusal(**model, layer=("*.o_proj=W4A8_DYNAMIC",), group_size=32) == (
        "--group_size 32: one of 64, 128, 256, 512 is needed"
    )


def test_an_option_has_an_effect_where_a_rule_gives_a_type_that_it_changes() -> None:
    static = {"is_dynamic": True, "layer": ("*.o_proj=W8A8",)}
    assert recipe(**static, act_method=1).scheme_of(QuantType.W8A8).act_range is ActRange.MINMAX
    assert recipe(**static, bias_correction=True).scheme_of(QuantType.W8A8).bias_correction
    assert recipe(**static, channel_shift=True).scheme_of(QuantType.W8A8).channel_shift
    four_bits: dict[str, object] = {"layer": ("*.o_proj=W4A8_DYNAMIC",)}
    assert recipe(**four_bits, propagation=0.5).propagation == 0.5
    assert not recipe(**four_bits, open_outlier=False).scheme_of(QuantType.W4A8_DYNAMIC).weight.keep_outliers
    floats = {"is_dynamic": True, "layer": ("*.o_proj=FLOAT",)}
    assert refusal(**floats, act_method=1) == (
        "--act_method 1 has no effect with --is_dynamic True: ranges are found at run time; drop it"
    )
    assert refusal(**floats, propagation=0.5) == (
        "--propagation 0.5 in W8A8_DYNAMIC: it is for W8A8S, W4A8_DYNAMIC and W4A16; drop it"
    )


def test_the_group_size_of_a_rule_is_one_that_its_type_takes() -> None:
    packed: dict[str, object] = {"format": "compressed-tensors", "layer": ("*.o_proj=W4A16",)}
    assert recipe(**packed, group_size=32).scheme_of(QuantType.W4A16).weight.group_size == 32
    assert refusal(**packed, group_size=256) == "--group_size 256: one of 32, 64, 128 is needed"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_activation_range_of_the_vendors_tool_is_taken(number: int) -> None:
    assert recipe(act_method=number).scheme.act_range is ActRange(number)
    assert ActRange(1) is ActRange.MINMAX
    assert ActRange(2) is ActRange.HISTOGRAM
    assert ActRange(3) is ActRange.MIXED


@pytest.mark.parametrize(
    ("options", "smoothing"),
    [
        ({}, Smoothing.M2),
        ({"anti_method": "none"}, Smoothing.NONE),
        ({"do_smooth": True}, Smoothing.SMOOTHQUANT),
    ],
)
def test_outlier_suppression_follows_its_option(options: dict[str, object], smoothing: Smoothing) -> None:
    assert recipe(**options).scheme.smoothing is smoothing


def test_bias_correction_is_off_unless_asked_for() -> None:
    assert recipe(**LOWBIT, bias_correction=True).scheme.bias_correction
    assert not recipe(**LOWBIT).scheme.bias_correction


@pytest.mark.parametrize("method", list(Method))
def test_every_method_of_rounding_is_taken_by_its_name(method: Method) -> None:
    assert recipe(method=method.value).scheme.weight.method is method


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"w_bit": 2}, "--w_bit 2: 4 or 8 is needed"),
        ({"w_bit": 16}, "--w_bit 16: 4 or 8 is needed"),
        ({"a_bit": 4}, "--a_bit 4: 8, or 16 for float activations, is needed"),
        ({"act_method": 0}, "--act_method 0: 1 (min-max), 2 (histogram) or 3 (the better of both) is needed"),
        ({"act_method": 4}, "--act_method 4: 1 (min-max), 2 (histogram) or 3 (the better of both) is needed"),
        (LOWBIT | {"fraction": 0.009}, "--fraction 0.009: a number from 0.01 to 0.1 is needed"),
        (LOWBIT | {"fraction": 0.11}, "--fraction 0.11: a number from 0.01 to 0.1 is needed"),
        (LOWBIT | {"fraction": float("nan")}, "--fraction nan: a number from 0.01 to 0.1 is needed"),
        (LOWBIT | {"sigma_factor": 0.9}, "--sigma_factor 0.9: a number from 1.0 to 3.0 is needed"),
        (LOWBIT | {"sigma_factor": 3.1}, "--sigma_factor 3.1: a number from 1.0 to 3.0 is needed"),
        (
            {"allocate": "error"},
            "--allocate error has no effect here: no bits are dealt out to sparse linears; drop it",
        ),
        (
            LOWBIT | {"allocate": "error", "method": "plain"},
            "--allocate error has no effect here: no bits are dealt out to sparse linears; drop it",
        ),
        (
            DYNAMIC | {"channel_shift": True},
            "--channel-shift: engines ignore norms' biases before W8A8_DYNAMIC linears; drop it",
        ),
        (
            {"channel_shift": True, "format": "compressed-tensors"},
            "--channel-shift with --format compressed-tensors: its norms have no bias; drop one of them",
        ),
        (W4A8 | {"group_size": 32}, "--group_size 32: one of 64, 128, 256, 512 is needed"),
        (
            W4A8 | {"group_size": 512, "format": "mindie"},
            "--format mindie with --group_size 512: one of 64, 128, 256 is needed",
        ),
        (
            LOWBIT | {"co_sparse": True},
            "--co_sparse True with --is_lowbit True: they are two algorithms for the same type; choose one",
        ),
        (
            SPARSE | DYNAMIC,
            "--co_sparse True with --is_dynamic True: sparse types have static activations; drop one of them",
        ),
        (
            FP16 | {"w_bit": 4},
            "--w_bit 4 needs an algorithm: --is_lowbit True (W8A8S), --co_sparse True (W8A8S), "
            "or --is_lowbit True --is_dynamic True (W4A8_DYNAMIC)",
        ),
        (
            DYNAMIC | {"w_bit": 4},
            "--w_bit 4 needs an algorithm: --is_lowbit True (W8A8S), --co_sparse True (W8A8S), "
            "or --is_lowbit True --is_dynamic True (W4A8_DYNAMIC)",
        ),
        (
            {"is_lowbit": True},
            "--is_lowbit True with --w_bit 8: the low-bit sparse algorithm makes 4-bit weights; pass --w_bit 4",
        ),
        (
            LOWBIT | {"torch_dtype": "bf16"},
            "W8A8S with bfloat16 float weights (--torch_dtype is bf16 unless given): no engine loads it, "
            "the 300I Duo has no bfloat16; pass --torch_dtype fp16",
        ),
        (
            {"co_sparse": True},
            "W8A8S with bfloat16 float weights (--torch_dtype is bf16 unless given): no engine loads it, "
            "the 300I Duo has no bfloat16; pass --torch_dtype fp16",
        ),
    ],
)
def test_wrong_and_contradicting_options_are_refused(options: dict[str, object], sentence: str) -> None:
    assert refusal(**options) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_sigma": True}, "--use_sigma True has no effect here: W8A8 splits none off; drop it"),
        (W4A8 | {"use_sigma": True}, "--use_sigma True has no effect here: W4A8_DYNAMIC splits none off; drop it"),
        (
            SPARSE | {"use_sigma": True},
            "--use_sigma True has no effect here: --co_sparse True chooses outliers by --fraction; drop it",
        ),
        (
            LOWBIT | {"sigma_factor": 2.0},
            "--sigma_factor 2.0 has no effect without --use_sigma True; drop it or add that",
        ),
        ({"fraction": 0.02}, "--fraction 0.02 has no effect here: W8A8 splits no outliers off; drop it"),
        (
            LOWBIT | {"fraction": 0.02, "use_sigma": True},
            "--fraction 0.02 has no effect here: --use_sigma True chooses outliers by sigma; drop it",
        ),
        (
            LOWBIT | {"open_outlier": False, "use_sigma": True, "sigma_factor": 2.0},
            "--use_sigma True has no effect with --open_outlier False, which splits no outliers off; drop one of them",
        ),
        (
            LOWBIT | {"open_outlier": False, "fraction": 0.05},
            "--fraction 0.05 has no effect with --open_outlier False, which splits no outliers off; drop one of them",
        ),
        ({"open_outlier": False}, "--open_outlier False has no effect here: W8A8 splits no outliers off; drop it"),
        (
            DYNAMIC | {"open_outlier": False},
            "--open_outlier False has no effect here: W8A8_DYNAMIC splits no outliers off; drop it",
        ),
        (
            DYNAMIC | {"act_method": 1},
            "--act_method 1 has no effect with --is_dynamic True: ranges are found at run time; drop it",
        ),
        (
            {"target_bits": 7.0, "method": "plain"},
            "--target-bits with --method plain has no effect in W8A8: nearest integers keep the finest step there; "
            "drop one of them",
        ),
        (
            DYNAMIC | {"bias_correction": True},
            "--bias-correction has no effect in W8A8_DYNAMIC: its linears have no quant_bias to correct; drop it",
        ),
        (
            {"bias_correction": True, "method": "reference"},
            "--bias-correction with --method reference: the vendor's tool corrects none; drop one of them",
        ),
        (
            {"group_size": 128},
            "--group_size 128 has no effect in W8A8: only W4A8_DYNAMIC "
            "(--w_bit 4 --is_lowbit True --is_dynamic True) has groups, and with --format compressed-tensors W8A16 and W4A16 "
            "(--a_bit 16); drop it",
        ),
        (
            LOWBIT | {"group_size": 256},
            "--group_size 256 has no effect in W8A8S: only W4A8_DYNAMIC "
            "(--w_bit 4 --is_lowbit True --is_dynamic True) has groups, and with --format compressed-tensors W8A16 and W4A16 "
            "(--a_bit 16); drop it",
        ),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], sentence: str) -> None:
    assert refusal(**options) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            LOWBIT | {"target": "mindie-800i-a2"},
            "--target mindie-800i-a2 does not load W8A8S: sparse types run on the 300I Duo only; "
            "it loads W8A8, W8A8_DYNAMIC",
        ),
        (
            FP16 | DYNAMIC | {"target": "vllm-ascend"},
            "--target vllm-ascend loads W8A8_DYNAMIC in bfloat16 only, not float16, its kernel takes no float16 scales "
            "(vLLM-Ascend's issue 7443); pass --torch_dtype bf16",
        ),
        (
            {"a_bit": 16, "target": "vllm-ascend"},
            "--target vllm-ascend loads W8A16 in float16 only, not bfloat16, its kernel takes no bfloat16 bias, which q_proj, "
            "k_proj and v_proj have (its issue 7039); pass --torch_dtype fp16",
        ),
        (
            {"layer": ("*.o_proj=W8A16",), "target": "vllm-ascend"},
            "--target vllm-ascend loads W8A16 in float16 only, not bfloat16, its kernel takes no bfloat16 bias, which q_proj, "
            "k_proj and v_proj have (its issue 7039); pass --torch_dtype fp16",
        ),
        (
            {"format": "compressed-tensors", "target": "vllm-ascend"},
            "--format compressed-tensors with --target vllm-ascend: vLLM-Ascend reads W8A8_DYNAMIC alone in it, not W8A8; "
            "drop one of them",
        ),
        (
            FP16 | DYNAMIC | {"target": "mindie-300i-duo"},
            "--target mindie-300i-duo does not load W8A8_DYNAMIC: the 300I Duo recipe is W8A8S, then W8A8SC; "
            "it loads W8A8S, W8A8",
        ),
        (
            W4A8 | {"target": "mindie-800i-a2"},
            "--target mindie-800i-a2 does not load W4A8_DYNAMIC: MindIE's GLM-4.1V has no W4A8_DYNAMIC loader; "
            "it loads W8A8, W8A8_DYNAMIC",
        ),
        (
            {"target": "mindie-300i-duo"},
            "--target mindie-300i-duo loads W8A8 in float16 only, not bfloat16; pass --torch_dtype fp16",
        ),
        (
            {"target": "vllm-ascend", "mindie_format": True},
            "--mindie_format True with --target vllm-ascend: it reads the ascendV1 layout alone; drop --mindie_format",
        ),
    ],
)
def test_what_the_target_does_not_load_is_refused_with_its_reason(options: dict[str, object], sentence: str) -> None:
    assert refusal(**options) == sentence


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        ("*.mlp.down_proj=W8A8", "model.visual.blocks.0.mlp.down_proj"),
        ("lm_head=W8A8", "lm_head"),
        ("*=W8A8", "model.visual.blocks.0.attn.qkv"),
    ],
)
def test_a_target_that_computes_the_vision_tower_and_lm_head_in_float_refuses_their_integers(
    config: ModelConfig, layer: str, first: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_groups(recipe(layer=(layer,), target="mindie-800i-a2"), config)
    assert str(caught.value) == (
        f"--target mindie-800i-a2: MindIE reads the vision tower and lm_head in float alone, and {first} would be W8A8; "
        "narrow the pattern to the text layers, like '*.layers.*.down_proj'"
    )
    plan_groups(recipe(layer=(layer,), target="vllm-ascend"), config)
    plan_groups(recipe(layer=("*.layers.*.down_proj=W8A8",), target="mindie-800i-a2"), config)


def test_a_target_that_drops_biases_takes_a_type_that_some_releases_load_for_linears_without(
    config: ModelConfig,
) -> None:
    asked = recipe(**W4A8, target="vllm-ascend")
    with pytest.raises(UsageError) as caught:
        plan_groups(asked, config)
    assert str(caught.value) == (
        "--target vllm-ascend: vLLM-Ascend runs W4A8_DYNAMIC linears without their bias, which "
        "model.language_model.layers.0.self_attn.q_proj has; give those another type: "
        "--layer '*.self_attn.[qkv]_proj=W8A8_DYNAMIC'"
    )
    layer = ("*.self_attn.[qkv]_proj=W8A8_DYNAMIC",)
    plans = plan_groups(recipe(**W4A8, target="vllm-ascend", layer=layer), config)
    first = "model.language_model.layers.0."
    assert plans[f"{first}self_attn.q_proj"].quant_type is QuantType.W8A8_DYNAMIC
    assert plans[f"{first}mlp.gate_up_proj"].quant_type is QuantType.W4A8_DYNAMIC


def test_by_default_only_attention_and_gate_up_of_the_text_layers_are_quantized(config: ModelConfig) -> None:
    plans = plan_groups(recipe(), config)
    quantized = [site for site, plan in plans.items() if plan.quant_type is not QuantType.FLOAT]
    assert quantized == [
        f"model.language_model.layers.{i}.{end}"
        for i in range(6)
        for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    ]
    assert {plans[site].quant_type for site in quantized} == {QuantType.W8A8}
    assert len(plans) == 3 * 4 + 3 + 6 * 4 + 1


def test_a_pattern_keeps_what_it_matches_float(config: ModelConfig) -> None:
    plans = plan_groups(recipe(keep_float=("*.layers.0.*", "*.o_proj")), config)
    quantized = [site for site, plan in plans.items() if plan.quant_type is not QuantType.FLOAT]
    assert quantized == [
        f"model.language_model.layers.{i}.{end}"
        for i in range(1, 6)
        for end in ("self_attn.q_proj", "mlp.gate_up_proj")
    ]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*.o_proj", 6), ("*.layers.[12].*", 12), ("*.layers.?.mlp.*", 12), ("lm_head", 1), ("*.O_PROJ", 0), ("*", 56)],
)
def test_patterns_match_whole_names_as_a_shell_does(pattern: str, count: int, config: ModelConfig) -> None:
    assert count_matches(pattern, config) == count


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_like_it(config: ModelConfig) -> None:
    with pytest.raises(UsageError) as caught:
        plan_groups(recipe(keep_float=("*.o_proj", "model.layers.3.self_attn.o_proj")), config)
    assert str(caught.value) == (
        "--keep-float 'model.layers.3.self_attn.o_proj' matches none of the model's 56 linears; "
        "their names look like 'model.language_model.layers.3.self_attn.o_proj'"
    )


@pytest.mark.parametrize("pattern", ["*.k_proj", "*.layers.0.self_attn.[qk]_proj"])
def test_a_pattern_that_splits_the_linears_of_one_input_is_refused(pattern: str, config: ModelConfig) -> None:
    with pytest.raises(UsageError) as caught:
        plan_groups(recipe(keep_float=(pattern,)), config)
    kept, left = (K, Q) if pattern == "*.k_proj" else (Q, V)
    assert str(caught.value) == (
        f"--keep-float {pattern!r} makes {kept} FLOAT but leaves {left} W8A8: the engines load the "
        "linears of one input as one tensor, so they must be of one type; let the pattern match all of them"
    )


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"keep_float": ("*.self_attn.*", "*.gate_up_proj")}, "--keep-float leaves"),
        ({"layer": ("*.self_attn.*=FLOAT", "*.gate_up_proj=FLOAT")}, "--layer leaves"),
        ({"keep_float": ("*.self_attn.*",), "layer": ("*.gate_up_proj=FLOAT",)}, "--keep-float and --layer leave"),
    ],
)
def test_patterns_that_leave_nothing_to_quantize_are_refused(
    patterns: dict[str, tuple[str, ...]], said: str, config: ModelConfig
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_groups(recipe(**patterns), config)
    assert str(caught.value) == f"{said} no linear to quantize; narrow the patterns"


def test_a_rule_gives_a_default_float_linear_a_type(config: ModelConfig) -> None:
    plans = plan_groups(recipe(layer=("*.mlp.down_proj=w8a8", "*.layers.2.*=FLOAT")), config)
    types = [plans[f"model.language_model.layers.{i}.mlp.down_proj"].quant_type for i in range(4)]
    assert types == [QuantType.W8A8, QuantType.W8A8, QuantType.FLOAT, QuantType.W8A8]


def test_the_last_rule_that_matches_decides_and_keep_float_comes_last(config: ModelConfig) -> None:
    made = recipe(layer=("*.o_proj=FLOAT", "*.layers.1.*=W8A8_DYNAMIC"), keep_float=("*.layers.1.mlp.*",))
    plans = plan_groups(made, config)
    types = {
        end: plans[f"model.language_model.layers.1.{end}"].quant_type for end in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert types == {"self_attn.o_proj": QuantType.W8A8_DYNAMIC, "mlp.down_proj": QuantType.FLOAT}
    assert plans["model.language_model.layers.0.self_attn.o_proj"].quant_type is QuantType.FLOAT
    assert made.rule_of("model.language_model.layers.1.mlp.gate_up_proj") == LayerRule(
        "*.layers.1.mlp.*", QuantType.FLOAT, "--keep-float '*.layers.1.mlp.*'"
    )
    assert made.rule_of(Q) is None


def test_linears_of_another_type_are_scaled_by_their_row_maximum() -> None:
    made = recipe(layer=("*.o_proj=W4A8_DYNAMIC",), act_method=1)
    other = made.scheme_of(QuantType.W4A8_DYNAMIC)
    assert other == replace(
        made.scheme,
        weight=replace(
            made.scheme.weight, quant_type=QuantType.W4A8_DYNAMIC, step_rule=StepRule.ROW_MAX, group_size=64
        ),
    )
    assert made.scheme_of(QuantType.W8A8) is made.scheme


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": ("*.o_proj",)}, "--layer '*.o_proj': PATTERN=TYPE is needed, like '*.layers.*.down_proj=W8A8'"),
        ({"layer": ("=W8A8",)}, "--layer '=W8A8': PATTERN=TYPE is needed, like '*.layers.*.down_proj=W8A8'"),
        (
            {"layer": ("*.o_proj=int8",)},
            "--layer '*.o_proj=int8': unknown type 'int8'; "
            "known are FLOAT, W8A8, W8A8S, W8A8_DYNAMIC, W4A8_DYNAMIC, W8A16, W4A16",
        ),
        (
            {"layer": ("*.o_proj=W8A8S",)},
            "--layer '*.o_proj=W8A8S' in a W8A8 model: sparse linears cannot be mixed with other types, "
            "their engine reads one type; use FLOAT or the model's own type",
        ),
        (
            LOWBIT | {"layer": ("*.o_proj=W8A8",)},
            "--layer '*.o_proj=W8A8' in a W8A8S model: sparse linears cannot be mixed with other types, "
            "their engine reads one type; use FLOAT or the model's own type",
        ),
        (
            {"layer": ("*.o_proj=W8A8_DYNAMIC",), "target": "mindie-800i-a2"},
            "--layer '*.o_proj=W8A8_DYNAMIC' with --target mindie-800i-a2: MindIE reads one quantization type per model, "
            "this one is W8A8; use FLOAT, or another target",
        ),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_followed_is_refused(options: dict[str, object], sentence: str) -> None:
    assert refusal(**options) == sentence


def test_settings_tell_numbers_apart_that_differ_in_the_last_digit() -> None:
    """A resumed run goes on only with the settings that it began with, whatever of them fits a line."""
    numbers = (0.012345678, 0.0123456785)
    first, second = (
        recipe(**FP16, w_bit=4, is_lowbit=True, fraction=number).settings()["--fraction"] for number in numbers
    )
    assert (first, second) == ("0.012345678", "0.0123456785")
    assert recipe(**FP16, w_bit=4, is_lowbit=True, use_sigma=True, sigma_factor=2.0).settings()["--sigma_factor"] == "2"


def test_a_changed_recipe_is_checked_as_well() -> None:
    with pytest.raises(UsageError) as caught:
        replace(Recipe.w8a8s(), form=Form.COMPRESSED_TENSORS)
    assert str(caught.value) == "W8A8S is not written in the compressed-tensors form; pass --format ascendv1 or mindie"
    with pytest.raises(UsageError, match="--target mindie-300i-duo"):
        replace(Recipe.w8a8s(dtype="fp16"), target=Target.MINDIE_300I_DUO, dtype=FloatDtype.BF16)
