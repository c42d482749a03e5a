"""`glmq inspect` as a user runs it."""

import csv
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.command_line import glmq, run
from helpers import PACKAGES, edit_tensors
from safetensors.torch import load_file

from glmq.version import __version__

Q = "model.language_model.layers.0.self_attn.q_proj"


def document(*args: object) -> dict:
    return json.loads(glmq("inspect", *args, "--json").stdout)


def test_one_checkpoint_is_described_from_its_headers(tiny_seed: Path) -> None:
    shown = glmq("inspect", tiny_seed).stdout
    assert f"{tiny_seed}: quantized checkpoint, W8A8S (ascendV1), float16 floats" in shown
    assert "for: the input of `glmq compress`; as it is, MindIE on the Atlas 300I Duo" in shown
    assert "layers.0-5" in shown
    assert "deq_scale I64" in shown
    assert "text linears" in shown


def test_a_broken_checkpoint_is_described_with_what_is_wrong(tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.iterdir():
        if path.name not in ("config.json", "tokenizer.json"):
            (tmp_path / path.name).symlink_to(path)
    shown = glmq("inspect", tmp_path).stdout
    assert f"!! error: {tmp_path}: has no config.json, so no engine can load it" in shown
    assert "!! error: mindie: tokenizer.json is missing" in shown


def test_an_incomplete_checkpoint_is_called_fit_for_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "float"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    lines = glmq("inspect", folder).stdout.splitlines()
    index = folder / "model.safetensors.index.json"
    sentence = f"{index}: names model-00002-of-00002.safetensors, which is not in the folder; download the missing file"
    assert lines[3:5] == ["for: nothing as it is; the errors say why", f"!! error: {sentence}"]
    found = document(folder)
    assert (found["for"], found["problems"]) == ("nothing as it is; the errors say why", [sentence])


def test_json_has_every_tensor_with_sizes_that_add_up(tiny_seed: Path) -> None:
    found = document(tiny_seed)
    assert (found["schema"], found["quant_type"], found["form"]) == ("glmq.inspect/1", "W8A8S", "ascendV1")
    stored = load_file(next(tiny_seed.glob("*.safetensors")))
    assert {row["name"] for row in found["tensors"]} == set(stored)
    assert sum(row["bytes"] for row in found["tensors"]) == found["bytes_total"]
    assert sum(part["nbytes"] for part in found["parts"]) == found["bytes_total"]
    (q,) = [row for row in found["tensors"] if row["name"] == f"{Q}.weight"]
    assert (q["layer"], q["role"], q["dtype"], q["shape"]) == ("layers.0", "self_attn.q_proj", "I8", [192, 192])
    assert "values" not in q
    assert found["engines"]["mindie"] == []


def test_values_are_read_when_asked_for(tiny_seed: Path) -> None:
    found = document(tiny_seed, "--name", f"{Q}.weight", "--values")
    (q,) = found["tensors"]
    stored = load_file(next(tiny_seed.glob("*.safetensors")))[f"{Q}.weight"]
    assert (q["values"]["minimum"], q["values"]["maximum"]) == (float(stored.min()), float(stored.max()))
    assert sum(q["values"]["histogram"]) == stored.numel()
    assert "▁" in glmq("inspect", tiny_seed, "--layer", 0, "--values").stdout


def test_rows_are_sorted_and_limited(tiny: Path) -> None:
    sizes = [row["bytes"] for row in document(tiny, "--sort", "bytes", "--limit", 5)["tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 5


def test_two_checkpoints_are_compared_worst_first(tiny: Path, tiny_seed: Path) -> None:
    found = document(tiny, tiny_seed)
    errors = [row["relative_l2"] for row in found["tensors"]]
    assert found["schema"] == "glmq.compare/1"
    assert errors == sorted(errors, reverse=True)
    assert 0.01 < errors[0] < 0.3  # a linear whose inputs bear it gets few bits: 23 % here
    assert found["layers"][-1]["layer"] == "total"
    assert {change["key"] for change in found["config"]} == {"torch_dtype", "text_config.dtype"}
    assert found["only_in_a"] == []
    shown = glmq("inspect", tiny, tiny_seed).stdout
    assert "Weights of B against A, largest difference first" in shown
    assert "BF16 > INT8" in shown


def test_a_limit_holds_for_table_document_csv_and_page_of_two(tiny: Path, tiny_seed: Path, tmp_path: Path) -> None:
    whole, table, page = document(tiny, tiny_seed), tmp_path / "rows.csv", tmp_path / "page.html"
    limited = json.loads(
        glmq("inspect", tiny, tiny_seed, "--limit", 2, "--csv", table, "--html", page, "--json").stdout
    )
    assert limited == {**whole, "tensors": whole["tensors"][:2]}
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3
    anchors = set(re.findall(r'id="([^"]+)"', page.read_text(encoding="utf-8")))
    assert sum(anchor.startswith("tensor") for anchor in anchors) == 2
    assert set(re.findall(r'href="#([^"]+)"', page.read_text(encoding="utf-8"))) <= anchors


def test_a_limit_holds_for_the_document_of_two_statistics(small_stats: Path) -> None:
    whole = document(small_stats, small_stats)
    assert document(small_stats, small_stats, "--limit", 1) == {**whole, "changes": whole["changes"][:1]}


def test_a_difference_of_weights_is_no_verdict(tiny: Path, tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_tensors(tmp_path, lambda tensors: tensors[f"{Q}.weight"].zero_())
    shown = glmq("inspect", tiny, tmp_path, "--name", f"{Q}.weight").stdout
    assert "100.000%" in shown
    assert "!!" not in shown
    assert (
        "What rounding changes in a weight is no verdict on it: output errors are. glmq_report.json of B has those of the "
        "calibration, and verify measures them on pictures of yours:\n"
        f"  glmq verify {tmp_path} --reference {tiny} --calib-images FOLDER\n"
    ) in shown


def test_values_that_another_float_dtype_rounds_are_equal_within_it(tiny: Path, tiny_seed: Path) -> None:
    shown = glmq("inspect", tiny, tiny_seed, "--name", "lm_head.weight").stdout
    assert "lm_head.weight   BF16 > F16   equal within BF16" in shown
    assert "\n0 of 1 compared tensors are identical, 1 is equal within the dtypes\n" in shown


def test_identical_checkpoints_say_so(tiny: Path) -> None:
    shown = glmq("inspect", tiny, tiny).stdout
    assert "115 of 115 compared tensors are identical\n" in shown


@pytest.mark.parametrize("two", [False, True])
def test_csv_and_html_are_written_beside_the_table(two: bool, tiny: Path, tiny_seed: Path, tmp_path: Path) -> None:
    folders = (tiny, tiny_seed) if two else (tiny_seed, "--values", "--layer", 0)
    table, page = tmp_path / "rows.csv", tmp_path / "page.html"
    result = glmq("inspect", *folders, "--csv", table, "--html", page)
    assert f"written: {table}" in result.stderr
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = document(*folders)["tensors"]
    assert [row["name"] for row in rows] == [row["name"] for row in wanted]
    assert ("relative_l2" in rows[0]) == two
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert html.count("<svg") > 3
    assert "http" not in html
    assert ("glmq_report.json of B has those of the calibration, and verify measures them on" in html) == two
    assert "for which SGLang has no linear" not in html  # no problem of those who serve it elsewhere


def test_a_table_that_cannot_be_written_leaves_one_object_on_stdout(small: Path) -> None:
    result = run("inspect", small, "--json", "--csv", "/dev/full")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["schema"] == "glmq.inspect/1"
    assert re.fullmatch(
        r"error: /dev/full: \d+ bytes are to be written, but its disk takes no more, with \d+ bytes free: it may have as many "
        r"files as it can hold \(df -i\); remove some or choose another disk\n",
        " ".join(result.stderr.split("\n")).strip() + "\n",
    )
    assert json.loads(run("inspect", small / "nowhere", "--json").stdout)["error"]["code"] == "GLMQ-E403"


def test_statistics_say_what_they_were_taken_from_and_what_the_inputs_look_like(small_stats: Path) -> None:
    shown = glmq("inspect", small_stats).stdout
    lines = shown.splitlines()
    assert lines[0].startswith(f"{small_stats}: calibration statistics of glmq {__version__}, ")
    assert lines[1] == "for: the input of `glmq quantize --stats`"
    assert re.fullmatch(r"4 samples, [0-9,]+ tokens, \w+; answers: 2", lines[2])
    assert "settled for dense 8-bit weights: against half of the samples, ranges changed by" in lines[3]
    assert "layers.0-1 self_attn.q_proj" in shown
    assert "outliers: channels whose largest magnitude is beyond 8 times the median channel's" in shown
    one = glmq("inspect", small_stats, "--layer", 1).stdout
    assert "layers.1 self_attn.o_proj" in one
    assert "layers.0 " not in one
    found = document(small_stats)["statistics"]
    assert (found["samples"], found["answered"], found["generated"]) == (4, 2, 0)
    assert {entry["site"] for entry in found["inputs"]} >= {"lm_head", "model.language_model.layers.0.self_attn.q_proj"}


def test_two_statistics_folders_are_compared(small_stats: Path, tmp_path: Path) -> None:
    table, page = tmp_path / "rows.csv", tmp_path / "page.html"
    lines = glmq("inspect", small_stats, small_stats, "--csv", table, "--html", page).stdout.splitlines()
    assert lines[0].startswith(f"A {small_stats}: 4 samples, ")
    assert lines[0].endswith("; answers: 2; settled for dense 8-bit weights")
    assert lines[2:4] == ["of the same float model", "from the same samples"]
    assert lines[4] == "Inputs of B against A, largest change of mean squares first".ljust(len(lines[4]))
    found = json.loads(glmq("inspect", small_stats, small_stats, "--json").stdout)
    assert (found["schema"], found["same_model"], found["only_a"]) == ("glmq.compare-statistics/1", True, [])
    assert {change["mean_squares"] for change in found["changes"]} == {0.0}
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(found["changes"])
    assert "largest change of mean squares first" in page.read_text(encoding="utf-8")
    result = run("inspect", small_stats, small_stats, "--layer", 0)
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --layer, --name, --values and --sort: two statistics folders are compared as a whole; drop them\n",
    )


def test_damaged_statistics_are_listed_with_what_is_wrong(small_stats: Path, tmp_path: Path) -> None:
    for path in small_stats.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "statistics.json").read_text(encoding="utf-8")
    (tmp_path / "statistics.json").write_text(text.replace('"max_pixels": null', '"max_pixels": 784'), encoding="utf-8")
    shown = glmq("inspect", tmp_path).stdout
    assert "!! error: " in shown
    assert "its digest does not fit its contents, so it was altered" in shown
    assert "layers.0-1 self_attn.q_proj" in shown


def test_statistics_and_compressed_folders_are_described(small_stats: Path, tiny_seed: Path, tmp_path: Path) -> None:
    assert document(small_stats)["kind"] == "statistics"
    glmq("compress", "--model_path", tiny_seed, "--save_directory", tmp_path / "sc", "--codec", "portable")
    found = document(tmp_path / "sc")
    assert (found["kind"], found["for"]) == (
        "portable", "no engine; `glmq compress --decompress` restores the W8A8S weights",
    )  # fmt: skip
    types = re.findall(r"layers\.0-5 self_attn\.(.)_proj +([A-Z0-9]+) ", glmq("inspect", tmp_path / "sc").stdout)
    assert types == [(role, "W8A8S") for role in "koqv"]  # q, k and v have float biases too


def test_one_weight_file_is_described_by_what_lies_beside_it(tiny_seed: Path, tmp_path: Path) -> None:
    (file,) = tiny_seed.glob("*.safetensors")
    shown = glmq("inspect", file).stdout
    assert shown.startswith(f"{file}: quantized checkpoint, W8A8S (ascendV1), float16 floats\n")
    assert "layers.0-5 mlp.gate_up_proj" in shown
    assert "for: " not in shown
    assert f"\nmodel: {document(tiny_seed)['model']}\n" in shown
    found = document(file)
    assert {row["quant_type"] for row in found["tensors"]} == {"FLOAT", "W8A8S"}
    assert (found["tensors_total"], found["problems"], found["engines"]) == (len(load_file(file)), [], {})
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    assert document(alone)["kind"] == "quantized"
    assert document(alone, "--layer", 0, "--name", "q_proj.weight", "--values")["tensors"][0]["values"]["minimum"] < 0
    other = tmp_path / "adapter.bin"
    other.write_bytes(b"PK")
    result = run("inspect", other)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == (
        f"error: {other}: 2 bytes are too few for a safetensors file, which has at least 8; the file is damaged or incomplete, "
        "download or copy it again\n"
    )


def test_a_page_of_a_comparison_has_no_verdict(tiny: Path, tiny_seed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    glmq("inspect", tiny, tiny_seed, "--html", page)
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    assert not re.findall(r'class="[^"]*\b(?:bad|warn|good)\b', body)
    assert "worst" not in body.lower()


def test_a_wrong_folder_and_contradicting_options_are_refused(tiny: Path, tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"]["code"] == "GLMQ-E403"
    result = run("inspect", tiny, tiny, "--values")
    assert result.exit_code == 2
    assert "--values and --sort are for one checkpoint" in result.stderr


@pytest.mark.slow
def test_headers_are_read_without_torch(tiny_seed: Path) -> None:
    code = (
        "import sys\n"
        "from glmq.cli.app import app\n"
        f"app(['inspect', {str(tiny_seed)!r}, '-q'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGES)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")
def test_memory_that_a_comparison_frees_is_used_again() -> None:
    code = """
import ctypes, resource
from glmq.cli.malloc import keep_freed_memory

keep_freed_memory()
libc, place, faults = ctypes.CDLL(None), ctypes.c_void_p(), []
for _ in range(20):  # the heap may grow several times before it holds them
    libc.posix_memalign(ctypes.byref(place), 64, 48 * 2**20)  # a tensor's; by default from the system each time, 12288 pages
    ctypes.memset(place, 1, 48 * 2**20)
    libc.free(place)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-6])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGES)
    assert int(done.stdout) < 1000
