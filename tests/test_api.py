"""`import glmq` is the API: lazy, typed, complete, and its examples run."""

import doctest
import inspect
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
from helpers import PACKAGES
from programs import forget, start

import glmq

VERBS = (
    "calibrate", "quantize", "ask", "compress", "restore", "inspect", "compare", "compare_statistics", "verify", "sweep",
)  # fmt: skip
NAMES = [
    "ActRange", "Allocation", "Answer", "AnswerPlan", "Area", "AreaBytes", "AreaEstimate", "AreaSizes", "Assessment",
    "BlockBehaviour", "BlockDone", "BlockStep", "BytesDone", "CalibrationForecast", "CalibrationOptions", "CalibrationPlan",
    "CalibrationResult", "Caption", "CaseOptions", "Check", "Chip", "Choice", "CodecKind", "CodecName", "Comparison",
    "CompressedLinear", "CompressionOptions", "CompressionPlan", "CompressionResult", "Convergence", "Divergence", "Engine",
    "Event", "FileEstimate", "Finding", "FloatDtype", "Folder", "ForeignMethod", "Form", "GlmqError", "GroupScheme",
    "HistogramPair", "Incomparable", "InputChange", "InputError", "InputSummary", "Inspection", "JsonObject", "JsonValue",
    "KeyChange", "Kind", "LayerDiff", "LayerRule", "Layout", "Limits", "LinearArithmetic", "LinearBehaviour", "LinearPlan",
    "LinearReport", "Method", "ModuleScheme", "NamePattern", "Note", "PackedWeight", "PassDone", "PassPlan", "PassStarted",
    "PassTime", "Predictions", "QuantType", "QuantizationResult", "RankTotals", "RateCurve", "Recipe", "ResourceError",
    "RestorationPlan", "RestoreResult", "RunPlan", "RunPlanned", "SamplePredictions", "SampleTokens", "Settled", "Severity",
    "Situation", "Smoothing", "StageTime", "Statistics", "StatisticsComparison", "StatisticsSummary", "StepPlan", "StepRule",
    "StoredTensor", "Sweep", "SweepFailure", "SweepOptions", "SweepRow", "Target", "TensorInfo", "TensorRow", "TensorValues",
    "Trial", "Unit", "Unsharded", "UsageError", "Variant", "Verification", "Watch", "WeightDiff", "WeightDistance",
    "WeightEstimate", "WeightScheme", "__version__", "ask", "calibrate", "compare", "compare_statistics", "compress", "errors",
    "inspect", "quantize", "restore", "sweep", "verify",
]  # fmt: skip


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert glmq.__all__ == NAMES
    assert [name for name in NAMES if name not in dir(glmq)] == []
    for name in NAMES:
        assert getattr(glmq, name) is not None
    with pytest.raises(AttributeError, match="module 'glmq' has no attribute 'quantise'"):
        glmq.quantise  # type: ignore[attr-defined]  # noqa: B018 - the attribute is the test


def test_names_are_imported_where_they_are_declared_for_the_type_checker() -> None:
    source = Path(glmq.__file__).read_text(encoding="utf-8")
    for module, names in glmq._HOMES.items():
        assert f"    from {module} import {names}\n" in source


@pytest.mark.slow
def test_importing_glmq_imports_no_library() -> None:
    code = (
        "import sys, glmq; glmq.__all__, dir(glmq), glmq.errors.InputError;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich', 'typer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGES)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_the_library_does_not_import_the_shell() -> None:
    def program() -> None:
        forget("glmq", "rich", "typer")
        library = import_module("glmq")
        assert [name for name in VERBS if not callable(getattr(library, name))] == []
        print([name for name in sys.modules if name.split(".")[0] in ("rich", "typer") or name.startswith("glmq.cli")])

    done = start(program)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(glmq.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_documents_each_of_its_parameters(verb: str) -> None:
    function = getattr(glmq, verb)
    arguments = inspect.getdoc(function).partition("Args:")[2].partition("Returns:")[0]
    documented = [
        name.strip()
        for line in arguments.splitlines()
        if line[4:5].strip()
        for name in line.partition(":")[0].split(",")
    ]
    assert documented == list(inspect.signature(function).parameters)


@pytest.fixture
def workplace(small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the examples name: the model and two pictures."""
    (tmp_path / "GLM-4.1V").symlink_to(small)
    (tmp_path / "photos").mkdir()
    for name in sorted(path.name for path in pictures.iterdir())[:2]:
        shutil.copy(pictures / name, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("all_texts")
def test_the_examples_of_the_docstrings_run_one_after_the_other(workplace: Path) -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for verb in VERBS:
        (example,) = finder.find(getattr(glmq, verb), verb, module=False, globs={})
        assert example.examples, verb
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_the_examples_of_the_library_page_run_one_after_the_other_and_nothing_else_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    page = Path(__file__).parents[1] / "docs" / "library.md"
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    assert len(examples) == 2
    for example in examples:
        exec(example, names)
    assert isinstance(names["report"], glmq.Verification)
    out, err = capfd.readouterr()
    assert (out, err) == (f"{out.splitlines()[0]}\n", "")  # what an example prints itself
    assert "compress_excutor" in out
    assert glmq.restore("w8a8sc", out="restored").folder == Path("restored")
    assert glmq.compare("w8a8s", "restored").identical
    assert glmq.inspect("w8a8sc").folder.kind.name == "PORTABLE"
    assert [names[name].folder for name in ("stats", "packed")] == [Path("stats"), Path("w8a8sc")]  # type: ignore[attr-defined]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_dry_run_gives_the_plan_and_writes_nothing(workplace: Path) -> None:
    before = sorted(workplace.iterdir())
    forecast = glmq.calibrate("GLM-4.1V", images="photos", out="stats", dry_run=True)
    plan = glmq.quantize("GLM-4.1V", out="w8a8", dry_run=True)
    assert sorted(workplace.iterdir()) == before
    assert len(forecast.plan.samples) == 4  # two pictures, two texts
    assert plan.output_bytes > 0
    glmq.calibrate("GLM-4.1V", images="photos", out="stats")
    assert {path.name: path.stat().st_size for path in (workplace / "stats").iterdir()} == dict(forecast.plan.files)


@pytest.mark.slow
def test_a_run_that_the_watcher_interrupts_is_resumed_to_the_same_result(workplace: Path) -> None:
    glmq.calibrate("GLM-4.1V", images="photos", out="whole")

    def stop_early(event: object) -> None:
        if isinstance(event, glmq.BlockDone) and event.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glmq.calibrate("GLM-4.1V", images="photos", out="stats", watch=stop_early)
    log = (workplace / ".stats.partial" / "glmq.log").read_text(encoding="utf-8")
    assert "stopped by KeyboardInterrupt" in log
    assert "calibrate: 3/5 " in log
    with pytest.raises(glmq.UsageError, match="an interrupted run of 3 finished blocks"):
        glmq.calibrate("GLM-4.1V", images="photos", out="stats")
    events: list[object] = []
    stats = glmq.calibrate("GLM-4.1V", images="photos", out="stats", resume=True, watch=events.append)
    done = [event.index for event in events if isinstance(event, glmq.BlockDone)]
    assert done == list(range(3, 5))
    assert sorted(path.name for path in stats.folder.iterdir()) == sorted(p.name for p in Path("whole").iterdir())
    for path in stats.folder.iterdir():
        assert path.read_bytes() == (workplace / "whole" / path.name).read_bytes()


def test_errors_are_those_of_errors_py_and_leave_nothing(workplace: Path) -> None:
    with pytest.raises(glmq.InputError, match=r"config\.json"):
        glmq.quantize("photos", out="w8a8")
    assert not (workplace / "w8a8").exists()


@pytest.mark.slow
def test_verbs_may_run_in_several_threads(workplace: Path) -> None:
    """The results of each are those that it has alone."""
    options = glmq.CalibrationOptions(images=workplace / "photos", limit=1, texts=False)
    stats = glmq.calibrate("GLM-4.1V", options=options, out="stats")
    alone = glmq.quantize("GLM-4.1V", stats, out="alone")
    cases = glmq.CaseOptions(images=workplace / "photos", limit=1)
    wanted = glmq.verify("alone", reference="GLM-4.1V", cases=cases).predictions
    with ThreadPoolExecutor(4) as pool:
        calibrated = [pool.submit(glmq.calibrate, "GLM-4.1V", options=options, out=f"stats-{i}") for i in range(2)]
        quantized = [pool.submit(glmq.quantize, "GLM-4.1V", stats, out=f"w8a8-{i}") for i in range(2)]
        verified = [pool.submit(glmq.verify, "alone", reference="GLM-4.1V", cases=cases) for _ in range(2)]
    for run in calibrated:
        assert run.result().statistics.digest == stats.statistics.digest
    for run in quantized:
        assert run.result().document["checksums"] == alone.document["checksums"]
    for run in verified:
        assert run.result().predictions == wanted
