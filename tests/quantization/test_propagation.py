"""Quantizing for the inputs that earlier layers' integers make: --propagation."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import StandInNpu, calibrate, quantize, refused, tree
from make_checkpoint import Size, make_checkpoint
from safetensors.torch import load_file
from torch import Tensor

import glmq
from glmq.calibration.convergence import convergence_order
from glmq.calibration.encode import encode_sample
from glmq.calibration.samples import Sample, read_samples
from glmq.calibration.stats import Statistics
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import DeviceError, StatisticsError, UsageError
from glmq.inspection.statistics import summarize_statistics
from glmq.jobs.quantization_job import QuantizationJob
from glmq.jobs.quantize import forecast_quantization
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.progress import Event, Note, no_step
from glmq.quantization.dry_run import CARRIED, USUAL_MEETING, RunPlan, TextLoad, plan_passes, usual_speed
from glmq.quantization.options import Options
from glmq.quantization.output import plan_output
from glmq.quantization.plan import plan_groups
from glmq.quantization.propagation import Propagation
from glmq.quantization.recipe import make_recipe
from glmq.verification.cases import Case
from glmq.verification.int8_model import open_model
from glmq.verification.last_states import _Forward

W4A8 = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
W4A16 = {"w_bit": 4, "a_bit": 16, "group_size": 32, "format": "compressed-tensors"}
LAYERS = "model.language_model.layers"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")


@pytest.fixture(scope="module")
def lines(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a picture with an answer, a longer text."""
    folder = tmp_path_factory.mktemp("lines")
    shutil.copy(pictures / "03.png", folder)
    rows = [
        {"text": "Permission is hereby granted, free of charge, to any person obtaining a copy of this software."},
        {"image": "03.png", "prompt": "Please describe this picture in detail.", "text": "One red circle."},
        {"text": "THE SOFTWARE IS PROVIDED AS IS, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED. " * 6},
    ]
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "s.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three text layers, with random weights."""
    folder = tmp_path_factory.mktemp("propagation") / "model"
    make_checkpoint(folder, Size(layers=3))
    return folder


@pytest.fixture(scope="module")
def stats(model: Path, lines: Path) -> Path:
    """The model's, with what enters the text layers."""
    return calibrate(model, model.with_name("stats"), None, samples_file=lines, texts=False, text_inputs=True)


@pytest.fixture(scope="module")
def unbroken(model: Path, stats: Path) -> Path:
    return quantize(model, stats, model.with_name("unbroken"), propagation=0.5, **W4A8)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Propagation]:
    """The streams of every run that follows."""
    made: list[Propagation] = []

    class Kept(Propagation):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr("glmq.jobs.propagated.Propagation", Kept)
    return made


def states_of(folder: Path, lines: Path) -> list[Tensor]:
    """What the last text layer of a checkpoint gives for every sample, in the order of calibration."""
    config = read_config(folder)
    encoder = Preprocessor(folder, config, max_pixels=None, trust_remote_code=False)

    def case(sample: Sample) -> Case:
        return Case(sample.name, sample.image is not None, lambda: encode_sample(encoder, sample))

    cases = [case(sample) for sample in convergence_order(read_samples(lines, limit=None).samples)]
    with Checkpoint.open(folder) as source:
        run = _Forward(open_model(source, config), cases, no_step)
        assert len(list(run.blocks())) == run.total
        return [run._calls[index].hidden for index in range(len(cases))]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_smooth": True}, {"keep_float": ("*.layers.1.*",)}])
def test_both_streams_are_those_of_the_float_checkpoint_and_of_the_one_that_is_written(
    options: dict[str, object], model: Path, stats: Path, lines: Path, kept: list[Propagation], tmp_path: Path
) -> None:
    out = quantize(model, stats, tmp_path / "out", propagation=0.5, **W4A16, **options)
    (streams,) = kept
    for folder, calls in ((model, streams._float), (out, streams._quantized)):
        for index, states in enumerate(states_of(folder, lines)):
            assert distance(calls[index].hidden, states) < 2e-5
    assert distance(streams._quantized[0].hidden, streams._float[0].hidden) > 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_quantized_layers_stay_nearer_to_the_float_ones(
    half: Path, lines: Path, kept: list[Propagation], tmp_path: Path
) -> None:
    stats = calibrate(half, tmp_path / "stats", None, samples_file=lines, texts=False, text_inputs=True)
    away = []
    for strength in (1e-6, 0.5):
        quantize(half, stats, tmp_path / f"{strength}", propagation=strength, **W4A8)
        moved, true = ([call.hidden[0] for call in calls.values()] for calls in (kept[-1]._quantized, kept[-1]._float))
        away.append(distance(torch.cat(moved), torch.cat(true)))
    assert away[1] < 0.93 * away[0]


@pytest.mark.slow
def test_the_first_group_has_nothing_to_make_up_for_and_the_rest_of_the_model_does_not_change(
    model: Path, stats: Path, unbroken: Path, tmp_path: Path
) -> None:
    plain, moved = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (quantize(model, stats, tmp_path / "plain", propagation=0.0, **W4A8), unbroken)
    )
    assert moved.keys() == plain.keys()
    others = {name for name in plain if not torch.equal(plain[name], moved[name])}
    site = rf"{re.escape(LAYERS)}\.\d\.(self_attn\.[qkvo]_proj|mlp\.gate_up_proj)\.(weight|weight_scale\w*|scale_bias)"
    assert all(re.fullmatch(site, name) for name in others)
    changed = {name.removesuffix(".weight") for name in others if name.endswith(".weight")}
    linears = {f"{LAYERS}.{layer}.{own}" for layer in range(3) for own in LINEARS}
    # Its inputs are the float ones; only the sums of their squares are added up anew.
    assert linears - changed <= {f"{LAYERS}.0.self_attn.{own}" for own in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.slow
def test_kept_text_inputs_change_nothing_else(model: Path, stats: Path, lines: Path, tmp_path: Path) -> None:
    bare = calibrate(model, tmp_path / "bare", None, samples_file=lines, texts=False)
    with_inputs, without = tree(stats), tree(bare)
    more = {"statistics.json", *(f"text_inputs-{index:04d}.safetensors" for index in range(3))}
    assert {name: sha for name, sha in with_inputs.items() if name not in more} == {
        name: sha for name, sha in without.items() if name != "statistics.json"
    }
    assert "text_inputs" not in json.loads((bare / "statistics.json").read_text())
    told = [summarize_statistics(folder).in_words for folder in (bare, stats)]
    assert told[1] == told[0].replace("; answers", ", what enters the text layers; answers")
    assert told[1] != told[0]
    with pytest.raises(StatisticsError) as caught:
        quantize(model, bare, tmp_path / "out", propagation=0.5, **W4A8)
    assert str(caught.value) == (
        f"{bare}: these statistics do not hold what enters the text layers, which --propagation needs; run `glmq calibrate "
        "--text-inputs`, or leave --propagation out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_text_inputs_that_were_altered_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    shutil.copytree(stats, tmp_path / "stats")
    path = tmp_path / "stats" / "text_inputs-0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refused(lambda: quantize(model, tmp_path / "stats", tmp_path / "out", propagation=0.5, **W4A8)) == (
        4,
        f"{path}: is missing or not as it was written; copy the folder again or run `glmq calibrate` again",
    )


def test_text_inputs_that_are_missing_are_named_when_the_folder_is_opened(stats: Path, tmp_path: Path) -> None:
    shutil.copytree(stats, tmp_path / "stats")
    (tmp_path / "stats" / "text_inputs-0001.safetensors").unlink()
    assert refused(lambda: Statistics.open(tmp_path / "stats")) == (
        4,
        f"{tmp_path / 'stats'}: is incomplete: statistics.json names text_inputs-0001.safetensors, which is not in the "
        "folder; copy the folder again or run `glmq calibrate` again",
    )


@pytest.mark.slow
def test_statistics_are_made_on_the_way_with_what_is_needed(small: Path, pictures: Path, tmp_path: Path) -> None:
    options = glmq.CalibrationOptions(images=pictures, limit=2, texts=False, text_inputs=True)
    quantize(small, None, tmp_path / "a", calibration=options, propagation=0.5, **W4A8)
    own = calibrate(small, tmp_path / "stats", pictures, limit=2, texts=False, text_inputs=True)
    glmq.quantize(small, own, out=tmp_path / "b", recipe=glmq.Recipe.w4a8_dynamic(propagation=0.5))
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    weights = {name for name in a if name.endswith(".safetensors")}
    assert weights
    assert {name: a[name] for name in weights} == {name: b[name] for name in weights}
    assert json.loads((tmp_path / "b" / "glmq_report.json").read_text())["recipe"]["propagation"] == 0.5


def run_and_cut(work: Callable[[], object], records: int) -> None:
    """Stop the run as it has journalled so many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        original, count = Journal.record, 0

        def record(self: Journal, *args: object) -> None:
            nonlocal count
            original(self, *args)  # type: ignore[arg-type]
            count += 1
            if count == records:
                raise KeyboardInterrupt

        patch.setattr(Journal, "record", record)
        with pytest.raises(KeyboardInterrupt):
            work()


def weights_in(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in tree(folder).items() if name.endswith(".safetensors")}


VISION = 2
"""Blocks before the text layers: one of the vision tower, and the merger."""


@pytest.fixture(scope="module")
def stopped(model: Path, stats: Path) -> Path:
    """What a run leaves that is stopped after two text layers."""
    out = model.with_name("stopped")
    run_and_cut(lambda: quantize(model, stats, out, propagation=0.5, **W4A8), VISION + 2)
    return out.with_name(".stopped.partial")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_with_the_states_that_it_left(
    layers: int, model: Path, stats: Path, unbroken: Path, tmp_path: Path
) -> None:
    def run(**options: object) -> Path:
        return quantize(model, stats, tmp_path / "out", propagation=0.5, **options, **W4A8)

    run_and_cut(run, VISION + layers)
    left = sorted(path.name for path in (tmp_path / ".out.partial").glob(".streams-*"))
    assert left == [[], [".streams-000"], [".streams-000", ".streams-001"], [".streams-000", ".streams-001"]][layers]
    notes: list[Event] = []
    run(resume=True, watch=notes.append)
    assert not [note for note in notes if isinstance(note, Note) and "missing" in note.text]
    assert weights_in(tmp_path / "out") == weights_in(unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_what_is_kept_beside_the_output_is_foretold_and_needs_room(
    model: Path, stats: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = glmq.quantize(
        model, stats, out=tmp_path / "out", recipe=glmq.Recipe.w4a8_dynamic(propagation=0.5), dry_run=True
    )
    plain = glmq.quantize(model, stats, out=tmp_path / "out", recipe=glmq.Recipe.w4a8_dynamic(), dry_run=True)
    kept = [load_file(path) for path in stopped.glob(".streams-*")]
    assert len(kept) == 2
    assert plan.work_bytes == sum(state.nbytes for states in kept for state in states.values())
    assert plain.work_bytes == 0

    wanted = plan.output_bytes + plan.work_bytes
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: wanted - 1)
    sentence = f"{wanted} bytes are to be written, but its disk has {wanted - 1} free; make room or choose another disk"
    found = glmq.quantize(
        model, stats, out=tmp_path / "out", recipe=glmq.Recipe.w4a8_dynamic(propagation=0.5), dry_run=True
    )
    assert found.obstacles == (f"{tmp_path / 'out'}: {sentence}",)
    said = refused(lambda: quantize(model, stats, tmp_path / "out", propagation=0.5, **W4A8))
    assert said == (5, f"{tmp_path / '.out.partial'}: {sentence}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_layers_whose_states_are_lost_are_done_again(
    damage: str, model: Path, stats: Path, stopped: Path, unbroken: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / ".out.partial")
    path = tmp_path / ".out.partial" / ".streams-001"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    notes: list[Event] = []
    quantize(model, stats, tmp_path / "out", propagation=0.5, resume=True, watch=notes.append, **W4A8)
    assert [note.text for note in notes if isinstance(note, Note) and "missing" in note.text] == [
        "note: .streams-001 of the unfinished run is missing or altered, so its 2 finished text layers are done again"
    ]
    assert weights_in(tmp_path / "out") == weights_in(unbroken)


def test_the_recipes_of_the_library_have_it() -> None:
    packed = make_recipe(Options(propagation=0.25, **W4A16))  # type: ignore[arg-type]
    assert glmq.Recipe.w4a16(propagation=0.25, group_size=32) == packed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "--propagation 0.5 in W8A8: it is for W8A8S, W4A8_DYNAMIC and W4A16; drop it"),
        (
            {"a_bit": 16},
            "--propagation 0.5 in W8A16: it is for W8A8S, W4A8_DYNAMIC and W4A16; drop it",
        ),
        (
            {**W4A8, "method": "plain"},
            "--propagation 0.5 with --method plain: only compensated rounding makes up for errors; drop one of them",
        ),
        ({**W4A8, "propagation": 1.5}, "--propagation 1.5: a number from 0 to 1 is needed"),
        ({**W4A8, "propagation": float("nan")}, "--propagation nan: a number from 0 to 1 is needed"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe(Options(**{"propagation": 0.5, **options}))  # type: ignore[arg-type]
    assert str(caught.value) == sentence


def test_several_processes_are_refused(
    model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert refused(lambda: quantize(model, stats, tmp_path / "out", propagation=0.5, **W4A8)) == (
        2,
        "--propagation: each layer waits for the one before, so torchrun's processes cannot share them; run `glmq quantize` "
        "itself",
    )


def test_the_samples_run_on_the_device_that_is_named(model: Path, stats: Path, tmp_path: Path) -> None:
    options = glmq.CalibrationOptions(text_inputs=True, device_type="npu", prompt="What?")
    events: list[Event] = []
    with pytest.raises(DeviceError):
        quantize(model, stats, tmp_path / "out", calibration=options, propagation=0.5, watch=events.append, **W4A8)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert f"note: --prompt has no effect: the statistics in {stats} are used" in notes


def test_an_npu_that_does_not_multiply_in_the_statistics_dtype_is_refused(
    model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.device._load_npu", lambda: StandInNpu(bf16=False, name="Ascend310P3"))
    monkeypatch.setattr("glmq.device._npu_device", lambda _: torch.device("meta"))
    chosen = glmq.CalibrationOptions(device_type="npu", text_inputs=True)
    with pytest.raises(DeviceError) as caught:
        quantize(model, stats, tmp_path / "out", calibration=chosen, propagation=0.5, **W4A8)
    dtype = json.loads((stats / "statistics.json").read_text())["compute_dtype"]
    assert str(caught.value) == (
        f"--device-type npu: the Atlas 300I Duo multiplies in float16 alone, not in {dtype}; the statistics were taken in "
        "it: calibrate again with --compute-dtype fp16, or --device-type cpu"
    )


def test_the_dry_run_counts_the_samples_in(model: Path, stats: Path, tmp_path: Path) -> None:
    def plan(strength: float) -> RunPlan:
        recipe = make_recipe(Options(propagation=strength, **W4A8))  # type: ignore[arg-type]
        job = QuantizationJob(model, tmp_path / "out", recipe, glmq.CalibrationOptions(), stats)
        return forecast_quantization(job, overwrite=False, watch=None)

    without, with_it = plan(0.0), plan(0.5)
    tokens = sum(sample["tokens"] for sample in json.loads((stats / "statistics.json").read_text())["samples"])
    config = read_config(model)
    width = config.hidden_size
    largest = max(linear.rows for linear in config.family.text_block(config, 0).groups[2].linears) * width
    assert with_it.peak_bytes - without.peak_bytes == 4 * (2 * tokens * width + largest + 2 * width**2)
    assert with_it.output_bytes == without.output_bytes


def test_the_text_layers_are_expected_to_take_longer_and_nothing_else(model: Path) -> None:
    config = read_config(model)

    def seconds(strength: float) -> dict[str, float]:
        recipe = make_recipe(Options(propagation=strength, **W4A8))  # type: ignore[arg-type]
        with Checkpoint.open(model) as source:
            plan = plan_output(source, config, recipe, plan_groups(recipe, config), None, {})
            speed = usual_speed(recipe, TextLoad(1000, torch.float32))
            (only,) = plan_passes(source, config, recipe, plan, speed, measures=False)
        return {step.name: step.seconds for step in only.steps}

    without, with_it = seconds(0.0), seconds(0.5)
    layer = sum(
        linear.rows * linear.cols for group in config.family.text_block(config, 0).groups for linear in group.linears
    )
    for name, expected in without.items():
        more = CARRIED * 1000 * USUAL_MEETING * layer if name.startswith(LAYERS) else 0.0
        assert with_it[name] == pytest.approx(expected + more)
