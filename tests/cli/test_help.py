"""`--help` holds at every width, its examples run, the shell completes it, and presets are the flags that they print."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from cli.command_line import commands, glmq, run
from helpers import tree
from random_w8a8s import write_stand_in

from glmq.cli.app import app
from glmq.cli.help import Tier, entries, examples, help_of_verb
from glmq.cli.presets import PRESETS, PresetName, flags_of
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import QuantType

VERBS = {str(verb.callback.__name__): verb.callback for verb in app.registered_commands if verb.callback}
VENDOR = (
    "--model-path", "--calib-images", "--save-directory", "--part-file-size", "--w-bit", "--a-bit", "--device-type",
    "--trust-remote-code", "--anti-method", "--act-method", "--open-outlier", "--is-dynamic", "--is-lowbit", "--co-sparse",
    "--fraction", "--do-smooth", "--use-sigma", "--sigma-factor", "--torch-dtype", "--group-size", "--mindie-format",
)  # fmt: skip


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *args: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return glmq(*args).stdout.splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("verb", VERBS)
def test_no_line_is_too_wide_and_no_word_is_broken(verb: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, width, verb, "--help-all")
    examples_of = {f"    {line}" for line in examples(VERBS[verb])}
    assert [line for line in lines if len(line) > width and line not in examples_of] == []
    words = set(" ".join(lines).split())
    for entry in entries(VERBS[verb]):
        assert set(entry.text.split()) <= words
        assert not entry.default or entry.default in " ".join(" ".join(lines).split())
        assert all(
            on in "\n".join(lines).replace("[no-]", "") for on in re.findall(r"--[a-z0-9-]+", entry.spellings[0])[:1]
        )
    assert not {"<bool>", "…"} & words


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_is_one_page_with_what_is_required_first(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 80, verb, "--help")
    assert len(lines) <= 60
    assert all(len(line) <= 80 for line in lines)
    titles = [line for line in lines if line in {tier.value for tier in Tier}]
    assert titles == [tier.value for tier in Tier if tier.value in titles]
    assert lines[0].startswith(f"Usage: root {verb}")  # the name of the program in the process of the tests
    rest = len(entries(VERBS[verb])) - sum(entry.tier is not None for entry in entries(VERBS[verb]))
    assert f"root {verb} --help-all shows {rest} more option{'' if rest == 1 else 's'}." in " ".join(
        " ".join(lines).split()
    )


def test_the_flags_of_the_vendor_are_marked_as_such() -> None:
    marked = [entry for entry in entries(VERBS["quantize"]) if entry.tier in (Tier.VENDOR, Tier.REQUIRED)]
    assert {entry.spellings[0].partition("/")[0] for entry in marked} == set(VENDOR)


def made_up(
    source: Annotated[Path, typer.Argument(help="Where from.", metavar="IN")],
    out: Annotated[Path, typer.Option("--out", help="Where to.")],
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "--multiprocess-num", "-j", min=1, help="How many.", show_default="the cores", envvar="JOBS"
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16"], typer.Option("--dtype", help="Kept. Not computed."), Tier.VENDOR
    ] = "bf16",
    share: Annotated[float, typer.Option("--share", min=0, max=1, help="How much.", rich_help_panel="Further")] = 0.5,
    form: Annotated[
        Literal["ascendv1", "mindie"], typer.Option("--form", help="A long sentence about the form of it."), Tier.USUAL
    ] = "mindie",
    fast: Annotated[bool, typer.Option("--fast/--no-fast", help="Be quick."), Tier.USUAL] = True,
) -> None:
    """Do it,
    really.

    So:

        glmq made-up IN --out OUT
    """


def test_a_page_of_help_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert help_of_verb("glmq made-up", made_up, "The end.", everything=True) == (
        """Usage: glmq made-up IN --out PATH [OPTIONS]

Do it, really.

So:

    glmq made-up IN --out OUT

Required
  IN          Where from.
  --out PATH  Where to.

Usual
  --form WORD  A long sentence about the form of it. [one of
               ascendv1, mindie; default: mindie]
  --[no-]fast  Be quick. [default: on]

Flags of the vendor's quant_glm41v.py, with the same meaning
  --dtype bf16|fp16  Kept. Not computed. [default: bf16]

Options
  -j, --jobs, --multiprocess-num N
      How many. [from 1; default: the cores; env: JOBS]

Further
  --share N  How much. [from 0 to 1; default: 0.5]

Dashes and underscores in options are alike; flags take True
and False.

The end.
"""
    )
    short = help_of_verb("glmq made-up", made_up, "The end.", everything=False)
    assert "  --dtype bf16|fp16  Kept. [default: bf16]\n\nglmq made-up --help-all shows 2 more options." in short
    assert "The end." not in short


def test_all_of_the_help_can_be_asked_for_in_every_spelling() -> None:
    whole = glmq("quantize", "--help-all").stdout
    for args in (
        ("quantize", "--help_all"),
        ("help", "quantize", "--help-all"),
        ("quantize", "--w_bit", 9, "--help-all"),
    ):
        assert glmq(*args).stdout == whole
    assert glmq("--help-all").stdout == glmq("--help").stdout


def test_help_has_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in glmq("quantize", "--help").stdout
    assert "\x1b[36m\x1b[1m--w-bit N\x1b[0m" in help_of_verb("glmq quantize", VERBS["quantize"], "", everything=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in help_of_verb("glmq quantize", VERBS["quantize"], "", everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if examples(VERBS[verb])])
def test_the_examples_of_the_help_run(
    verb: str,
    small: Path,
    small_stats: Path,
    small_seed: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a small model and one picture, each example after the other in one folder."""
    (tmp_path / "OUTPUTS").mkdir()
    (tmp_path / "PHOTOS").mkdir()
    shutil.copy(min(pictures.iterdir()), tmp_path / "PHOTOS")
    (tmp_path / "W8A8S").symlink_to(small_seed)
    (tmp_path / "FLOAT").symlink_to(small)
    if verb == "sweep":
        (tmp_path / "STATS").symlink_to(small_stats)
    (tmp_path / "RECIPES.toml").write_text('[[recipe]]\npreset = "800i-a2"\n')
    monkeypatch.setenv("GLMQ_EXECUTOR", str(write_stand_in(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for line in examples(VERBS[verb]):
        words = shlex.split(line.replace("torchrun --nproc_per_node 2 -m ", ""))
        quickly = {
            "quantize": ["--stats", str(small_stats), "--overwrite"],
            "calibrate": ["--no-texts"],
            "sweep": ["--no-kl"],
            "ask": ["--max-new-tokens", "4"],
        }.get(verb, [])
        result = run(*words[1:], *quickly, *(["--overwrite"] if verb == "compress" else []))
        assert result.exit_code == 0, (line, result.output)


def completions(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    command = commands()
    context = command.make_context("glmq", list(words[:1]), resilient_parsing=True)
    _, verb, rest = command.resolve_command(context, list(words[:-1]))
    inner = verb.make_context(words[0], rest, parent=context, resilient_parsing=True)
    return [item.value for item in verb.shell_complete(inner, words[-1])]


def test_a_shell_completes_options_in_the_spelling_that_was_begun() -> None:
    assert completions("quantize", "--model_") == ["--model_path"]
    assert completions("quantize", "--model-") == ["--model-path"]
    assert completions("quantize", "--is_lowbit", "maybe", "--no_use_s") == ["--no_use_sigma"]
    assert {"--model-path", "--save-directory", "--help"} <= set(completions("quantize", "--"))


def test_a_shell_completes_values_behind_both_spellings() -> None:
    assert completions("quantize", "--torch_dtype", "") == ["bf16", "fp16"]
    assert completions("quantize", "--preset", "300") == ["300i-duo"]


@pytest.mark.slow
def test_completion_works_through_the_program_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_GLMQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "glmq quantize --model_")
    monkeypatch.setenv("COMP_CWORD", "2")
    from typer.testing import CliRunner

    assert CliRunner().invoke(app, [], prog_name="glmq").stdout == "--model_path\n"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_flags_of_the_vendor_that_make_a_recipe(name: PresetName) -> None:
    assert {f"--{flag.replace('_', '-')}" for flag in PRESETS[name].flags} <= set(VENDOR)
    recipe = make_recipe(Options(**PRESETS[name].flags))  # type: ignore[arg-type]
    assert PRESETS[name].what.startswith(recipe.quant_type.value)


@pytest.mark.parametrize("name", PRESETS)
def test_the_examples_of_layer_are_taken_where_the_help_says_so(name: PresetName) -> None:
    text = next(entry.text for entry in entries(VERBS["quantize"]) if entry.spellings == ("--layer",))
    everywhere, dense = re.findall(r"'([^']+)'", text)
    options = Options(**PRESETS[name].flags, layer=(everywhere,))  # type: ignore[arg-type]
    assert make_recipe(options).rules[-1].pattern == "*.layers.0.*"
    if name != "300i-duo":
        assert make_recipe(replace(options, layer=(dense,))).rules[-1].quant_type is QuantType.W8A8


@pytest.mark.slow
def test_a_preset_writes_the_bytes_of_its_flags_and_says_which_they_are(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    by_hand, preset = tmp_path / "by-hand", tmp_path / "preset"
    common = ("quantize", "--model_path", small, "--stats", small_stats, "--save_directory")
    flags = "--w_bit 4 --a_bit 8 --anti_method m2 --is_lowbit True --fraction 0.01 --use_sigma True --torch_dtype fp16"
    glmq(*common, by_hand, *flags.split(), "-q")
    said = glmq(*common, preset, "--preset", "300i-duo").stderr
    assert f"preset 300i-duo: {flags}\n" in said
    assert tree(preset) == tree(by_hand)


def test_other_options_count_more_than_a_preset_and_are_named(tmp_path: Path) -> None:
    given = ("quantize", "--model_path", tmp_path / "none", "--save_directory", "o", "--preset", "800i-a2")
    result = run(*given, "--torch_dtype", "fp16", "--act_method", 1)
    assert result.stderr.splitlines()[0] == (
        "preset 800i-a2: --w_bit 8 --a_bit 8 --anti_method m2 --act_method 2 --torch_dtype bf16; but --act_method 1 "
        "--torch_dtype fp16"
    )
    assert result.exit_code == 4
    file = tmp_path / "run.toml"
    file.write_text('preset = "300i-duo"\ntorch_dtype = "bf16"\n')
    dumped = glmq(*given[:5], "--config", file, "--use_sigma", "False", "--dump-config").stdout.splitlines()
    assert {'preset = "300i-duo"', 'torch_dtype = "bf16"', "use_sigma = false", "w_bit = 4"} <= set(dumped)
    assert run(*given, "--dry-run", "--json").stderr == ""


def test_the_presets_are_listed_and_another_name_is_wrong_usage() -> None:
    lines = glmq("quantize", "--list-presets").stdout.splitlines()
    assert lines[:2] == [
        "300i-duo: W8A8S for MindIE on the Atlas 300I Duo; `glmq compress` makes W8A8SC of it",
        f"    {flags_of('300i-duo')}",
    ]
    assert len(lines) == 2 * len(PRESETS)
    result = run("quantize", "--list-presets", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["message"]) == (
        2, "--list-presets: presets are printed as text; drop --json"
    )  # fmt: skip
    result = run("quantize", "--model_path", "m", "--save_directory", "o", "--preset", "300i")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --preset: ")


@pytest.mark.parametrize(
    ("verb", "options", "lines"),
    [
        (
            "calibrate",
            ("--model-path", "m", "--stats", "s", "--limit", "3"),
            {'stats = "s"', "limit = 3", "texts = true"},
        ),
        ("compress", ("IN", "OUT", "--tp", "2"), {'folders = ["IN", "OUT"]', "tp = 2", 'codec = "auto"'}),
    ],
)
def test_other_verbs_dump_and_read_their_options_too(
    verb: str, options: tuple[str, ...], lines: set[str], tmp_path: Path
) -> None:
    dumped = glmq(verb, *options, "--dump-config").stdout
    assert lines <= set(dumped.splitlines())
    file = tmp_path / "run.toml"
    file.write_text(dumped)
    assert glmq(verb, "--config", file, "--dump-config").stdout == dumped
