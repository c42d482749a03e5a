"""The passes that write nothing: what each sparse linear loses at how many bits, and what quantizing each linear would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from glmq.checkpoint.json_file import JsonObject
from glmq.model.config import ModelConfig
from glmq.model.family import Block
from glmq.numerics.rate import RateCurve
from glmq.quantization.layer import rate_curves
from glmq.quantization.passes import (
    QuantizationRun,
    QuantizedBlock,
    block_done,
    each_block,
    each_group,
    parse_reports,
    quantize_plan,
    read_group,
)
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.records import BlockDone, report_row


@dataclass(frozen=True, slots=True)
class RatedBlock:
    """One block's linears are measured: what each loses at how many bits."""

    done: BlockDone
    curves: tuple[RateCurve, ...]


def measure_checkpoint(
    run: QuantizationRun, recipe: Recipe, groups: Mapping[str, GroupPlan], *, bits: Mapping[str, float]
) -> Iterator[QuantizedBlock]:
    """Quantize every planned group and report its errors, but write nothing. Raises as `quantize_checkpoint` does."""
    run = replace(run, reports=True)
    blocks = measured_blocks(run.config, groups)

    def measure(index: int, block: Block) -> JsonObject:
        plans = [groups[g.site] for g in block.groups if groups[g.site].is_quantized]
        results = [quantize_plan(run, recipe, groups, plan, bits) for plan in each_group(run, index, block, plans)]
        return {"reports": [report_row(report) for result in results for report in result.reports]}

    for index, (block, payload, seconds) in enumerate(each_block(run, blocks, "measure ", measure)):
        yield QuantizedBlock(block_done(block.name, index, len(blocks), seconds, run), tuple(parse_reports(payload)))


def rate_checkpoint(run: QuantizationRun, recipe: Recipe, groups: Mapping[str, GroupPlan]) -> Iterator[RatedBlock]:
    """Measure what each sparse linear loses at how many bits: the first pass over a model of a sparse type."""
    blocks = rated_blocks(run.config, groups)
    plans = [plan for plan in groups.values() if plan.quant_type.spec.is_sparse]
    sparse = {linear.name for plan in plans for linear in plan.group.linears}

    def rate(index: int, block: Block) -> JsonObject:
        curves: list[RateCurve] = []
        rated = [groups[group.site] for group in block.groups if groups[group.site].quant_type.spec.is_sparse]
        for plan in each_group(run, index, block, rated):
            linears, norm, stats, fold = read_group(run.folds, recipe, groups, plan.group, run.clock)
            with run.clock.stage("rate"):
                own, prepared = rate_curves(
                    linears, stats, recipe.scheme, norm_weight=norm, dtype=recipe.dtype, fold=fold
                )
            curves += own
            run.prepared[plan.group.site, recipe.scheme, fold.label] = prepared
        return {"curves": [asdict(curve) for curve in curves]}

    for index, (block, payload, seconds) in enumerate(each_block(run, blocks, "rate ", rate)):
        rows = payload["curves"]
        assert isinstance(rows, list)
        # The journal may have rated more than stays sparse after a fallback.
        curves = tuple(curve for curve in map(_parse_curve, rows) if curve.name in sparse)
        yield RatedBlock(block_done(block.name, index, len(blocks), seconds, run), curves)


def measured_blocks(config: ModelConfig, groups: Mapping[str, GroupPlan]) -> list[Block]:
    """The blocks that `measure_checkpoint` goes through."""
    return [b for b in config.family.blocks(config) if any(groups[g.site].is_quantized for g in b.groups)]


def rated_blocks(config: ModelConfig, groups: Mapping[str, GroupPlan]) -> list[Block]:
    """The blocks that `rate_checkpoint` goes through."""
    every = config.family.blocks(config)
    return [b for b in every if any(groups[g.site].quant_type.spec.is_sparse for g in b.groups)]


def _parse_curve(row: Mapping[str, Any]) -> RateCurve:
    return RateCurve(**{**row, "bits": tuple(row["bits"]), "loss": tuple(row["loss"])})
