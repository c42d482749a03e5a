from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli.command_line import glmq, run
from helpers import PACKAGES, tree
from programs import fork_torchrun, start_torchrun
from random_w8a8s import write_stand_in, write_w8a8s

from glmq.compression import stream
from glmq.compression.executor import how_to_build
from glmq.compression.stream import PORTABLE_STEM
from glmq.compression.weight_codec import PortableCodec

if TYPE_CHECKING:
    from typer.testing import Result


@pytest.fixture(autouse=True)
def no_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program, unless a test brings one."""
    for name in ("GLMQ_EXECUTOR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("glmq.compression.executor.find_spec", lambda name: None)


@pytest.fixture(scope="module")
def w8a8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that can be split over 1, 2 and 4 ranks. Do not write into it."""
    return write_w8a8s(tmp_path_factory.mktemp("source") / "w8a8s")


def compress(source: Path, out: Path, *options: object) -> list[object]:
    """The arguments; in the portable form where nothing else is asked for."""
    chosen = {"--codec", "--executor", "--decompress", "--layout"} & set(options) or "GLMQ_EXECUTOR" in os.environ
    codec = [] if chosen else ["--codec", "portable"]
    return ["compress", "--model_path", source, "--save_directory", out, *codec, *options]


def complaint(exit_code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == exit_code, result.output
    return result.stderr.splitlines()[-1]


def left_over(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


@pytest.mark.parametrize("options", [["--codec", "auto"], ["--codec", "auto", "-q"], ["--codec", "auto", "--json"]])
def test_without_the_vendors_program_nothing_looks_like_success(
    w8a8s: Path, tmp_path: Path, options: list[object]
) -> None:
    result = run(*compress(w8a8s, tmp_path / "out", *options))
    assert result.exit_code == 5
    sentence = (
        "--codec auto: compress_excutor, the vendor's compress program, was not found; for the engine's W8A8SC "
        f"{how_to_build()}; for glmq's own lossless form, which is for storage and which no engine reads, pass --codec portable"
    )
    if "--json" in options:
        assert json.loads(result.stdout) == {"error": {"code": "GLMQ-E512", "message": sentence}}
    else:
        assert result.stderr == f"error: {sentence}\n"
    assert left_over(tmp_path) == []


def test_the_portable_form_is_written_where_it_is_asked_for(w8a8s: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = glmq(*compress(w8a8s, out))
    lines = result.stdout.splitlines()
    assert f"W8A8S in glmq's portable form, world size 1, written to {out}" in lines
    assert lines[-1] == f"  glmq compress --decompress {out} {out}-restored"
    for column in ("rows x cols", "bits", "ratio", "entropy", "class gain", "seconds", "float16", "W8A8S", "portable"):
        assert column in result.stdout
    assert left_over(tmp_path) == ["out"]


def test_the_way_back_restores_the_source(w8a8s: Path, tmp_path: Path) -> None:
    glmq(*compress(w8a8s, tmp_path / "out", "--codec", "portable"))
    result = glmq("compress", "--decompress", tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(w8a8s)
    assert result.stdout.splitlines()[-1] == f"  glmq verify {tmp_path / 'back'}"


def test_without_compiled_kernels_the_same_is_written_and_the_wait_explained(
    w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glmq(*compress(w8a8s, tmp_path / "fast", "--codec", "portable"))
    monkeypatch.setattr("glmq.codec.codec.KERNELS", ())
    monkeypatch.setattr("glmq.jobs.compress.KERNELS", ())
    note = (
        f"note: the glmq in {PACKAGES / 'glmq'} has no compiled codec, so compressing and restoring take some 20 times as "
        "long; install it with a C compiler at hand, and do not run it from inside its source folder"
    )
    assert glmq(*compress(w8a8s, tmp_path / "slow", "--codec", "portable")).stderr.splitlines()[0] == note
    weights = f"part0-of-1/{PORTABLE_STEM}.safetensors"
    assert (tmp_path / "slow" / weights).read_bytes() == (tmp_path / "fast" / weights).read_bytes()
    assert glmq("compress", "--decompress", tmp_path / "slow", tmp_path / "back").stderr.splitlines()[0] == note
    assert glmq("compress", "--decompress", tmp_path / "slow", tmp_path / "quiet", "-q").stderr == ""
    assert tree(tmp_path / "back") == tree(w8a8s)


def test_the_way_back_of_several_ranks_is_the_source_too(w8a8s: Path, tmp_path: Path) -> None:
    glmq(*compress(w8a8s, tmp_path / "out", "--codec", "portable", "--tp", 4))
    result = glmq(*compress(tmp_path / "out", tmp_path / "back", "--decompress", "--json"))
    document = json.loads(result.stdout)
    assert (document["schema"], document["layout"], document["world_size"]) == ("glmq.decompress/1", "mindie", 4)
    assert tree(tmp_path / "back") == tree(w8a8s)


@pytest.fixture(scope="module", params=["mindie", "vllm-ascend"])
def parts(
    request: pytest.FixtureRequest, w8a8s: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Result]:
    """A layout of an engine, what was made for it with the vendor's program, that program, and what was said meanwhile."""
    root = tmp_path_factory.mktemp("parts")
    program, out = write_stand_in(root), root / "out"
    result = glmq(*compress(w8a8s, out, "--tp", 2, "--layout", request.param, "--executor", program))
    return request.param, out, program, result


def test_with_the_vendors_program_the_engines_form_is_written_and_how_to_serve_it_said(
    parts: tuple[str, Path, Path, Result],
) -> None:
    layout, out, program, result = parts
    assert result.stderr.splitlines()[0] == f"codec ascend: {program}"
    if layout == "mindie":
        assert result.stdout.splitlines()[-1] == (
            "Next: serve it with MindIE on the Atlas 300I Duo: in conf/config.json of mindie-service set modelWeightPath to "
            f"{out}, worldSize to 2 and npuDeviceIds to [[0, 1]], then start mindieservice_daemon."
        )
        assert (out / "part1-of-2" / "quant_model_weight_w8a8sc.safetensors").is_file()
        return
    assert result.stdout.splitlines()[-3:] == [
        "Note: this layout is a best effort, from reading vLLM-Ascend's source and never run; MindIE's is the tested one.",
        "Note: vLLM-Ascend does not run GLM-4.1V on the Atlas 300I Duo, where its rotary kernel has no interleaved mode; "
        "MindIE does.",
        f"Next, on the Atlas 300I Duo: vllm serve {out} --quantization ascend --load-format sharded_state --dtype float16 "
        "--tensor-parallel-size 2",
    ]
    assert (out / "model-rank-1-part-0.safetensors").is_file()


def test_the_vendors_program_may_be_named_by_a_variable(
    w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, out = write_stand_in(tmp_path), tmp_path / "out"
    monkeypatch.setenv("GLMQ_EXECUTOR", str(program))
    result = glmq(*compress(w8a8s, out))
    assert result.stderr.splitlines()[0] == f"codec ascend: {program}"
    assert (out / "part0-of-1" / "quant_model_weight_w8a8sc.safetensors").is_file()


def test_parts_are_inspected_by_role_and_held_against_the_engine_that_they_are_for(
    parts: tuple[str, Path, Path, Result], tmp_path: Path
) -> None:
    layout, made, *_ = parts
    qkv = {"mindie": "query_key_value", "vllm-ascend": "qkv_proj"}[layout]
    out, page = tmp_path / "out", tmp_path / "page.html"
    shutil.copytree(made, out)
    shown = glmq("inspect", out, "--html", page).stdout
    html = page.read_text()
    assert "!! " not in shown
    assert '<div class="card good"><div class="muted">Problems</div>' in html
    assert ("Nothing wrong was found in headers and JSON files." in html) == (layout == "mindie")
    assert ("vLLM-Ascend does not list GLM-4.1V as supported" in html) == (layout == "vllm-ascend")
    rows = re.findall(r"<tr>(<td.*?)</tr>", html.partition("Parts, all ranks together")[2])
    cells = {tuple(re.sub("<[^>]*>", "", one) for one in row.split("</td>")[:5]) for row in rows}
    assert ("layers.0-1", f"self_attn.{qkv}", "W8A8SC", "2", "96 x 128") in cells
    ((_, bits, ratio),) = re.findall(r"(gate_up_proj) .* W8A8SC .* (\d\.\d{3}) +(\d\.\d\d)", shown)
    assert f'<td class="num">{bits}</td><td class="num">{ratio}</td>' in html
    (out / "glmq_compress_report.json").unlink()
    glmq("inspect", out, "--html", page)
    assert "Without its report nothing says how large the packed weights were." in page.read_text()


def test_help_names_the_variable_the_best_effort_and_both_spellings_work(w8a8s: Path, tmp_path: Path) -> None:
    text = " ".join(glmq("compress", "--help-all").output.split())
    assert "GLMQ_EXECUTOR" in text
    assert "vllm-ascend is a best effort that was never run" in text
    assert "torchrun --nproc_per_node 2 -m glmq compress" in text
    out = tmp_path / "out"
    result = glmq("compress", "--model-path", w8a8s, "--save-directory", out, "--codec", "portable", "-q")
    assert (result.stdout, result.stderr) == (f"{out}\n", "")


def test_json_is_the_report_of_the_folder(w8a8s: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = glmq(*compress(w8a8s, out, "--tp", 2, "--json"))
    document = json.loads(result.stdout)
    assert document.pop("folder") == str(out)
    assert document == json.loads((out / "glmq_compress_report.json").read_text())
    assert (document["schema"], document["codec"], document["world_size"]) == ("glmq.compress-report/1", "portable", 2)
    rows = (out / "glmq_compress_report.csv").read_text().splitlines()
    assert rows[0] == "rank,name,rows,cols,stored_bytes,bits_per_weight,ratio,entropy_bits,class_gain_bits"
    # 2 ranks, 2 layers, and query_key_value, o_proj, gate_up_proj in each
    assert len(rows) - 1 == len(document["linears"]) == 2 * 2 * 3
    assert rows[1].startswith("0,language_model.layers.0.self_attn.query_key_value,96,128,")
    assert [rank["file"] for rank in document["ranks"]] == [
        f"part{rank}-of-2/glmq_weight_w8a8s.gqsc.safetensors" for rank in range(2)
    ]
    by_part = {row["part"]: row for row in document["bytes"]}
    # vocabulary 204, width 128, two bytes; the embedding is whole with one row more on each of the two ranks
    assert by_part["embeddings and lm_head"] == {
        "part": "embeddings and lm_head", "float16": 2 * 204 * 128 * 2, "w8a8s": 2 * 204 * 128 * 2,
        "compressed": 2 * 205 * 128 * 2 + 204 * 128 * 2,
    }  # fmt: skip


@pytest.mark.slow
def test_every_row_is_shown_with_verbose_only(tmp_path: Path) -> None:
    source = write_w8a8s(tmp_path / "w8a8s", layers=10)
    short = glmq(*compress(source, tmp_path / "a", "--codec", "portable")).stdout
    whole = glmq(*compress(source, tmp_path / "b", "--codec", "portable", "-v")).stdout
    assert "26 smaller ones are left out; -v shows all, glmq_compress_report.csv has them" in short
    assert whole.count("0/1") == 50


def test_an_existing_output_is_kept_without_overwrite_and_replaced_with_it(w8a8s: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "glmq_report.json").write_text("kept")
    assert complaint(2, *compress(w8a8s, out)) == (
        f"error: {out}: is not empty; choose another folder, or pass --overwrite to replace its contents"
    )
    assert left_over(out) == ["glmq_report.json"]
    glmq(*compress(w8a8s, out, "--overwrite"))
    assert "glmq_report.json" not in left_over(out)
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tp", 3], "--tp 3: 3 is not a world size that the serving engine is known to load; "),
        (["--codec", "portable", "--layout", "vllm-ascend"], "--layout vllm-ascend: exists only with --codec ascend; "),
        (
            ["--decompress", "--tp", 2],
            "--decompress: takes no --tp, --codec, --layout or --save_split_w8a8s_dir, the folder ",
        ),
        (["--decompress", "--codec", "ascend"], "--decompress: takes no --tp, --codec, --layout or "),
    ],
)
def test_options_that_contradict_are_wrong_usage(
    w8a8s: Path, tmp_path: Path, options: list[object], sentence: str
) -> None:
    assert complaint(2, *compress(w8a8s, tmp_path / "out", *options)).startswith(f"error: {sentence}")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--model-path: missing; give --model_path IN --save_directory OUT, or just the two folders IN OUT"),
        (
            ["--model_path", "a"],
            "--save-directory: missing; give --model_path IN --save_directory OUT, or just the two ",
        ),
        (["a"], "IN OUT: wanted two folders, or --model_path and --save_directory in their place; found 1"),
        (["a", "b", "c"], "IN OUT: wanted two folders, or --model_path and --save_directory in their place; found 3"),
        (["a", "b", "--model_path", "c"], "IN OUT: wanted two folders, or --model_path and --save_directory in their "),
    ],
)
def test_two_folders_are_wanted(arguments: list[str], sentence: str) -> None:
    assert complaint(2, "compress", *arguments).startswith(f"error: {sentence}")


def test_a_model_with_six_heads_is_not_split_over_four(tmp_path: Path) -> None:
    source = write_w8a8s(tmp_path / "w8a8s", heads=6)
    for codec in ("portable", "auto"):  # without the vendor's program, too: no machine changes that
        assert complaint(2, *compress(source, tmp_path / "out", "--tp", 4, "--codec", codec)) == (
            "error: --tp 4: 6 attention heads do not divide by 4; world sizes that work for this model: 1, 2"
        )


def test_the_source_is_never_written_over(w8a8s: Path) -> None:
    for out in (w8a8s, w8a8s.parent):
        assert complaint(2, *compress(w8a8s, out, "--overwrite")) == (
            f"error: {out}: is or holds the folder that is read; choose another --save_directory"
        )


def test_a_missing_program_is_a_missing_device(w8a8s: Path, tmp_path: Path) -> None:
    assert complaint(5, *compress(w8a8s, tmp_path / "out", "--codec", "ascend")) == (
        "error: --codec ascend: compress_excutor, the vendor's compress program, was not found; for the engine's W8A8SC "
        f"{how_to_build()}; for glmq's own lossless form, which is for storage and which no engine reads, pass --codec portable"
    )
    assert complaint(5, *compress(w8a8s, tmp_path / "out", "--executor", tmp_path / "none")) == (
        f"error: --executor {tmp_path / 'none'}: is not a program; {how_to_build()}"
    )
    assert left_over(tmp_path) == []


def test_what_is_no_w8a8s_is_bad_input(tiny: Path, tmp_path: Path) -> None:
    assert complaint(4, *compress(tiny, tmp_path / "out")).startswith(f"error: {tiny}: holds float weights (bfloat16)")
    result = run(*compress(tiny, tmp_path / "out", "--json"))
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"]["code"] == "GLMQ-E403"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tokenizer.json", "has no tokenizer.json, which is the tokenizer; copy it from the model's release"),
        ("preprocessor_config.json", "has no preprocessor_config.json; copy it from the model's release"),
    ],
)
def test_what_no_engine_could_build_its_processor_from_is_bad_input(
    name: str, sentence: str, w8a8s: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(w8a8s, source)
    (source / name).unlink()
    assert complaint(4, *compress(source, tmp_path / "out")) == f"error: {source}: {sentence}"
    assert complaint(4, *compress(source, tmp_path / "out", "--dry-run")) == f"error: {source}: {sentence}"
    assert left_over(tmp_path) == ["source"]


def test_a_planted_link_is_bad_input_and_its_target_is_not_kept(w8a8s: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(w8a8s, source)
    (source / "notes.txt").symlink_to("/etc/shadow")
    assert complaint(4, *compress(source, tmp_path / "out")) == (
        f"error: {source / 'notes.txt'}: is a link to /etc/shadow, outside of its folder, so its contents are not copied into "
        "the output; put a copy of the file in its place"
    )
    assert left_over(tmp_path) == ["source"]


def test_a_broken_program_leaves_nothing(w8a8s: Path, tmp_path: Path) -> None:
    program = write_stand_in(tmp_path, "other tiling")
    assert complaint(5, *compress(w8a8s, tmp_path / "out", "--executor", program, "--tp", 2)).startswith(
        "error: language_model.layers.0.self_attn.query_key_value: compress_excutor ended with status 0, but its tilings are"
    )
    assert left_over(tmp_path) == ["compress_excutor"]


def test_a_full_disk_leaves_nothing(w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    (out / "glmq_report.json").write_text("kept")
    monkeypatch.setattr(os, "pwrite", full)
    sentence = complaint(5, *compress(w8a8s, out, "--overwrite"))
    assert "bytes are to be written, but its disk takes no more, with " in sentence
    assert left_over(tmp_path) == ["out"]
    assert left_over(out) == ["glmq_report.json"]


@pytest.mark.parametrize(
    ("signal_number", "exit_code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_an_interruption_leaves_nothing_and_the_old_output_untouched(
    w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_number: int, exit_code: int, word: str
) -> None:
    out = tmp_path / "out"
    glmq(*compress(w8a8s, out, "--codec", "portable"))
    before = tree(out)
    written = stream._write_stored

    def interrupt(*arguments: object) -> dict[str, str]:
        os.kill(os.getpid(), signal_number)
        return written(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "_write_stored", interrupt)
    assert re.fullmatch(
        rf"error: stopped by {word}; compress: [\d.]+ KiB of [\d.]+ KiB are finished; nothing half-written was left behind",
        complaint(exit_code, *compress(w8a8s, out, "--codec", "portable", "--overwrite")),
    )
    assert tree(out) == before
    assert left_over(tmp_path) == ["out"]


def test_an_altered_portable_folder_is_bad_input_and_leaves_nothing(w8a8s: Path, tmp_path: Path) -> None:
    glmq(*compress(w8a8s, tmp_path / "out", "--codec", "portable"))
    path = tmp_path / "out" / "part0-of-1" / "glmq_weight_w8a8s.gqsc.safetensors"
    content = bytearray(path.read_bytes())
    content[-70] ^= 1  # in the last blob, before its tail of 64 zeros
    path.write_bytes(content)
    sentence = complaint(4, *compress(tmp_path / "out", tmp_path / "back", "--decompress"))
    assert "v_proj.weight.gqsc': compressed weight: tile 0: " in sentence
    assert left_over(tmp_path) == ["out"]


def test_tp_must_agree_with_torchrun(w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert complaint(2, *compress(w8a8s, tmp_path / "out", "--tp", 4)) == (
        "error: --tp 4: torchrun started 2 processes, one per rank; leave --tp out"
    )
    assert complaint(2, *compress(w8a8s, tmp_path / "out", "--decompress")) == (
        "error: --decompress: needs no torchrun, one process restores every rank; run `glmq compress` itself"
    )


@pytest.mark.slow
def test_torchrun_writes_the_bytes_of_one_process(w8a8s: Path, tmp_path: Path) -> None:
    """Its ranks are new Python processes, which import all that they need."""
    glmq(*compress(w8a8s, tmp_path / "one", "--tp", 2, "--codec", "portable"))
    arguments = compress(w8a8s, tmp_path / "two", "--codec", "portable")
    result = start_torchrun("--nproc_per_node", 2, "-m", "glmq", *arguments)
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert result.stdout.count("written to") == 1


@pytest.mark.slow
def test_no_rank_of_torchrun_leaves_a_half_tree_when_another_is_killed(w8a8s: Path, tmp_path: Path) -> None:
    program = write_stand_in(tmp_path, "kills rank 1")
    result = fork_torchrun(2, *compress(w8a8s, tmp_path / "out", "--executor", program))
    assert result.returncode != 0
    # torchrun names one rank that ended, and they end within a moment of each other
    assert "Signal 9 (SIGKILL)" in result.stderr or "rank 0 of 2: lost the other ranks" in result.stderr
    assert left_over(tmp_path) == ["compress_excutor"]


def test_the_portable_codec_has_nothing_to_stop() -> None:
    PortableCodec().stop()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_dry_run_tells_what_the_run_then_writes_and_touches_nothing(w8a8s: Path, tmp_path: Path, tp: int) -> None:
    out = tmp_path / "out"
    options = compress(w8a8s, out, "--codec", "portable", "--tp", tp)
    plan = json.loads(glmq(*options, "--dry-run", "--json").stdout)
    assert left_over(tmp_path) == []
    report = json.loads(glmq(*options, "--json").stdout)
    assert (plan["schema"], plan["codec"], plan["world_size"]) == ("glmq.compress-plan/1", "portable", tp)
    for file in plan["files"]:
        weights = [linear for linear in report["linears"] if linear["rank"] == file["rank"]]
        stored = sum(linear["stored_bytes"] for linear in weights)
        header = int.from_bytes((out / file["path"]).read_bytes()[:8], "little")
        assert file["kept_bytes"] == (out / file["path"]).stat().st_size - 8 - header - stored
        assert file["weight_bytes"] == sum(linear["rows"] * linear["cols"] for linear in weights)
        assert file["at_most_bytes"] >= file["kept_bytes"] + stored
        assert [w["name"] for w in plan["weights"] if w["rank"] == file["rank"]] == [w["name"] for w in weights]
    assert plan["disk_bytes"] > sum(file["at_most_bytes"] for file in plan["files"])
    assert plan["estimated_bytes"] == sum(part["after_estimated"] for part in plan["bytes"])
    assert plan["estimated_seconds"] > 0


def test_a_dry_run_in_tables_says_what_is_exact_and_refuses_what_the_run_would(
    w8a8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = compress(w8a8s, tmp_path / "out", "--codec", "portable")
    monkeypatch.setattr("glmq.cli.compress_view.free_bytes", lambda folder: 1)
    text = glmq(*options, "--dry-run").stdout
    for words in (
        "W8A8S, exact",
        "compressed, estimated",
        "kept as they are",
        "1 B are, too little: the run would refuse",
    ):
        assert words in text
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda folder: 1)
    assert complaint(5, *options).endswith("its disk has 1 free; make room or choose another disk")
    assert left_over(tmp_path) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "needs no torchrun" in complaint(2, *options, "--dry-run")


def test_a_dry_run_of_the_way_back_is_exact(w8a8s: Path, tmp_path: Path) -> None:
    glmq(*compress(w8a8s, tmp_path / "out", "--codec", "portable"))
    options = compress(tmp_path / "out", tmp_path / "back", "--decompress")
    plan = json.loads(glmq(*options, "--dry-run", "--json").stdout)
    assert left_over(tmp_path) == ["out"]
    assert "must be free" in glmq(*options, "--dry-run").stdout
    assert plan["output_bytes"] == json.loads(glmq(*options, "--json").stdout)["weight_bytes"]


FREED = """
import numpy as np, psutil
from glmq.cli.malloc import return_large_buffers
return_large_buffers()
resident = lambda: psutil.Process().memory_info().rss
del (first := [np.ones(8 << 20, np.uint8)])[:]  # teaches glibc to keep such buffers
before, pins, buffers = resident(), [], []
for _ in range(8):
    buffers.append(np.ones(8 << 20, np.uint8))
    pins.append(np.ones(100_000, np.uint8))
buffers.clear()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_freed_weights_do_not_stay_in_the_process() -> None:
    found = subprocess.run([sys.executable, "-c", FREED], cwd=PACKAGES, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 16 << 20


ONE_HEAP = """
import ctypes, threading
from glmq.cli.malloc import share_one_heap
share_one_heap()
libc, found = ctypes.CDLL(None), []
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
thread = threading.Thread(target=lambda: found.append(libc.malloc(50_000)))
thread.start()
thread.join()
print(abs(found[0] - libc.malloc(50_000)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_threads_of_a_run_allocate_from_one_heap() -> None:
    found = subprocess.run([sys.executable, "-c", ONE_HEAP], cwd=PACKAGES, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 64 << 20  # a heap of a thread's own lies gigabytes away


def test_the_options_of_the_engines_own_command_do_what_they_say(w8a8s: Path, tmp_path: Path) -> None:
    out, split = tmp_path / "out", tmp_path / "split"
    vendor = ["--multiprocess_num", "4", "--trust_remote_code", "--save_split_w8a8s_dir", split]
    arguments = ["--model_path", w8a8s, "--save_directory", out, "--tp", "2", "--codec", "portable", *vendor]
    glmq("compress", *arguments)
    assert {"config.json", "tokenizer.json", "part0-of-2", "part1-of-2"} <= set(tree(split))
    glmq("verify", split, "--reference", w8a8s)


def test_uncompressed_parts_have_a_folder_of_their_own_and_mindies_layout(w8a8s: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compress", "--model_path", w8a8s, "--save_directory", out, "--codec", "portable"]
    result = run(*arguments, "--save_split_w8a8s_dir", w8a8s)
    assert result.exit_code == 2
    assert "--save_split_w8a8s_dir" in result.stderr
    result = run(*arguments, "--save_split_w8a8s_dir", tmp_path / "split", "--layout", "vllm-ascend")
    assert result.exit_code == 2
    assert not out.exists()
