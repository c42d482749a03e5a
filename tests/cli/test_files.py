import json
import os
import re
from pathlib import Path

import pytest
from cli.command_line import glmq, run

from glmq.checkpoint.json_file import write_named
from glmq.cli.files import check_files
from glmq.errors import OutputError


def refusal(**params: object) -> str:
    with pytest.raises(OutputError) as caught:
        check_files(params)
    return str(caught.value)


@pytest.mark.parametrize("name", ["html", "csv", "log_file", "events"])
def test_a_place_that_takes_no_file_is_refused(name: str, tmp_path: Path) -> None:
    option = f"--{name.replace('_', '-')}"
    absent = tmp_path / "absent" / "x"
    assert refusal(**{name: absent}) == (
        f"{option} {absent}: there is no folder {absent.parent}; make it, or choose another place"
    )
    assert refusal(**{name: tmp_path}) == f"{option} {tmp_path}: is a folder; name a file"
    assert refusal(**{name: Path()}) == f"{option} .: is a folder; name a file"
    link = tmp_path / "link"
    link.symlink_to(absent)
    assert refusal(**{name: link}) == (
        f"{option} {link}: there is no folder {absent.parent}; make it, or choose another place"
    )
    most = 255 if name in ("log_file", "events") else 246
    check_files({name: tmp_path / ("x" * most)})
    long = tmp_path / ("x" * (most + 1))
    wanted = (
        "File name too long; choose another place"
        if len(long.name) > 255
        else f"has a name of more than {most} bytes; choose a shorter one"
    )
    assert refusal(**{name: long}) == f"{option} {long}: {wanted}"


def test_a_folder_or_file_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.log").touch()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    page, log = tmp_path / "page.html", tmp_path / "run.log"
    assert refusal(html=page) == f"--html {page}: {tmp_path} is not writable; choose another place"
    assert refusal(log_file=log) == f"--log-file {log}: is not writable; choose another file"


@pytest.mark.parametrize("name", ["candidate", "folder", "model_path", "save_directory", "save_split_w8a8s_dir"])
def test_nothing_is_written_into_a_folder_that_is_read_or_made(name: str, tmp_path: Path) -> None:
    used = tmp_path / "used"
    (used / "deeper").mkdir(parents=True)
    for path in (used / "x.html", used / "deeper" / "x.html"):
        assert refusal(html=path, **{name: used}) == (
            f"--html {path}: lies in {used}, which the command reads or writes; choose another place"
        )
    link = tmp_path / "link.html"
    link.symlink_to(used / "x.html")
    assert refusal(html=link, folders=[tmp_path / "other", used]) == (
        f"--html {link}: lies in {used}, which the command reads or writes; choose another place"
    )
    check_files({"html": tmp_path / "x.html", name: used})
    check_files({"html": used / "x.html", "work_dir": used})


def test_a_file_that_is_read_is_no_place_nor_are_its_neighbours_of_a_checkpoint(tmp_path: Path) -> None:
    cases, weights = tmp_path / "cases.jsonl", tmp_path / "model.safetensors"
    for path in (cases, weights):
        path.touch()
    assert refusal(log_file=cases, cases=cases) == (
        f"--log-file {cases}: lies in {cases}, which the command reads or writes; choose another place"
    )
    for path in (weights, tmp_path / "config.json", tmp_path / "model-2.safetensors"):
        assert refusal(csv=path, a=weights) == (
            f"--csv {path}: lies in {weights}, which the command reads or writes; choose another place"
        )
    check_files({"csv": tmp_path / "rows.csv", "a": weights, "cases": cases})


def test_two_options_name_two_files(tmp_path: Path) -> None:
    one = tmp_path / "one"
    other = tmp_path / "link"
    other.symlink_to(one)
    assert refusal(html=one, csv=other) == f"--csv {other}: is the file of --html too; choose another name"
    assert refusal(log_file=one, events=one) == f"--events {one}: is the file of --log-file too; choose another name"
    check_files({"log_file": Path(os.devnull), "events": Path(os.devnull)})


def test_a_pipe_and_a_device_take_what_is_written_and_a_link_stays(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    pipe = Path(f"/dev/fd/{writing}")
    check_files({"csv": pipe, "html": pipe})
    write_named(pipe, b"rows\n")
    assert os.read(reading, 10) == b"rows\n"
    os.close(reading)
    os.close(writing)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "page")
    write_named(link, b"page")
    assert link.is_symlink()
    assert (tmp_path / "page").read_bytes() == b"page"


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_the_place_of_a_page_is_looked_at_before_the_work(
    verb: str, tiny_seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "absent" / "x.html"
    monkeypatch.setattr(f"glmq.jobs.{verb}.{verb}", None)  # calling it fails
    result = run(verb, tiny_seed, "--html", page, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (
        2,
        {
            "error": {
                "code": "GLMQ-E202",
                "message": f"--html {page}: there is no folder {page.parent}; make it, or choose another place",
            }
        },
    )


def test_no_run_begins_where_its_page_cannot_be_written(small: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "absent" / "x.html", tmp_path / "out"
    result = run("quantize", "--model_path", small, "--save_directory", out, "--html", page)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: --html {page}: there is no folder {page.parent}; make it, or choose another place\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "name"), [("--html", "*.safetensors"), ("--csv", "config.json")])
def test_no_report_takes_the_place_of_weights(option: str, name: str, small_copy: Path) -> None:
    path = next(small_copy.glob(name))
    before = path.read_bytes()
    result = run("inspect", small_copy, option, path)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {option} {path}: lies in {small_copy}, which the command reads or writes; choose another place\n",
    )
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("verb", "option"), [("verify", "--html"), ("inspect", "--html"), ("inspect", "--csv")])
def test_what_was_found_is_shown_before_a_file_is_written(
    verb: str, option: str, tiny_seed: Path, tmp_path: Path
) -> None:
    shown = glmq(verb, tiny_seed).stdout
    result = run(verb, tiny_seed, option, "/dev/full")
    assert (result.exit_code, result.stdout) == (5, shown)
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: /dev/full: \d+ bytes are to be written, but its disk takes no more, with \d+ bytes free: .*", last
    )


def test_a_table_that_does_not_fit_on_the_disk_leaves_the_old_one(
    tiny_seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert run("inspect", tiny_seed, "--csv", table).exit_code == 5
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("rows.csv", "old")]
