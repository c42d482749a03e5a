"""What a calibration will write, need and take: sizes from shapes and tokens, time from one sample through one block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from torch import Tensor

from glmq.calibration import text_inputs
from glmq.calibration.capture import Watch
from glmq.calibration.convergence import Convergence, convergence_order
from glmq.calibration.layer_watch import LayerWatch
from glmq.calibration.manifest import MANIFEST, SampleTokens, SiteShape, field_specs, site_entry
from glmq.calibration.samples import GeneratedAnswer, Sample, open_image
from glmq.calibration.stats import Settings
from glmq.calibration.stats_writer import SAMPLE_ROWS, StatsWriter, StoredBlock, has_moment
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.layout import TensorSpec, bare_file_bytes
from glmq.checkpoint.reader import Checkpoint, dtype_code
from glmq.errors import SampleError
from glmq.model.config import ModelConfig
from glmq.model.family import Block
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.numerics.moments import BINS, InputAccumulator, InputStats
from glmq.progress import StepPlan, Stopwatch
from glmq.ranks import Place, Ranks

Result = TypeVar("Result")
NO_DIGEST: Final = "0" * 32
"""As long as a checksum."""
PROCESS_BYTES: Final = 430 * 2**20
"""Python with torch and transformers loaded; measured on Linux x86-64."""
USUAL_RATE: Final = 1e10
"""Weights times tokens a second."""
WARM_SECONDS: Final = 0.2
"""A call that takes longer is hardly slower for being the first."""
WRITE_SECONDS: Final = 4e-9
"""For a byte of a file that must have reached the disk: of a small machine's."""
TOKEN_TEXT: Final = 16
"""Bytes in the manifest that the text of a generated token takes at most, on average."""
WIDE_COPIES: Final = 3
"""Tensors of a sample that are as wide as a block's widest product and live at the same time: gate and up together,
their halves' product, and a copy for the statistics."""


@dataclass(frozen=True, slots=True)
class SampleSize:
    """How much of the model one sample reaches."""

    sample: Sample
    tokens: int
    patches: int
    """Of its image; 0 without one."""


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What a calibration would do and need."""

    samples: tuple[SampleTokens, ...]
    files: tuple[tuple[str, int], ...]
    """Files of the statistics folder with their exact sizes; with answers by the model, the largest that they may have."""
    is_exact: bool
    output_bytes: int
    work_bytes: int
    """Hidden states that lie beside them while it runs, for a resume."""
    peak_bytes: int
    """Estimated resident memory."""
    patches: tuple[int, ...]
    """Of each picture."""
    encoding_seconds: float
    """Time that reading all samples has taken."""


@dataclass(frozen=True, slots=True)
class CalibrationTrial:
    """What one sample shows that has gone through one block of each tower."""

    steps: tuple[StepPlan, ...]
    """The time that each block of the calibration takes, scaled to all samples."""
    inputs: Mapping[str, InputStats]
    """Statistics of the first text layer's inputs over that sample, by site."""


def plan_calibration(
    config: ModelConfig,
    source: Checkpoint,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    settings: Settings,
    *,
    element_bytes: int,
    read: Callable[[int], None] = lambda count: None,
) -> CalibrationPlan:
    """Lay out the statistics folder from the samples' tokens and the model's shapes.

    Args:
        source: the float checkpoint.
        element_bytes: size of a value of the compute dtype.
        read: is called after each sample with how many were read.

    Raises:
        SampleError: images or texts that the model cannot take.
    """
    if settings.generate is not None:
        longest = GeneratedAnswer((config.vocab_size,) * settings.generate, " " * TOKEN_TEXT * settings.generate)
        samples = [sample if sample.answer else replace(sample, generated=longest) for sample in samples]
    started = time.perf_counter()
    sizes = _sizes(convergence_order(samples), preprocessor, read)
    encoding = time.perf_counter() - started
    sink = StatsWriter(Path(), source.fingerprint(), samples, settings)
    files = []
    for block in config.family.blocks(config):
        entries, specs = _plan_block(block, config, settings, sizes)
        if entries:
            files.append((f"{block.name}.safetensors", bare_file_bytes(specs)))
        sink.restore(StoredBlock(entries, {}))
    if settings.text_inputs:
        code = dtype_code(settings.dtype)
        for index, size in enumerate(sizes):
            name = text_inputs.name_of(index)
            files.append((name, text_inputs.file_bytes(index, size.tokens, config.hidden_size, code)))
            sink.restore(StoredBlock({}, {name: NO_DIGEST}))
    tokens = {size.sample.name: size.tokens for size in sizes}
    for size in sizes:
        sink.set_tokens(size.sample, size.tokens)
    files.append((MANIFEST, len(sink.manifest_bytes(dict.fromkeys(source, NO_DIGEST)))))
    return CalibrationPlan(
        samples=tuple(SampleTokens(s.name, tokens[s.name], s.has_answer) for s in samples),
        files=tuple(files),
        is_exact=all(sample.generated is None for sample in samples),
        output_bytes=sum(count for _, count in files),
        work_bytes=2 * _state_bytes(config, sizes, element_bytes),  # the new ones are there before the old ones go
        peak_bytes=PROCESS_BYTES + _peak_beside_process(config, settings, sizes, element_bytes),
        patches=tuple(size.patches for size in sizes if size.patches),
        encoding_seconds=encoding,
    )


def try_calibration(
    model: StreamedModel,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    settings: Settings,
    plan: CalibrationPlan,
) -> CalibrationTrial:
    """Run one sample through one block of each tower and scale: the seconds that each block of the calibration takes.

    Time is taken to grow with the tokens (patches) of all samples; the sample is the one with most tokens among those with an
    image, or among all where none has one.
    """
    config, family = model.config, model.config.family
    sizes = {size.name: size.tokens for size in plan.samples}
    chosen = max(samples, key=lambda one: (one.image is not None, sizes[one.name]))
    inputs = _encode(chosen, preprocessor)
    shares = sum(plan.patches) / max(_patches(inputs), 1), sum(sizes.values()) / inputs.tokens
    start, block, vision = 0.0, 0.0, None
    if inputs.pixel_values is not None:
        start, vision = _time_vision_start(model, inputs, shares[0])
        start += plan.encoding_seconds
        block, _ = _time_block(model, family.vision_block(config, 0), vision, settings, shares[0])
    merger, call = _time_merger(model, inputs, vision, shares[1])
    layer, inputs_seen = _time_block(model, family.text_block(config, 0), call, settings, shares[1])
    written = {Path(name).stem: nbytes * WRITE_SECONDS for name, nbytes in plan.files}
    block += written.get(family.vision_block(config, 0).name, 0.0)
    layer += written.get(family.text_block(config, 0).name, 0.0)
    steps = [StepPlan(b.name, "vision", block) for b in family.vision_blocks(config)[:-1]]
    if steps:
        steps[0] = replace(steps[0], seconds=block + start)
    steps.append(StepPlan(family.merger_block(config).name, "merger", merger))
    steps += [StepPlan(b.name, "text", layer) for b in family.text_blocks(config)]
    # The head is not run: its input is one of a layer's four.
    steps.append(StepPlan(family.lm_head, "head", layer / 4))
    return CalibrationTrial(tuple(steps), inputs_seen)


def guess_steps(config: ModelConfig, plan: CalibrationPlan) -> tuple[StepPlan, ...]:
    """The same without a trial, for small models: by the size of the blocks and the rate of a small machine."""
    tokens = sum(sample.tokens for sample in plan.samples)
    return tuple(
        StepPlan(
            block.name,
            kind,
            sum(linear.rows * linear.cols for group in block.groups for linear in group.linears)
            * (sum(plan.patches) if kind == "vision" else 0 if kind == "head" else tokens)
            / USUAL_RATE,
        )
        for block in config.family.blocks(config)
        for kind in (config.family.kind_of(block.name),)
    )


def _time_vision_start(model: StreamedModel, inputs: ModelInputs, share: float) -> tuple[float, BlockCall]:
    started = time.perf_counter()
    with model.placed(*model.config.family.vision_stem):
        read = time.perf_counter() - started
        run, call = _time_run(lambda: model.vision_call(inputs), share)
        return read + run, call


def _time_merger(
    model: StreamedModel, inputs: ModelInputs, vision: BlockCall | None, share: float
) -> tuple[float, BlockCall]:
    started = time.perf_counter()
    with model.placed(*(() if vision is None else model.config.family.vision_tail)), model.embedding_rows(inputs.ids):
        read = time.perf_counter() - started
        run, call = _time_run(lambda: model.text_call(inputs, vision), share)
        return read + run, call


def _time_block(
    model: StreamedModel, block: Block, call: BlockCall, settings: Settings, share: float
) -> tuple[float, dict[str, InputStats]]:
    """Seconds of a block: to read it, to run it with statistics over `share` times as much as one call, to finish these."""
    accumulators = {
        group.site: InputAccumulator(
            group.site, group.width, with_moment=has_moment(group, model.config, wide_moments=settings.wide_moments)
        )
        for group in block.groups
    }
    ranks = Ranks(Place(0, 1))
    watched = Watch(block, accumulators, ranks, Stopwatch(), keep_rows=SAMPLE_ROWS, own=1)
    layer = LayerWatch(block, model.config, ranks, Stopwatch())

    def replay() -> Tensor:
        hidden = model.replay(block.name, call)
        layer.take_turn()
        for accumulator in accumulators.values():
            accumulator.state()  # has the second moment's products, which would wait for more tokens
        return hidden

    started = time.perf_counter()
    with model.placed(block.name), watched.hooked(model), layer.hooked(model):
        read = time.perf_counter() - started
        run, hidden = _time_run(replay, share)
        started = time.perf_counter()
        layer.finish(model)
    seen = {stats.name: stats for stats, _ in watched.finish()}
    call.hidden = hidden
    return read + run + time.perf_counter() - started, seen


def _time_run(run: Callable[[], Result], share: float) -> tuple[float, Result]:
    """Seconds of a run over `share` times as much as one call.

    A short first call mostly starts threads and fills caches, so another one is timed.
    """
    started = time.perf_counter()
    result = run()
    if time.perf_counter() - started <= WARM_SECONDS:
        started = time.perf_counter()
        result = run()
    return share * (time.perf_counter() - started), result


def _encode(sample: Sample, preprocessor: Preprocessor) -> ModelInputs:
    try:
        inputs = preprocessor.encode(open_image(sample), sample.prompt, sample.answer)
        if sample.generated is not None:
            preprocessor.check_length(
                inputs.tokens, has_image=sample.image is not None, generated=len(sample.generated.ids)
            )
        return inputs
    except SampleError as error:
        raise SampleError(f"{sample.name}: {error}") from error


def _sizes(samples: Sequence[Sample], preprocessor: Preprocessor, read: Callable[[int], None]) -> list[SampleSize]:
    """The size of every sample. Raises SampleError that names those which the model cannot take."""
    sizes: list[SampleSize] = []
    bad: list[str] = []
    for count, sample in enumerate(samples, 1):
        try:
            sizes.append(_size(sample, preprocessor))
        except SampleError as error:
            bad.append(str(error))
        read(count)
    if len(bad) == 1:
        raise SampleError(bad[0])
    if bad:
        raise SampleError(f"{len(bad)} of {len(samples)} samples are none for this model, the first: {bad[0]}")
    return sizes


def _size(sample: Sample, preprocessor: Preprocessor) -> SampleSize:
    inputs = _encode(sample, preprocessor)
    answer = 0 if sample.generated is None else len(sample.generated.ids)
    return SampleSize(sample, inputs.tokens + answer, _patches(inputs))


def _patches(inputs: ModelInputs) -> int:
    return 0 if inputs.grid is None else int(inputs.grid.prod())


def _rows_of(block: Block, config: ModelConfig, size: SampleSize) -> int:
    """Rows that the block's linears see of one sample."""
    if not block.name.startswith(config.family.vision):
        return size.tokens
    return size.patches // config.merge_size**2 if block == config.family.merger_block(config) else size.patches


def _plan_block(
    block: Block, config: ModelConfig, settings: Settings, sizes: Sequence[SampleSize]
) -> tuple[JsonObject, list[TensorSpec]]:
    """The manifest entries and the tensors of one block; neither where no sample reaches it."""
    rows = [_rows_of(block, config, size) for size in sizes]
    keep = max(1, SAMPLE_ROWS // len(sizes))
    own = [count for count, size in zip(rows, sizes) if not size.sample.is_builtin]
    half = sum(own[: (len(own) + 1) // 2])
    entries: JsonObject = {}
    specs: list[TensorSpec] = []
    for group in block.groups if any(rows) else ():
        moment = has_moment(group, config, wide_moments=settings.wide_moments)
        known = 0 if block.layer is None else sum(linear.rows for linear in group.linears)
        shape = SiteShape(group.width, moment, known)
        stored = field_specs(group.site, shape, sum(min(keep, count) for count in rows))
        settled = Convergence(0.0, 0.0, 0.0 if moment else None) if 0 < half < sum(own) else None
        checksums = {spec.name.rpartition(".")[2]: NO_DIGEST for spec in stored}
        entries[group.site] = site_entry(block.name, shape, sum(rows), settled, checksums)
        specs += stored
    return entries, specs


def _state_bytes(config: ModelConfig, sizes: Sequence[SampleSize], element_bytes: int) -> int:
    """Hidden states of all samples, in the larger of the two towers."""
    vision = config.vision_hidden * sum(size.patches for size in sizes)
    return element_bytes * max(vision, config.hidden_size * sum(size.tokens for size in sizes))


def _peak_beside_process(
    config: ModelConfig, settings: Settings, sizes: Sequence[SampleSize], element_bytes: int
) -> int:
    """The largest block: its weights, one of them as stored, its statistics, one sample's widest tensors; all hidden states."""
    peak = 0
    for block in config.family.blocks(config)[:-1]:  # lm_head is not run
        linears = [linear for group in block.groups for linear in group.linears]
        weights = element_bytes * sum(linear.rows * linear.cols for linear in linears)
        stored = 2 * max(linear.rows * linear.cols for linear in linears)
        statistics = sum(
            4 * group.width * (BINS + SAMPLE_ROWS)
            + (4 * group.width**2 if has_moment(group, config, wide_moments=settings.wide_moments) else 0)
            for group in block.groups
        )
        widest = max(max(linear.rows, linear.cols) for linear in linears)
        longest = max(_rows_of(block, config, size) for size in sizes)
        peak = max(peak, weights + max(stored, statistics + WIDE_COPIES * element_bytes * widest * longest))
    return peak + _state_bytes(config, sizes, element_bytes)
