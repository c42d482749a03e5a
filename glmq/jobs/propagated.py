"""The samples that go through the text layers beside the weights, for a quantization with propagation."""

from __future__ import annotations

from pathlib import Path

from glmq.calibration.stats import Statistics
from glmq.device import resolve
from glmq.jobs.watcher import Watcher
from glmq.model.streamed import StreamedModel
from glmq.quantization.passes import QuantizationRun
from glmq.quantization.propagation import Propagation
from glmq.quantization.recipe import Recipe


def open_propagation(
    run: QuantizationRun, recipe: Recipe, statistics: Statistics, work: Path, device_type: str, watcher: Watcher
) -> Propagation | None:
    """The samples behind the last layer that an interrupted run has finished; None where the recipe asks for none.

    Args:
        run: its journal drops the layers that must be done again.
        work: the work folder.

    Raises:
        StatisticsError: the statistics lack what enters the text layers, or it is not as it was written.
        DeviceError: no such device.
    """
    if not recipe.propagation:
        return None
    dtype = statistics.settings().dtype
    model = StreamedModel(run.source, run.config, device=resolve(device_type), dtype=dtype)
    propagation = Propagation(model, statistics, recipe.propagation, work, run.journal)
    if propagation.note:
        watcher.note(f"note: {propagation.note}")
    return propagation
