"""What one quantization is told: the model, the recipe, the statistics and the places.

A resumed run must share `settings`; `chosen` is what an interrupted one says about itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glmq.checkpoint.journal import number_text
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.numerics.rate import RateCurve
from glmq.quantization.recipe import Recipe


@dataclass(frozen=True, slots=True)
class QuantizationJob:
    """What to quantize, how, and where to."""

    model_path: Path
    out_path: Path
    recipe: Recipe
    calibration: CalibrationOptions
    stats_path: Path | None = None
    """Statistics to reuse, or to write if the folder does not exist; None makes temporary ones."""
    shard_bytes: int | None = None
    fallback_topk: int = 0
    """Keep this many of the worst groups float."""
    max_error: float | None = None
    """Keep groups with a larger relative output error float."""
    work_dir: Path | None = None
    """Where the output grows until it is whole; None: beside the output folder, on the same disk."""
    keep_extra: bool = False
    """Also copy tensors that are no part of the model."""
    reports: bool = True
    """Measure every linear's error, and leave report, page and model card beside the weights."""
    curves: tuple[RateCurve, ...] = field(default=(), repr=False)
    """What sparse linears lose at how many bits, if a run has measured that which differs in the target bits alone."""

    command: str = ""
    """That resumes it, for whom finds it interrupted."""

    def settings(self) -> dict[str, str]:
        """What the weight files depend on beside the recipe, by option; empty text for what is not given."""
        size, in_units = self.shard_bytes, ""
        if size is not None:
            unit, bytes_each = next((u for u in (("GB", 2**30), ("MB", 2**20)) if size % u[1] == 0), (" bytes", 1))
            in_units = f"{size // bytes_each}{unit}"
        return {
            "--fallback-topk": str(self.fallback_topk),
            "--max-error": "" if self.max_error is None else number_text(self.max_error),
            "--part_file_size": in_units,
            "--keep-extra": str(self.keep_extra),
            "--report": str(self.reports),
        }

    def chosen(self) -> dict[str, str]:
        """Where everything comes from, by option; empty text for what is not given."""
        stats = "" if self.stats_path is None else str(self.stats_path)
        return {"--model_path": str(self.model_path), "--stats": stats, **self.calibration.chosen()}

    @property
    def measures(self) -> bool:
        """Every group is quantized once before, to see which stay float."""
        return bool(self.fallback_topk) or self.max_error is not None
