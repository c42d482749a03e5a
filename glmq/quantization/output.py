"""The output of a quantization, laid out from headers alone: its tensors, files, bytes, and the small files beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmq.checkpoint.compressed_config import KEY, CompressedConfig, make_config
from glmq.checkpoint.description import ASCEND_V1_VERSION, Description, tensor_types, write_description
from glmq.checkpoint.header import FLOAT_CODES
from glmq.checkpoint.json_file import write_json, write_whole
from glmq.checkpoint.layout import ShardPlan, TensorSpec, plan_shards
from glmq.checkpoint.linears import linear_specs, norm_specs
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import MindieSettings, copy_side_files, edit_config
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.family import Area, LinearShape
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.spec import ASCEND_FORMS, FloatDtype, Form, QuantType, StepRule, assert_never


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Everything that is known before the first weight is read."""

    groups: Mapping[str, GroupPlan]
    """By site, in model order."""
    linears: Mapping[str, QuantType]
    """The linears that become integers."""
    shards: ShardPlan
    side_files: Mapping[str, bytes]
    """Small files that are not copied from the source as they are: name -> contents."""


@dataclass(frozen=True, slots=True)
class AreaBytes:
    """Bytes of one area of the model, float checkpoint against quantized one."""

    area: Area
    before: int
    after: int


def plan_output(
    source: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    groups: Mapping[str, GroupPlan],
    shard_bytes: int | None,
    side_files: Mapping[str, bytes],
) -> OutputPlan:
    """Lay out the output from the headers alone.

    Args:
        source: every tensor of the model, checked.
        config: its configuration.
        recipe: how to quantize.
        groups: what becomes of each input group.
        shard_bytes: upper size of a weight file; None: one file.
        side_files: those that are not copied as they are.

    Raises:
        UsageError: a width that the type cannot take.
    """
    types = {
        linear.name: plan.quant_type for plan in groups.values() if plan.is_quantized for linear in plan.group.linears
    }
    shapes = {linear.name: linear for plan in groups.values() for linear in plan.group.linears}
    norms = set(config.family.rms_norms(config))
    specs: list[TensorSpec] = []
    for name in source:
        base, _, suffix = name.rpartition(".")
        if base in types:
            if suffix == "weight":
                specs += _specs_of(shapes[base], types[base], recipe)
        elif base in norms:
            specs += norm_specs(base, source[name].shape[0], dtype=recipe.dtype, form=recipe.form)
        else:
            specs.append(TensorSpec(name, _float_code(source.dtype_read(name), recipe.dtype), source[name].shape))
    return OutputPlan(groups, types, plan_shards(specs, _stem(recipe), shard_bytes), side_files)


def _stem(recipe: Recipe) -> str:
    """The weight files' name without number and suffix: what the readers of the form look for."""
    match recipe.form:
        case Form.ASCEND_V1 | Form.MINDIE:
            stem = f"quant_model_weight_{recipe.quant_type.tag}"
        case Form.COMPRESSED_TENSORS:
            stem = "model"
        case other:
            assert_never(other)
    return stem


def _specs_of(shape: LinearShape, quant_type: QuantType, recipe: Recipe) -> Sequence[TensorSpec]:
    return linear_specs(
        shape.name,
        quant_type,
        (shape.rows, shape.cols),
        has_bias=shape.has_bias,
        dtype=recipe.dtype,
        group_size=recipe.scheme_of(quant_type).weight.group_size,
        form=recipe.form,
        row_parallel=shape.name.endswith(FAMILY.row_parallel),
    )


def _float_code(code: str, dtype: FloatDtype) -> str:
    return dtype.code if code in FLOAT_CODES else code


def bytes_by_area(source: Checkpoint, shards: ShardPlan) -> list[AreaBytes]:
    """Tensor bytes before and after, by area of the model."""
    before, after = dict.fromkeys(Area, 0), dict.fromkeys(Area, 0)
    for name in source:
        before[FAMILY.area(name)] += source.nbytes(name)
    for file in shards.files:
        for info in file.tensors:
            after[FAMILY.area(info.name)] += info.nbytes
    return [AreaBytes(area, before[area], after[area]) for area in Area]


def write_side_files(source: Checkpoint, config: ModelConfig, recipe: Recipe, plan: OutputPlan, folder: Path) -> None:
    """Write what lies beside the weights into `folder`: config.json, the description, copies of the other small files.

    Raises:
        CheckpointError: a side file cannot be read.
        SpaceError: the disk is full.
    """
    scheme, group_size = recipe.scheme, _group_size(recipe, plan)
    is_mindie = recipe.form is Form.MINDIE
    is_described = recipe.form in ASCEND_FORMS
    two_stage = recipe.quant_type.spec.two_stage
    settings = MindieSettings(
        group_size=group_size,
        act_method=scheme.act_range.value,
        anti_method=scheme.smoothing.value,
        is_lowbit=two_stage or scheme.weight.step_rule in (StepRule.SIGMA, StepRule.FRACTION),
        open_outlier=scheme.weight.keep_outliers and not two_stage,
    )
    edited = edit_config(
        config.nested,
        dtype=recipe.dtype,
        quant_type=recipe.quant_type,
        settings=settings if is_mindie else None,
    )
    if not is_described:
        edited[KEY] = compressed_config(config, recipe, plan).document()
    write_json(folder / "config.json", edited, indent=4)
    copy_side_files(source.directory, folder)
    for name, content in plan.side_files.items():
        write_whole(folder / name, content)
    if not is_described:
        return
    names = [info.name for file in plan.shards.files for info in file.tensors]
    types = tensor_types(names, plan.linears, model_quant_type=recipe.quant_type, form=recipe.form)
    description = Description(
        model_quant_type=recipe.quant_type.value,
        version=None if is_mindie else ASCEND_V1_VERSION,
        group_size=None if is_mindie else group_size or None,
        tensors=types if is_mindie else types | config.family.engine_aliases(types),
    )
    write_description(folder, description)


def _group_size(recipe: Recipe, plan: OutputPlan) -> int:
    """Input columns per step, if any linear has groups, be it by a rule against the model's type; else 0."""
    return recipe.group_size if any(kind.has_groups(recipe.form) for kind in plan.linears.values()) else 0


def compressed_config(config: ModelConfig, recipe: Recipe, plan: OutputPlan) -> CompressedConfig:
    """`quantization_config` of the compressed-tensors form: every linear of the model as a target or ignored.

    vLLM fuses linears of the vision tower and looks for the names of the parts, so these stand beside the model's own.
    """
    types = {
        linear.name: plan.linears.get(linear.name, QuantType.FLOAT)
        for group in config.family.groups(config)
        for linear in group.linears
    }
    described = {f"{name}.weight": quant_type.value for name, quant_type in types.items()}
    aliases = {
        name.removesuffix(".weight"): QuantType(value)
        for name, value in config.family.vllm_aliases(described).items()
        if name.startswith(f"{config.family.vision}.")
    }
    named = types | aliases
    return make_config(
        {name: quant_type for name, quant_type in named.items() if quant_type is not QuantType.FLOAT},
        [name for name, quant_type in named.items() if quant_type is QuantType.FLOAT],
        recipe.quant_type,
        recipe.group_size,
    )
