"""Smoothing of inputs without a norm: rows of an earlier linear are divided by the scales of the channels that they make.

    o_proj(p v_proj(x)) and down_proj(silu(gate) * up(x)):   what divides a row of v or up divides its channels.

The rows are written before the linears that read them, so both sides ask for the scales, in every pass over the weights.
They depend on the float weights, the statistics and the recipe alone: found anew on another rank or by a resumed run, they
are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmq.calibration.stats import Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.model.family import InputGroup
from glmq.numerics.smooth import choose_row_scales
from glmq.quantization.group import NO_FOLD, RowFold
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.spec import QuantType, Smoothing


@dataclass(frozen=True, slots=True)
class RowFolds:
    """Finds the scales of inputs without a norm, each once."""

    source: Checkpoint
    statistics: Statistics
    _found: dict[tuple[str, QuantType], Tensor | None] = field(default_factory=dict, init=False)

    def fold(self, recipe: Recipe, groups: Mapping[str, GroupPlan], group: InputGroup) -> RowFold:
        """The scales of the input of `group`, which is quantized, if rows of an earlier linear can be divided by them.

        Raises:
            CheckpointError: a weight with NaN or infinity.
            StatisticsError: the statistics lack the group's input.
        """
        rows = group.source
        if rows is None or recipe.scheme.smoothing is Smoothing.NONE:
            return NO_FOLD
        behind, short = _plan_with(groups, rows.linear), rows.linear.rpartition(".")[2]
        if not behind.is_quantized:
            return RowFold(None, f"none ({short} stays float)")
        key = group.site, groups[group.site].quant_type
        if key not in self._found:
            (linear,) = group.linears
            self._found[key] = choose_row_scales(
                recipe.scheme.smoothing,
                self.statistics.input(group.site),
                self.source.read_float(f"{linear.name}.weight"),
                groups[group.site].quant_type,
                run=rows.run,
                repeats=rows.repeats,
            )
        scales = self._found[key]
        if scales is None:
            return RowFold(
                None, "none (no clear gain)" if recipe.scheme.smoothing is Smoothing.M2 else "none (no gain expected)"
            )
        return RowFold(scales, f"folded into {short}, {float(scales.min()):.0f} to {float(scales.max()):.0f}")

    def divisors(self, recipe: Recipe, groups: Mapping[str, GroupPlan], group: InputGroup) -> dict[str, Tensor]:
        """What the rows of the linears of `group` are divided by for later inputs.

        Returns:
            float32 [N, 1] by linear; linears whose rows stay as they are are left out.
        """
        divisors: dict[str, Tensor] = {}
        shapes = {linear.name: linear for linear in group.linears}
        for plan in groups.values():
            rows = plan.group.source
            if rows is None or rows.linear not in shapes or not plan.is_quantized:
                continue
            scales = self.fold(recipe, groups, plan.group).scales
            if scales is not None:
                divisor = torch.ones(shapes[rows.linear].rows, 1)
                own = scales.reshape(-1, rows.repeats, rows.run)[:, 0].reshape(
                    -1, 1
                )  # [heads, repeats, run] -> [rows, 1]
                divisor[rows.first_row : rows.first_row + len(own)] = own
                divisors[rows.linear] = divisor
        return divisors


def _plan_with(groups: Mapping[str, GroupPlan], linear: str) -> GroupPlan:
    return next(plan for plan in groups.values() if any(shape.name == linear for shape in plan.group.linears))
