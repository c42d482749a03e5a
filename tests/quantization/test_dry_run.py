"""What a run will take, from one group that is tried."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import glmq
from glmq import Recipe
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import RateCurve
from glmq.quantization import layer
from glmq.quantization.group import FloatLinear, GroupScheme, PreparedGroup


def test_a_trial_rates_its_group_once_as_the_run_does(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []
    curves = layer._curves

    def counted(
        linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, group: PreparedGroup
    ) -> list[RateCurve]:
        tried.append([linear.name.rpartition(".")[2] for linear in linears])
        return curves(linears, stats, scheme, group)

    monkeypatch.setattr(layer, "_curves", counted)
    recipe = Recipe.w8a8s(sigma=3.0)
    plan = glmq.quantize(small, small_stats, out=tmp_path / "out", recipe=recipe, dry_run=True)
    assert plan.quantization_seconds is not None
    assert tried == [["q_proj", "k_proj", "v_proj"]]
