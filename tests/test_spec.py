import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import PIL
import pytest
from programs import start_glmq

import glmq
from glmq.spec import TYPES, Activation, QuantType, assert_never

PACKAGE = Path(glmq.__file__).parent

CALLER = """
import glmq

def call(folder: str, flag: bool, recipe: glmq.Recipe | None, stats: glmq.CalibrationResult | None) -> None:
    quantized: glmq.QuantizationResult = glmq.quantize(folder, out="o", recipe=None, dry_run=False)
    quantized = glmq.quantize(folder, stats, out="o", recipe=recipe)
    plan: glmq.RunPlan = glmq.quantize(folder, None, out="o", recipe=None, dry_run=True)
    either = glmq.quantize(folder, "stats", out="o", recipe=recipe, resume=True, dry_run=flag)
    names = either.files if isinstance(either, glmq.RunPlan) else either.reports
    calibrated = glmq.calibrate(folder, out="o", images=None, dry_run=flag)
    seconds = calibrated.plan if isinstance(calibrated, glmq.CalibrationForecast) else calibrated.statistics
    packed = glmq.compress(folder, out="o", tp=None, dry_run=flag)
    size = packed.disk_bytes if isinstance(packed, glmq.CompressionPlan) else packed.document
    restored = glmq.restore(folder, out="o", work_dir=None, dry_run=flag)
    more = restored.output_bytes if isinstance(restored, glmq.RestorationPlan) else restored.weight_bytes
    glmq.verify(folder, reference=None, engines=[glmq.Engine.MINDIE], chip=glmq.Chip.DUO_300I, watch=None)
    try:
        glmq.quantize(folder, out="o", bits=4)
    except glmq.errors.SpaceError as error:
        print(error, quantized, plan, names, seconds, size, more)
"""
"""Calls as the Python page has them, and one that it has not."""

PLACES = {
    "checkpoint/ascend.py": 2,
    "checkpoint/compressed_config.py": 1,
    "checkpoint/compressed_tensors.py": 1,
    "checkpoint/sidecar.py": 1,
    "cli/render.py": 1,
    "numerics/int8_linear.py": 1,
    "numerics/smooth.py": 1,
    "quantization/group.py": 1,
    "quantization/options.py": 1,
    "serve/linear.py": 2,
    "verification/linears.py": 2,
}
"""Where the arithmetic, the stored tensors or the words depend on what becomes of a linear's input."""


typed = pytest.mark.skipif(
    not (Path(PIL.__file__).parent / "py.typed").exists(),
    reason="types are checked against the tested versions; this Pillow has none",
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which a kind of activation, a type of weights and callers were added, and the
    cache of mypy beside it, whose largest part is torch's: the project's own, if mypy was run there before."""
    root = tmp_path_factory.mktemp("house")
    project = Path(__file__).parents[1]
    shutil.copy(project / "pyproject.toml", root)
    if (project / ".mypy_cache").exists():
        shutil.copytree(project / ".mypy_cache", root / "cache")
    shutil.copytree(PACKAGE, root / "glmq")  # with what is compiled already
    spec = root / "glmq/spec.py"
    text = spec.read_text(encoding="utf-8")
    kind, member, row = '    NONE = "none"\n', '    W8A8SC = "W8A8SC"\n', "    QuantType.W8A8SC: TypeSpec("
    assert text.count(f'{kind}    """It stays float."""') == text.count(member) == text.count(row) == 1
    added = (
        f"    QuantType.W8A16N: TypeSpec(8, Activation.NONE, suffixes=_STEP_SUFFIXES, step_in_model_dtype=True),\n{row}"
    )
    text = text.replace(kind, f'    PER_GROUP = "per group"\n{kind}').replace(row, added)
    text = text.replace(member, f'{member}    W8A16N = "W8A16N"\n')
    spec.write_text(text, encoding="utf-8")
    page = (project / "docs/library.md").read_text(encoding="utf-8")
    (root / "glmq/caller.py").write_text(CALLER, encoding="utf-8")
    (root / "glmq/page.py").write_text(
        "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), encoding="utf-8"
    )
    return root


@pytest.fixture(scope="module")
def said(copied: Path) -> list[str]:
    """The errors that mypy finds in the copy of the package, with this project's settings."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "pyproject.toml",
        "--cache-dir",
        "cache",
        "--no-error-summary",
    ]
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if ": error:" in line]


@typed
@pytest.mark.slow
def test_mypy_names_every_place_that_a_new_kind_of_activation_must_visit_and_none_for_a_new_type(
    said: list[str],
) -> None:
    lines = [line for line in said if not line.startswith("glmq/caller.py:")]
    refused = re.compile(
        r'glmq/(\S+):\d+: error: Argument 1 to "assert_never" has incompatible type '
        r'"(?:Literal\[)?Activation\.PER_GROUP\]?"; expected "Never"'
    )
    found = [match[1] for line in lines if (match := refused.match(line))]
    assert Counter(found) == PLACES
    assert [line for line in lines if not refused.match(line)] == []


@typed
@pytest.mark.slow
def test_mypy_takes_the_calls_that_the_python_page_has_and_no_other(said: list[str]) -> None:
    refused = {int(line.split(":")[1]) for line in said if line.startswith("glmq/caller.py:")}
    assert refused == {number for number, line in enumerate(CALLER.splitlines(), start=1) if "bits=4" in line}


@pytest.mark.slow
def test_a_type_with_float_activations_is_one_row(small: Path, small_stats: Path, copied: Path, tmp_path: Path) -> None:
    """W8A16N, which the row adds, may be asked for by layer."""
    arguments = ["--model_path", small, "--stats", small_stats, "--save_directory", tmp_path / "out"]
    options = ["--layer", "*.gate_up_proj=W8A16N", "--json"]
    done = start_glmq("quantize", *arguments, *options, path=copied)
    done.check_returncode()
    rows = {row["name"]: row for row in json.loads(done.stdout)["linears"]}
    gate_up = rows["model.language_model.layers.0.mlp.gate_up_proj"]
    assert (gate_up["quant_type"], gate_up["input_range"]) == ("W8A16N", "")
    assert 0 < gate_up["output_error"] < gate_up["weight_error"] * 2 < 0.03
    described = json.loads((tmp_path / "out/quant_model_description.json").read_text())
    prefix = "model.language_model.layers.0.mlp.gate_up_proj."
    own = sorted(
        name.removeprefix(prefix) for name, value in described.items() if name.startswith(prefix) and value == "W8A16N"
    )
    assert own == ["weight", "weight_offset", "weight_scale"]


def test_every_type_has_its_row() -> None:
    assert list(TYPES) == list(QuantType)


def test_what_a_type_stores_follows_from_its_activation() -> None:
    for quant_type, spec in TYPES.items():
        if not spec.suffixes:
            continue
        assert ("input_scale" in spec.suffixes) == (spec.activation is Activation.STATIC), quant_type
        assert ("weight_scale_second" in spec.suffixes) == spec.two_stage, quant_type
        assert "weight_scale" in spec.suffixes or spec.activation is Activation.STATIC, quant_type
    assert [t for t, spec in TYPES.items() if not spec.suffixes] == [QuantType.FLOAT, QuantType.W8A8SC, QuantType.W4A16]


def test_a_case_that_nobody_wrote_is_an_error_of_the_program() -> None:
    with pytest.raises(AssertionError, match=r"<Activation\.NONE: 'none'> has no case"):
        assert_never(Activation.NONE)  # type: ignore[arg-type]
