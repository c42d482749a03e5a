"""`glmq sweep`: recipes as users write them, and commands that make the checkpoints of their rows."""

import json
import re
import shlex
from pathlib import Path

import pytest
from cli.command_line import glmq, run
from helpers import refused, tree

from glmq.checkpoint.journal import Journal
from glmq.cli.sweep_recipes import RecipeReader
from glmq.quantization.flags import recipe_flags
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import QuantType

RECIPES = """
[[recipe]]
name = "few"
preset = "300i-duo"
target-bits = 3

[[recipe]]
is_dynamic = true
keep_float = ["*.o_proj"]
max_error = 0.5
"""


@pytest.fixture
def reader() -> RecipeReader:
    return RecipeReader()


def test_a_file_of_recipes_is_read_as_quantize_reads_its_options(reader: RecipeReader, tmp_path: Path) -> None:
    file = tmp_path / "recipes.toml"
    file.write_text(
        RECIPES + '[[recipe]]\nw_bit = 4\na_bit = 16\nformat = "compressed-tensors"\ntorch_dtype = "float16"\n'
    )
    first, second, third = reader.read_file(file)
    sparse = Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16", target_bits=3.0)
    assert (first.name, first.recipe) == ("few", make_recipe(sparse))
    assert (second.name, second.max_error) == ("2-w8a8_dynamic", 0.5)
    assert second.recipe == make_recipe(Options(is_dynamic=True, keep_float=("*.o_proj",)))
    assert second.flags == ["--is_dynamic", "True", "--keep-float", "*.o_proj", "--max-error", "0.5"]
    packed = Options(w_bit=4, a_bit=16, format="compressed-tensors", torch_dtype="fp16")
    assert (third.name, third.recipe) == ("3-w4a16", make_recipe(packed))


def test_a_list_of_bits_is_a_recipe_each(reader: RecipeReader) -> None:
    found = reader.read_bits("2.5, 3,3.25", "300i-duo")
    assert [(one.name, one.recipe.target_bits) for one in found] == [
        ("2.5-bits", 2.5), ("3-bits", 3.0), ("3.25-bits", 3.25),
    ]  # fmt: skip
    assert {one.recipe.quant_type for one in found} == {QuantType.W8A8S}
    assert recipe_flags(reader.read_bits("6", "800i-a2")[0].recipe) == ["--target-bits", "6"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "{file}: holds no recipe; each begins with a line [[recipe]], options of quantize follow"),
        ("recipe = 3", "{file}: holds no recipe; each begins with a line [[recipe]], options of quantize follow"),
        ("w_bit = 4", "{file}: unknown key 'w_bit'; recipes stand below lines [[recipe]]"),
        ("[[recipe]]\nw_bits = 4", "{file}, recipe 1: unknown key 'w_bits'; did you mean 'w_bit'?"),
        ("[[recipe]]\n[[recipe]]\nname = 3", "{file}, recipe 2: name 3: a text is needed"),
        ('[[recipe]]\nw_bit = "four"', "{file}, recipe 1: --w_bit four: a whole number is needed"),
        ("[[recipe]]\ntarget_bits = 9", "{file}, recipe 1: --target_bits 9: at most 8 is needed"),
        (
            "[[recipe]]\npreset = '300i'",
            "{file}, recipe 1: --preset: '300i' is not one of '300i-duo', '800i-a2', '800i-a2-dynamic', '800i-a2-w8a16'",
        ),
        (
            "[[recipe]]\nw_bit = 5",
            "{file}, recipe 1: --w_bit 5: 4 or 8 is needed",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_a_sentence(
    content: str, sentence: str, reader: RecipeReader, tmp_path: Path
) -> None:
    file = tmp_path / "recipes.toml"
    file.write_text(content)
    assert refused(lambda: reader.read_file(file)) == (2, sentence.format(file=file))


def test_a_file_that_is_no_toml_is_refused(reader: RecipeReader, tmp_path: Path) -> None:
    file = tmp_path / "recipes.toml"
    file.write_text("[[recipe")
    code, sentence = refused(lambda: reader.read_file(file))
    assert code == 2
    assert sentence.startswith(f"{file}: is not TOML (")


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        ("2.5;3", "--target-bits 2.5;3: numbers with commas between them are needed, like 2.5,3,3.5"),
        ("", "--target-bits : numbers with commas between them are needed, like 2.5,3,3.5"),
        ("3,9", "--target-bits 9.0: at most 8 is needed"),
    ],
)
def test_bits_that_are_none_are_said(bits: str, sentence: str, reader: RecipeReader) -> None:
    assert refused(lambda: reader.read_bits(bits, "300i-duo")) == (2, sentence)


@pytest.mark.slow
def test_the_command_of_each_row_makes_what_the_sweep_made(small: Path, small_stats: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes.toml").write_text(RECIPES.partition("[[recipe]]\nis_dynamic")[0])
    base = ["sweep", tmp_path / "recipes.toml", "--model_path", small, "--stats", small_stats, "--target-bits", "2.5"]
    base.append("--no-kl")
    swept = glmq(*base, "--out", tmp_path / "a")
    commands = [line.strip() for line in swept.stdout.splitlines() if line.startswith("  glmq quantize ")]
    passes = re.findall(r" (\S+: \w+) \(pass", swept.stderr)
    assert passes == ["few: rate", "few: quantize", "2.5-bits: quantize"]
    shown = json.loads(glmq(*base, "--out", tmp_path / "b", "--keep", tmp_path / "kept", "--json").stdout)
    assert [row["name"] for row in shown["rows"]] == ["2.5-bits", "few"]
    for row, command in zip(shown["rows"], commands, strict=True):
        glmq(*shlex.split(command)[1:], "-q")
        assert tree(tmp_path / f"a-{row['name']}") == tree(tmp_path / "kept" / row["name"])
        assert row["command"] == command.replace(f"{tmp_path}/a-", f"{tmp_path}/kept/")


@pytest.mark.slow
def test_a_stopped_sweep_says_what_is_finished_and_how_to_go_on(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Journal.record

    def stop(self: Journal, block: str, payload: dict[str, object]) -> None:
        record(self, block, payload)
        if block.startswith("w8a8 "):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", stop)
    (tmp_path / "two.toml").write_text('[[recipe]]\nname = "w8a8"\n[[recipe]]\nname = "fp16"\ntorch_dtype = "fp16"\n')
    words = ["sweep", f"{tmp_path}/two.toml", "--model_path", f"{small}", "--stats", f"{small_stats}", "--no-kl"]
    stopped = run(*words, "--out", tmp_path / "out")
    assert stopped.exit_code == 130
    work = tmp_path / ".out.partial"
    resuming = f"root {' '.join(words)} --out {tmp_path}/out --resume"
    first, place, resume, clean = stopped.stderr.splitlines()[-4:]
    assert first == "error: stopped by Ctrl-C; w8a8: quantize (pass 1 of 2): 6 of 6 blocks are finished"
    assert place.startswith(f"  unfinished: {work}, ")
    assert (resume, clean) == (f"  to continue: {resuming}", f"  to remove: glmq clean --yes {tmp_path}")
    assert f"{work}: sweep, " in glmq("clean", tmp_path).stdout
    monkeypatch.setattr(Journal, "record", record)
    ended = glmq(*words, "--out", tmp_path / "out", "--resume")
    assert "w8a8: quantize" not in ended.stderr
    assert "fp16: quantize" in ended.stderr
    assert not work.exists()


def test_a_sweep_over_nothing_and_one_without_statistics_are_refused(small: Path, tmp_path: Path) -> None:
    base = ["sweep", "--model_path", small, "--stats", tmp_path / "none", "--out", tmp_path / "out"]
    nothing = run(*base)
    assert (nothing.exit_code, nothing.stderr) == (
        2, "error: no recipe to sweep over; give a TOML file of [[recipe]] tables, --target-bits, or both\n",
    )  # fmt: skip
    idle = run(*base, "--preset", "800i-a2")
    assert (idle.exit_code, idle.stderr) == (
        2,
        "error: --preset 800i-a2 has no effect without --target-bits; a recipe of the file names its own\n",
    )
    unused = run(*base, "--target-bits", "3", "--no-kl", "--cases", tmp_path / "cases.jsonl")
    assert (unused.exit_code, unused.stderr) == (
        2,
        "error: --cases with --no-kl: no model is run over the samples; drop one of them\n",
    )
    for option, value in {"--max-pixels": ["10000"], "--prompt": ["hi"], "--limit": ["3"], "--recursive": []}.items():
        idle = run(*base, "--target-bits", "3", "--no-kl", option, *value)
        assert (idle.exit_code, idle.stderr) == (2, f"error: {option} has no effect without --kl; drop it\n")
    without = run(*base, "--target-bits", "3")
    assert without.exit_code == 4
    assert "has no statistics.json, so it is not a finished statistics folder; run `glmq calibrate` first" in (
        without.stderr
    )
