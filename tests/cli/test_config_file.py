import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.command_line import glmq, run
from programs import start_glmq

from glmq.cli.config_file import dump_config, read_config_file


def dumped(*options: object) -> dict[str, str]:
    """What `glmq quantize --dump-config` prints, line by line."""
    out = glmq("quantize", "--model_path", "m", "--save_directory", "o", *options, "--dump-config").stdout
    return dict(line.split(" = ", 1) for line in out.splitlines())


def test_the_dump_has_every_option_in_effect_sorted() -> None:
    found = dumped("--w_bit", 4, "--is_lowbit", "True", "--keep-float", "a*", "--keep-float", "b")
    assert list(found) == sorted(found)
    assert found["w_bit"] == "4"
    assert found["is_lowbit"] == "true"
    assert found["open_outlier"] == "true"
    assert found["fraction"] == "0.01"
    assert found["torch_dtype"] == '"bf16"'
    assert found["model_path"] == '"m"'
    assert json.loads(found["keep_float"]) == ["a*", "b"]
    assert not {"stats", "config", "dump_config", "json_output", "debug", "dry_run"} & set(found)


def test_a_file_supplies_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'w_bit = 4\nis-lowbit = true\ntorch_dtype = "fp16"\nopen_outlier = false\nkeep_float = ["*.o_proj"]\n'
    )
    found = dumped("--config", file, "--torch_dtype", "bf16")
    assert (found["w_bit"], found["is_lowbit"], found["open_outlier"]) == ("4", "true", "false")
    assert found["torch_dtype"] == '"bf16"'
    assert found["keep_float"] == '["*.o_proj"]'
    assert dumped(f"--config={file}", "--is_lowbit", "False")["is_lowbit"] == "false"


def test_what_was_dumped_reads_back_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    options = (
        "--w_bit",
        4,
        "--is_lowbit",
        "True",
        "--prompt",
        'A "quoted" \\ prompt\n\u00e9',
        "--part_file_size",
        "4GB",
    )
    first = dumped(*options)
    file.write_text("".join(f"{name} = {value}\n" for name, value in first.items()), encoding="utf-8")
    assert dumped("--config", file) == first


def test_what_toml_spells_in_its_own_way_reads_back_the_same(tmp_path: Path) -> None:
    folder = "a\x7f\x9b\x1b照片😀"
    first = dumped("--save_directory", folder, "--max-error", "inf")
    assert first["max_error"] == "inf"
    assert first["save_directory"] == r'"a\u007f\u009b\u001b照片😀"'
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{name} = {value}\n" for name, value in first.items()), encoding="utf-8")
    params = [SimpleNamespace(name=name) for name in first]
    assert read_config_file(str(file), params)["save_directory"] == folder
    assert read_config_file(str(file), params)["max_error"] == math.inf


def test_the_dump_is_utf8_whatever_the_encoding_of_stdout() -> None:
    done = start_glmq("calibrate", "--model-path", "照片", "--stats", "s", "--dump-config")
    assert 'model_path = "照片"\n' in done.stdout


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_path_that_toml_cannot_hold_is_wrong_usage(form: list[str]) -> None:
    result = run("quantize", "--model_path", "m\udcff", "--save_directory", "o", *form, "--dump-config")
    sentence = "--model_path m\\udcff: is not UTF-8, which TOML cannot hold; give it another name"
    assert result.exit_code == 2
    if form:
        assert json.loads(result.stdout)["error"] == {"code": "GLMQ-E201", "message": sentence}
    else:
        assert (result.stdout, result.stderr) == ("", f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'save_directory = ""', "save_directory is empty; give a value, or leave the key out"),
        (b"w_bits = 4", "unknown key 'w_bits'; did you mean 'w_bit'?"),
        (b"debug = true", "unknown key 'debug'; "),
        (b"w_bit = ", "is not TOML ("),
        (b"\xff", "cannot be read ("),
        (b"a = " + b"[" * 5000, "is not TOML ("),
        (b"a = " + b"9" * 5000, "is not TOML ("),
        (b"#" * 1_000_001, "has more than 1000000 bytes; give a TOML file"),
        (None, "cannot be read ("),
    ],
)
def test_a_file_that_cannot_be_used_is_wrong_usage(content: bytes | None, what: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    result = run("quantize", "--config", file, "--model_path", "m", "--save_directory", "o", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "GLMQ-E201"
    assert error["message"].startswith(f"--config {file}: {what}")


def test_a_device_in_place_of_the_file_is_wrong_usage() -> None:
    result = run("quantize", "--config", "/dev/zero", "--model_path", "m", "--save_directory", "o", "--json")
    assert result.exit_code == 2
    message = json.loads(result.stdout)["error"]["message"]
    assert message == "--config /dev/zero: is a device, a regular file is needed; give the file itself"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('w_bit = "four"', "--w-bit four: a whole number is needed"),
        ('torch_dtype = "fp32"', "--torch-dtype: 'fp32' is not one of 'bf16', 'fp16'"),
        ("limit = 0", "--limit 0: at least 1 is needed"),
    ],
)
def test_a_value_of_another_kind_is_wrong_usage_of_the_file(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(line)
    command = ("quantize", "--config", file, "--model_path", "m", "--save_directory", "o", "--json")
    result = run(*command)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["message"] == f"--config {file}: {what}"


def test_a_wrong_value_that_was_typed_is_not_the_files(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('w_bit = "four"')
    command = ("quantize", "--config", file, "--model_path", "m", "--save_directory", "o", "--json")
    result = run(*command, "--w_bit", "x")
    assert json.loads(result.stdout)["error"]["message"] == "--w_bit x: a whole number is needed"


def test_a_list_for_a_number_is_wrong_usage(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("fraction = [1]")
    result = run("quantize", "--config", file, "--model_path", "m", "--save_directory", "o")
    assert result.exit_code == 2
    assert f"--config {file}: --fraction" in result.stderr


def test_a_file_takes_torchs_names_of_dtypes(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('torch_dtype = "bfloat16"\n')
    assert dumped("--config", file)["torch_dtype"] == '"bf16"'


def test_unset_values_are_left_out() -> None:
    assert dump_config({"b": None, "a": Path("x"), "c": ("y",), "quiet": True}) == 'a = "x"\nc = ["y"]\n'


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    assert read_config_file(str(tmp_path / "empty.toml"), []) == {}
    assert dumped("--config", tmp_path / "empty.toml") == dumped()
