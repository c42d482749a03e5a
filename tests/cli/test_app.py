import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cli.command_line import glmq, run
from helpers import PACKAGES, loaded_after

from glmq.version import __version__

VERBS = ("calibrate", "quantize", "compress", "demo")


@pytest.mark.slow
def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from glmq.cli.app import app\n"
        f"for verb in ([], *([verb] for verb in {VERBS!r})):\n"
        "    try:\n"
        "        app([*verb, '--help'])\n"
        "    except SystemExit as end:\n"
        "        heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'PIL'} & set(sys.modules)\n"
        "        print(*verb, end.code, sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGES)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["0 []", *(f"{verb} 0 []" for verb in VERBS)]
    assert done.stdout.count("Usage:") == 1 + len(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("glmq.cli.app", ("torch", "transformers", "numpy", "safetensors", "PIL")),
        ("glmq.cli.inspect_view", ("torch", "transformers", "numpy")),
    ],
)
def test_importing_the_shell_stays_light(module: str, absent: tuple[str, ...]) -> None:
    assert loaded_after(module, absent) == []


def test_the_overview_names_every_verb_and_the_exit_codes() -> None:
    text = run("--help").stdout
    assert all(verb in text for verb in VERBS)
    joined = " ".join(text.split())
    assert "0 done, 1 unexpected failure, 2 wrong usage, 3 verify found problems, 4 bad input" in joined
    assert "130 Ctrl-C, 143 terminated" in joined


def test_without_a_verb_the_overview_is_shown() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("spelling", ["-h", "--help"])
def test_both_spellings_of_help_work_for_a_verb(spelling: str) -> None:
    result = run("quantize", spelling)
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_the_help_of_quantize_lists_every_parameter_of_the_vendors_tool() -> None:
    text = run("quantize", "--help").stdout
    for name in (
        "model-path", "calib-images", "save-directory", "part-file-size", "w-bit", "a-bit", "device-type",
        "trust-remote-code", "anti-method", "act-method", "open-outlier", "is-dynamic", "is-lowbit", "co-sparse",
        "fraction", "do-smooth", "use-sigma", "sigma-factor", "torch-dtype", "group-size", "mindie-format",
    ):  # fmt: skip
        assert f"--{name}" in text or f"--[no-]{name}" in text


def test_the_version_comes_with_those_of_the_libraries() -> None:
    result = run("--version")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"glmq {__version__}"
    assert f"torch {metadata.version('torch')}" in lines
    assert [line.split()[0] for line in lines] == ["glmq", "torch", "transformers", "safetensors", "torch-npu"]


def test_an_unknown_verb_is_wrong_usage() -> None:
    result = run("quantise")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: quantise: no such verb, did you mean quantize; see `root --help`\n"


@pytest.mark.parametrize("args", [("help",), ("help", "quantize")])
def test_help_is_a_command_too(args: tuple[str, ...]) -> None:
    assert glmq(*args).output == glmq(*args[1:], "--help").output


def test_the_version_has_a_short_option() -> None:
    assert glmq("-V").output == glmq("--version").output


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("quantise",), "quantise: no such verb, did you mean quantize; see `root --help`"),
        (("--fast",), "--fast: no such option; see `root --help`"),
        (("quantize",), "--model-path: missing; see `root quantize --help`"),
        (("ask",), "FOLDER: missing; see `root ask --help`"),
        (("ask", "a", "b"), "b: not expected; see `root ask --help`"),
        (("ask", "a", "--prompt"), "--prompt: a value is needed; see `root ask --help`"),
        (("ask", "a", "--pompt", "x"), "--pompt: no such option, did you mean --prompt; see `root ask --help`"),
        (("compress", "a", "b", "--tp", 0), "--tp 0: at least 1 is needed"),
        (
            ("quantize", "--model_path", "m", "--save_directory", "o", "--fraction", "x"),
            "--fraction x: a number is needed",
        ),
        (("compress", "a", "b", "--codec", "zip"), "--codec: 'zip' is not one of 'auto', 'portable', 'ascend'"),
        (("verify",), "CANDIDATE: missing; give the folder of a quantized or compressed checkpoint"),
    ],
)
def test_wrong_usage_is_one_sentence(args: tuple[str, ...], sentence: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("word", "dtype"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_torchs_names_of_dtypes_are_taken(word: str, dtype: str, tmp_path: Path) -> None:
    for option in (("--torch_dtype", word), (f"--torch-dtype={word}",)):
        result = glmq("quantize", "--model_path", tmp_path, "--save_directory", "o", *option, "--dump-config")
        assert f'torch_dtype = "{dtype}"' in result.stdout


def test_the_name_of_a_model_on_a_hub_is_told_how_to_fetch_it() -> None:
    result = run("quantize", "--model_path", "zai-org/GLM-4.1V-9B-Thinking", "--save_directory", "o")
    assert (result.exit_code, result.stderr) == (
        4,
        "error: zai-org/GLM-4.1V-9B-Thinking: no such folder; give the folder of the float weights as --model_path (glmq "
        "downloads nothing: `hf download zai-org/GLM-4.1V-9B-Thinking --local-dir DIR` or `modelscope download "
        "zai-org/GLM-4.1V-9B-Thinking --local_dir DIR`)\n",
    )
    for verb in ("inspect", "verify"):
        assert run(verb, "zai-org/GLM").stderr == (
            "error: zai-org/GLM: is not a folder; give the folder that holds config.json and the weights (glmq downloads "
            "nothing: `hf download zai-org/GLM --local-dir DIR` or `modelscope download zai-org/GLM --local_dir DIR`)\n"
        )


def test_verify_of_statistics_says_so(small_stats: Path) -> None:
    result = run("verify", small_stats)
    assert (result.exit_code, result.stdout) == (4, "")
    assert (
        result.stderr
        == f"error: {small_stats}: holds calibration statistics, no weights; give a quantized checkpoint\n"
    )


def test_verify_of_a_float_checkpoint_says_so(tiny: Path) -> None:
    result = run("verify", tiny)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == (
        f"error: {tiny}: is a float checkpoint, verify checks quantized ones; give what `glmq quantize` wrote, and this folder "
        "as --reference\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import os, sys, glmq.cli.app; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{spins} False\n"  # torch reads it as it is imported
