"""The samples that go through the text layers beside the weights, for a quantization with propagation."""

from __future__ import annotations

from glmq.calibration.stats import Statistics
from glmq.checkpoint.disk import check_room
from glmq.checkpoint.workplace import taken_bytes
from glmq.device import check_dtype, resolve
from glmq.jobs.shared_folder import SharedFolder
from glmq.jobs.watcher import Watcher
from glmq.model.streamed import StreamedModel
from glmq.quantization.dry_run import TextLoad, kept_states_bytes
from glmq.quantization.output import OutputPlan
from glmq.quantization.passes import QuantizationRun
from glmq.quantization.propagation import Propagation
from glmq.quantization.recipe import Recipe


def open_propagation(
    run: QuantizationRun,
    recipe: Recipe,
    plan: OutputPlan,
    statistics: Statistics,
    folder: SharedFolder,
    device_type: str,
    watcher: Watcher,
) -> Propagation | None:
    """The samples behind the last layer that an interrupted run has finished; None where the recipe asks for none.

    Args:
        run: its journal drops the layers that must be done again.
        plan: of the output, which the hidden states must leave room for.
        folder: of the run.

    Raises:
        SpaceError: the disk is too small.
        StatisticsError: the statistics lack what enters the text layers, or it is not as it was written.
        DeviceError: no such device, or it does not compute in the dtype of the statistics.
    """
    if not recipe.propagation:
        return None
    load = TextLoad.of(statistics.samples(), statistics.settings())
    kept = kept_states_bytes(run.config, recipe, load)
    check_room(folder.work, plan.shards.nbytes - taken_bytes(folder.path) + kept)
    device = resolve(device_type)
    again = "the statistics were taken in it: calibrate again with --compute-dtype fp16"
    check_dtype(device, load.dtype, advice=again)
    model = StreamedModel(run.source, run.config, device=device, dtype=load.dtype)
    propagation = Propagation(model, statistics, recipe.propagation, folder.work, run.journal)
    if propagation.note:
        watcher.note(f"note: {propagation.note}")
    return propagation
