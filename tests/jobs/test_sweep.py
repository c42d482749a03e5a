"""A sweep: rows of size and error that equal those of the verbs alone, and nothing left but reports."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import refused

import glmq
from glmq.calibration.samples import builtin_texts, digest
from glmq.calibration.stats import Statistics
from glmq.checkpoint.journal import Journal
from glmq.errors import UsageError
from glmq.jobs.quantize import quantize
from glmq.jobs.sweep import SweepJob, forecast_sweep, run_sweep
from glmq.jobs.sweep_recipes import SweepOptions, Variant, check_variants
from glmq.jobs.sweep_samples import describe_samples, find_samples
from glmq.jobs.verify import CaseOptions, load_cases
from glmq.jobs.watcher import Watcher
from glmq.progress import Event, Note, PassStarted, RunPlanned
from glmq.quantization.options import Options
from glmq.quantization.recipe import Recipe, make_recipe
from glmq.reporting.sweeps import Sweep, pareto_front, sweep_document

SPARSE = Variant("3-bits", Recipe.w8a8s(target_bits=3.0))
DENSE = Variant("w8a8", Recipe.w8a8(), fallback_topk=1)


@pytest.fixture(scope="module")
def job(small: Path, small_stats: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepJob:
    """Of the small model, with KL on one picture."""
    cases = CaseOptions(images=pictures, limit=1)
    out = tmp_path_factory.mktemp("sweep") / "out"
    return SweepJob(small, small_stats, out, (SPARSE, DENSE), SweepOptions(cases=cases))


@pytest.fixture(scope="module")
def events() -> list[Event]:
    """What the sweep of `swept` tells."""
    return []


@pytest.fixture(scope="module")
def swept(job: SweepJob, events: list[Event]) -> Sweep:
    """The sweep itself."""
    return run_sweep(job, overwrite=False, resume=False, watch=events.append)


def timeless(found: Sweep) -> dict[str, object]:
    """What equal sweeps share: all but where the reports lie, commands that say so, and times."""
    document = dict(sweep_document(found))
    del document["seconds"], document["folder"]
    return document | {"rows": [{**row, "seconds": 0, "command": ""} for row in document["rows"]]}


def test_nothing_is_left_but_reports(swept: Sweep) -> None:
    assert sorted(os.listdir(swept.folder.parent)) == ["out"]
    assert sorted(os.listdir(swept.folder)) == ["glmq_sweep.csv", "glmq_sweep.html", "glmq_sweep.json"]
    assert json.loads((swept.folder / "glmq_sweep.json").read_text()) == sweep_document(swept)
    assert len((swept.folder / "glmq_sweep.csv").read_text().splitlines()) == 1 + len(swept.rows)


@pytest.mark.slow
def test_a_row_says_what_quantize_and_verify_say(
    swept: Sweep, job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.jobs.side_by_side.CAPTIONS", 0)
    made = quantize(job.model_path, job.stats_path, out=tmp_path / "w", recipe=SPARSE.recipe)
    row = next(row for row in swept.rows if row.name == "3-bits")
    errors = sorted(one.output_error for one in made.reports)
    assert (row.worst_error, row.quant_type, row.dtype) == (errors[-1], "W8A8S", "float16")
    assert row.median_error == (errors[len(errors) // 2] + errors[(len(errors) - 1) // 2]) / 2
    assert row.output_bytes == sum(area.after for area in made.areas)
    weights = sum(one.rows * one.cols for one in made.reports)
    saved = sum(one.rows * one.cols * (8 - one.entropy_bits) / 8 for one in made.reports)
    assert (row.expected_bytes, row.kept_float) == (row.output_bytes - int(saved), len(made.document["kept_float"]))
    assert row.bits == pytest.approx(8 - 8 * saved / weights, abs=1e-9)
    verified = glmq.verify(tmp_path / "w", reference=job.model_path, cases=job.options.cases).predictions
    assert verified is not None
    assert row.divergence is not None
    assert (row.divergence.kl, row.divergence.kl_error) == (verified.kl, verified.kl_error)
    assert (row.divergence.top1, row.divergence.positions) == (verified.top1, verified.positions)


def test_the_float_model_runs_once_and_each_checkpoint_once(swept: Sweep, events: list[Event]) -> None:
    passes = [event.title for event in events if isinstance(event, PassStarted)]
    assert passes == [
        *(
            "float model",
            "3-bits: rate",
            "3-bits: quantize",
            "3-bits: KL",
            "w8a8: measure",
            "w8a8: quantize",
            "w8a8: KL",
        )
    ]
    assert [[one.title for one in event.passes] for event in events if isinstance(event, RunPlanned)] == [passes]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[:2] == [
        "KL: on 1 picture; the statistics were taken from 4 samples",
        "w8a8: 3 linears stay float; the same by hand:",
    ]
    assert swept.samples == ("00.png",)


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
def test_a_sweep_that_is_stopped_again_and_again_ends_with_the_same_rows(
    swept: Sweep, job: SweepJob, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every second line that any of its journals gets."""
    options, variants = (SweepOptions(tmp_path / "keep", kl=False), (DENSE,)) if keeps else (job.options, job.variants)
    again = replace(job, out_path=tmp_path / "out", options=options, variants=variants)
    record, stops, lines = Journal.record, 0, 0

    def stop(self: Journal, block: str, payload: dict[str, object]) -> None:
        nonlocal lines
        record(self, block, payload)
        lines += 1
        if lines % 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", stop)
    found = None
    while found is None and stops < 100:
        try:
            found = run_sweep(again, overwrite=False, resume=True, watch=None)
        except KeyboardInterrupt:
            stops += 1
            assert not (tmp_path / "out").exists()
    assert found is not None
    # The row; of its quantization 2 blocks that are rated or measured, and 5 that are written; once it is made, or its curves.
    if keeps:
        assert lines == 1 + 2 + 5 + 1
        assert replace(found.rows[0], divergence=None, seconds=0, command="") == replace(
            swept.rows[-1], divergence=None, seconds=0, command=""
        )
        assert sorted(os.listdir(tmp_path)) == ["keep", "out"]
    else:
        assert lines == 1 + (1 + 2 + 5 + 1) + (1 + 2 + 5)
        assert timeless(found) == timeless(swept)
        assert os.listdir(tmp_path) == ["out"]


def test_resuming_with_other_samples_names_both(job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Journal, block: str, payload: dict[str, object]) -> None:
        record(self, block, payload)
        raise KeyboardInterrupt

    record = Journal.record
    monkeypatch.setattr(Journal, "record", stop)
    again = replace(job, out_path=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(again, overwrite=False, resume=False, watch=None)
    cases = again.options.cases
    for chosen, had, has in (
        (replace(cases, max_pixels=4000), "no --max-pixels", "--max-pixels 4000"),
        (replace(cases, limit=2), "--limit 1", "--limit 2"),
    ):
        other = replace(again, options=replace(again.options, cases=chosen))
        assert refused(lambda: run_sweep(other, overwrite=False, resume=True, watch=None)) == (  # noqa: B023 - called here
            2,
            f"--resume: the unfinished run in {tmp_path}/.out.partial had {had}, this one has {has}; run with the same, or "
            "start again with --overwrite",
        )
    assert refused(lambda: run_sweep(again, overwrite=False, resume=False, watch=None)) == (
        2,
        f"{tmp_path}/out: an interrupted run of 1 finished block lies beside it, in .out.partial; run the same command with "
        "--resume to continue it, or with --overwrite to start again",
    )


@pytest.mark.slow
def test_a_recipe_that_cannot_be_made_is_said_and_the_others_go_on(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(curves: object, target: float) -> list[float]:
        raise UsageError(f"a mean of {target} bits per weight was asked for")

    monkeypatch.setattr("glmq.quantization.bits.solve_bits", refuse)
    few = Variant("few", Recipe.w8a8s(target_bits=0.5))
    mixed = replace(job, out_path=tmp_path / "out", variants=(few, DENSE), options=SweepOptions(kl=False))
    found = run_sweep(mixed, overwrite=False, resume=False, watch=None)
    assert [row.name for row in found.rows] == ["w8a8"]
    ((name, reason),) = ((one.name, one.reason) for one in found.failures)
    assert (name, reason) == ("few", "a mean of 0.5 bits per weight was asked for")
    alone = replace(mixed, out_path=tmp_path / "alone", variants=(few,))
    assert refused(lambda: run_sweep(alone, overwrite=False, resume=False, watch=None)) == (2, reason)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_forecast_says_bytes_and_time_and_writes_nothing(swept: Sweep, job: SweepJob, tmp_path: Path) -> None:
    plan = forecast_sweep(replace(job, out_path=tmp_path / "out"), overwrite=False, watch=None)
    assert {row.name: row.output_bytes for row in plan.rows}.keys() == {row.name for row in swept.rows}
    assert plan.disk_bytes == max(row.output_bytes for row in plan.rows)
    assert plan.samples == swept.samples
    assert plan.seconds == sum(row.seconds for row in plan.rows) + 3 * plan.kl_seconds > 0
    assert (plan.obstacles, os.listdir(tmp_path)) == ((), [])
    over = forecast_sweep(job, overwrite=False, watch=None)
    assert over.obstacles == (
        f"{job.out_path}: is not empty; choose another folder, or pass --overwrite to replace its contents",
    )


def test_a_front_holds_what_no_other_point_beats() -> None:
    assert pareto_front([]) == ()
    assert pareto_front([(1, 1.0)]) == (True,)
    assert pareto_front([(1, 3.0), (2, 2.0), (2, 2.5), (3, 2.0), (4, 1.0)]) == (True, True, False, False, True)
    assert pareto_front([(1, 1.0), (1, 1.0)]) == (True, True)
    assert pareto_front([(1, 1.0), (2, float("inf"))]) == (True, False)


@pytest.mark.parametrize(
    ("variants", "sentence"),
    [
        ((), "no recipe to sweep over; give a TOML file of [[recipe]] tables, --target-bits, or both"),
        (
            (Variant("a/b", Recipe.w8a8()),),
            "recipe 1: the name 'a/b' cannot be a folder's; take letters, digits, _ . and -, at most 60",
        ),
        ((SPARSE, replace(DENSE, name="3-bits")), "recipes 1 and 2 are both named 3-bits; give one another name"),
        (
            (
                SPARSE,
                Variant("b", make_recipe(Options(w_bit=4, is_lowbit=True, torch_dtype="fp16", target_ratio=0.375))),
            ),
            "recipes 1 (3-bits) and 2 (b) are the same; drop one of them",
        ),
    ],
)
def test_recipes_that_cannot_stand_side_by_side_are_refused(variants: tuple[Variant, ...], sentence: str) -> None:
    assert refused(lambda: check_variants(variants)) == (2, sentence)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tiny: Path, job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(other: SweepJob) -> tuple[int, str]:
        return refused(lambda: run_sweep(other, overwrite=False, resume=False, watch=None))

    here = replace(job, out_path=tmp_path / "out")
    assert said(replace(here, options=SweepOptions(keep=tmp_path / "out"))) == (
        2,
        f"{tmp_path}/out: is the folder of the weights that stay; choose another --out",
    )
    (tmp_path / "keep" / "w8a8").mkdir(parents=True)
    (tmp_path / "keep" / "w8a8" / "glmq_report.json").touch()
    keeping = replace(here, options=SweepOptions(keep=tmp_path / "keep", kl=False))
    taken = f"{tmp_path}/keep/w8a8: is not empty; choose another folder, or pass --overwrite to replace its contents"
    assert said(keeping) == (2, taken)
    assert refused(lambda: run_sweep(keeping, overwrite=False, resume=True, watch=None)) == (2, taken)
    assert forecast_sweep(keeping, overwrite=False, watch=None).obstacles == (taken,)
    wrong = Variant("wrong", make_recipe(Options(keep_float=("*.no_such",))))
    code, sentence = said(replace(here, variants=(DENSE, wrong)))
    assert code == 2
    assert sentence.startswith("recipe 'wrong': --keep-float '*.no_such' matches none of the model's")
    code, sentence = said(replace(here, model_path=tiny))
    assert code == 4
    assert "these statistics come from another checkpoint" in sentence
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert said(here) == (2, "glmq sweep: needs no torchrun, one process goes through all recipes; run it alone")
    assert os.listdir(tmp_path) == ["keep"]


@pytest.mark.parametrize(
    ("cases", "sentence"),
    [
        (CaseOptions(recursive=True), "--recursive has no effect without --calib-images; drop it"),
        (CaseOptions(prompt="hi"), "--prompt has no effect without --calib-images; drop it"),
        (CaseOptions(cases=Path("a.jsonl"), prompt="hi"), "--prompt has no effect without --calib-images; drop it"),
    ],
    ids=str,
)
def test_options_of_pictures_are_refused_without_pictures(cases: CaseOptions, sentence: str, small_stats: Path) -> None:
    assert refused(lambda: find_samples(cases, Statistics.open(small_stats), Watcher(None))) == (2, sentence)


def test_pictures_and_texts_are_counted_apart(pictures: Path) -> None:
    (picture,), text = load_cases(CaseOptions(images=pictures, limit=1), Watcher(None)), builtin_texts()[0]
    assert describe_samples([picture, text, picture]) == "2 pictures and 1 text"
    assert describe_samples([text, text]) == "2 texts"


def test_the_samples_of_the_statistics_are_found_again_by_their_checksums(small_stats: Path) -> None:
    statistics = Statistics.open(small_stats)
    found = find_samples(CaseOptions(limit=2), statistics, Watcher(None))
    assert [sample.name for sample in found] == ["texts.jsonl:7", "texts.jsonl:8"]  # the limit counts pictures
    entries = statistics.manifest["samples"]
    entries[-1]["generated"] = {"ids": [5, 6], "text": "ab"}
    (*_, last) = find_samples(CaseOptions(limit=2), statistics, Watcher(None))
    assert last.generated is not None
    assert (last.generated.ids, digest(found, None)) == ((5, 6), digest((*found[:-1], last), None))
    statistics.manifest["samples"] = entries[:2]
    assert refused(lambda: find_samples(CaseOptions(), statistics, Watcher(None))) == (
        2,
        f"KL: none of the 2 samples that the statistics in {small_stats} were taken from came with glmq; name pictures with "
        "--calib-images or samples with --cases, or leave KL out with --no-kl",
    )
