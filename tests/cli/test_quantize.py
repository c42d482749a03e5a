"""`glmq quantize` as its users call it: README's sparse command, what it prints, and one sentence for every bad input."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import PIL
import pytest
import torch
from cli.command_line import glmq, run
from helpers import StandInNpu, edit_json, tree
from programs import start_glmq

from glmq import device
from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import read_checksums
from glmq.checkpoint.reader import Checkpoint

SEED = ("--w_bit", 4, "--is_lowbit", "True", "--use_sigma", "True", "--torch_dtype", "fp16")
FILE = "model-00001-of-00001.safetensors"
WEIGHTS = "quant_model_weight_w8a8s.safetensors"


def the_sparse_command(model: Path, out: Path, images: Path, device_type: str) -> list[object]:
    """README's step 1, flag by flag, on pictures alone."""
    return [
        "--model_path", model,
        "--save_directory", out,
        "--calib_images", images,
        "--w_bit", 4,
        "--a_bit", 8,
        "--device_type", device_type,
        "--anti_method", "m2",
        "--is_lowbit", "True",
        "--fraction", 0.01,
        "--use_sigma", "True",
        "--torch_dtype", "fp16",
        "--trust_remote_code", "True",
        "--no-texts",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def few(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two pictures."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("00.png", "01.png"):
        shutil.copy(pictures / name, folder)
    return folder


@pytest.fixture(scope="module")
def seed_output(small: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What README's sparse command writes on a CPU."""
    out = tmp_path_factory.mktemp("seed") / "out"
    glmq("quantize", *the_sparse_command(small, out, few, "cpu"))
    return tree(out)


@pytest.mark.slow
def test_the_sparse_command_runs_as_a_program(
    small: Path, few: Path, seed_output: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = start_glmq("quantize", *the_sparse_command(small, out, few, "cpu"), environment={"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert tree(out) == seed_output
    assert "Error per linear, worst output error first" in done.stdout
    assert " quantize (pass 3 of 3): 6 blocks" in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_the_sparse_command_runs_on_an_npu(
    small: Path, few: Path, seed_output: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu = StandInNpu()
    monkeypatch.setattr(device, "_load_npu", lambda: npu)
    monkeypatch.setattr(device, "_npu_device", lambda _: torch.device("cpu"))
    # The stand-in's device is a CPU, for which nothing is released; any other kind is.
    monkeypatch.setattr("glmq.calibration.stream.release", lambda _: device.release(torch.device("meta")))
    glmq("quantize", *the_sparse_command(small, tmp_path / "out", few, "npu"))
    each = ["synchronize", "empty_cache"]
    assert npu.calls == ["jit_compile=False", *each * 5]  # a vision block, the merger, two text layers, lm_head
    assert tree(tmp_path / "out") == seed_output


@pytest.mark.slow
def test_dashes_and_flags_are_the_same_command(
    small: Path, few: Path, seed_output: dict[str, str], tmp_path: Path
) -> None:
    glmq(
        "quantize", "--model-path", small, "--save-directory", tmp_path / "out", "--calib-images", few,
        "--w-bit", 4, "--is-lowbit", "--use-sigma", "--torch-dtype", "fp16", "--no-overwrite", "--no-texts",
    )  # fmt: skip
    assert tree(tmp_path / "out") == seed_output


def command(model: Path, stats: Path, out: Path, *options: object) -> list[object]:
    return ["quantize", "--model_path", model, "--stats", stats, "--save_directory", out, *options]


def test_the_screen_shows_errors_bytes_and_the_next_command(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "a [red] folder"
    result = glmq(*command(small, small_stats, out, *SEED))
    text = result.stdout
    rows = re.findall(r"^ (layers\.\S+) +W8A8S +\S+ +\S+ +\S+% +\S+% +(!?!? ?[\d.]+)% ", text, re.MULTILINE)
    assert len(rows) == 10
    errors = [float(error.lstrip("! ")) for _, error in rows]
    assert errors == sorted(errors, reverse=True)
    assert re.search(r"^ text linears +96\.5 KiB +57\.\d KiB +0\.59\d *$", text, re.MULTILINE)
    written, size, error, settled, answers, check, *following = text.splitlines()[-8:]
    assert re.fullmatch(rf"W8A8S \(float16\) written to {re.escape(str(out))} in [\d.]+ (s|min)", written)
    assert re.fullmatch(r"  size: \d+\.\d KiB before, \d+\.\d KiB after", size)
    worst = f"{errors[0]:.2f}% at {rows[0][0]}"
    assert re.fullmatch(rf"  output error: median \d+\.\d\d%, worst {re.escape(worst)}", error)
    assert settled == "  statistics: not settled; more images would help, -v says what moved"
    assert answers.startswith("  answers: 2 samples have none; ")
    assert check == f"  check it: glmq verify '{out}' --reference {small}"
    assert following == [
        "Next, for the Atlas 300I Duo: compress it for the tensor-parallel size that you will serve with:",
        f"  glmq compress --model_path '{out}' --save_directory '{out}-sc' --tp 1",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("all_texts")
def test_the_passes_of_a_whole_run_are_counted_on_stderr_and_in_the_file_of_events(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    out, events = tmp_path / "out", tmp_path / "events.jsonl"
    options = ["--calib_images", pictures, "--events", events, *SEED]
    result = glmq("quantize", "--model_path", small, "--save_directory", out, *options)
    note, *lines = result.stderr.splitlines()
    assert note == "note: 16 calibration images; 30 are wanted for accuracy"
    assert [re.sub(r"(, about| [\d.]+ (s|min)).*", "", line[9:]) for line in lines if " gone" not in line] == [
        "calibrate (pass 1 of 3): 5 blocks", "calibrate:",
        "rate (pass 2 of 3): 2 blocks", "rate:",
        "quantize (pass 3 of 3): 6 blocks", "quantize:",
    ]  # fmt: skip
    told = [json.loads(line) for line in events.read_text().splitlines()]
    (planned,) = [line for line in told if line["event"] == "run_planned"]
    done = [line["name"] for line in told if line["event"] == "block_done"]
    assert done == [step["name"] for one in planned["passes"] for step in one["steps"]]
    kinds = [step["kind"] for step in planned["passes"][2]["steps"]]
    assert kinds == ["vision", "merger", "text", "text", "head", "other"]
    steps = [(line["name"], line["done"], line["parts"]) for line in told if line["event"] == "block_step"]
    assert ("model.language_model.layers.1", 15, 24) in steps  # samples: pictures and texts
    assert ("model.language_model.layers.1", 2, 3) in steps  # inputs
    assert all(0.0 <= line["share"] < 1.0 for line in told if line["event"] == "block_step")


def test_quiet_prints_the_folder_and_nothing_else(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "a [bold] :smile: folder"
    result = glmq(*command(small, small_stats, out, "--quiet"))
    assert (result.stdout, result.stderr) == (f"{out}\n", "")


def test_json_is_the_report_and_the_folder(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = glmq(*command(small, small_stats, out, "--json"))
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert result.stdout == json.dumps(found, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert found.pop("folder") == str(out)
    (done,) = found.pop("passes")
    assert (done["title"], sorted(done)) == ("quantize", ["peak_bytes", "seconds", "stages", "title"])
    times = {stage.pop("stage"): stage for stage in done["stages"]}
    assert set(times) == {"read", "smoothing", "rounding", "report", "write", "copy"}
    assert 0 < sum(stage["seconds"] for stage in times.values()) <= done["seconds"]
    weights = 2 * (128 * 64 + 64 * 64 + 2 * 96 * 64)  # of two layers: q, k, v; o; gate and up, float types are 16 bits
    assert times["rounding"]["flops"] == 64 * weights
    assert done["seconds"] <= found.pop("seconds")
    assert found.pop("settled") is True  # W8A8 needs settled ranges alone
    assert found == json.loads((out / "glmq_report.json").read_text())
    assert (found["schema"], found["quant_type"]) == ("glmq.quantize/1", "W8A8")


def test_the_output_describes_itself_and_equal_runs_differ_in_one_key_alone(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for name in ("a", "b"):
        glmq(*command(small, small_stats, tmp_path / name, "-q", "--html", page))
    first, second = (json.loads((tmp_path / name / "glmq_report.json").read_text()) for name in ("a", "b"))
    runs = [document.pop("run") for document in (first, second)]
    assert first == second
    assert runs[0]["output"] == str(tmp_path / "a")
    assert runs[0]["note"].startswith("of this run alone: ")
    assert [done["title"] for done in runs[0]["passes"]] == ["quantize"]
    assert first["recipe"]["quant_type"] == "W8A8"
    assert {kept["name"]: kept["why"] for kept in first["kept_float"]}["lm_head"] == "by default (lm_head)"
    assert len(first["calibration"]["samples"]) == 4
    for linear in first["linears"]:
        assert sum(linear["integers"]) == linear["rows"] * linear["cols"]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert page.read_bytes() == (tmp_path / "b" / "glmq_report.html").read_bytes()
    shown = page.read_text().replace("<wbr>", "")
    for linear in first["linears"]:
        anchor = f"integers-{linear['name']}"
        assert shown.count(f'<figure id="{anchor}">') == 1
        assert shown.count(f'<a href="#{anchor}">') >= 2  # a square of the map, and a row
    assert "by default (*.mlp.down_proj)" in shown
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\nQuantized to W8A8 (ascendV1, bfloat16) by glmq.\n" in card
    assert re.search(r"^- MindIE.*: set `modelWeightPath` to this folder", card, re.MULTILINE)


def test_as_many_linears_float_as_there_are_is_refused_by_the_option_that_asks_for_it(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    groups = 6  # of 2 layers: q, k and v; o; gate and up
    for topk in (groups, 100):
        result = run(*command(small, small_stats, tmp_path / "out", "--fallback-topk", topk, "-v"))
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: --fallback-topk {topk}: leaves no linear to quantize, of 6 inputs with linears that become integers; "
            "lower it\n"
        )
    result = run(*command(small, small_stats, tmp_path / "out", "--max-error", 0, "--fallback-topk", groups - 1))
    assert result.exit_code == 2
    assert re.fullmatch(
        r"error: --max-error 0: leaves no linear to quantize, the smallest output error is 0\.0\d+; raise it",
        result.stderr.splitlines()[-1],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--fallback-topk", 1)])
def test_without_a_report_the_same_weights_stand_alone(
    options: tuple[object, ...], small: Path, small_stats: Path, tmp_path: Path
) -> None:
    full, bare = tmp_path / "full", tmp_path / "bare"
    glmq(*command(small, small_stats, full, *options, "-q"))
    result = glmq(*command(small, small_stats, bare, *options, "--no-report", "--json"))
    with_report, without = tree(full), tree(bare)
    written = {"README.md", "glmq_report.csv", "glmq_report.html", "glmq_report.json"}
    assert set(with_report) - set(without) == written
    assert set(without) <= set(with_report)
    assert [name for name in without if without[name] != with_report[name]] == ["glmq_checksums.json"]
    assert read_checksums(bare).tensors_digest == read_checksums(full).tensors_digest
    found, wanted = json.loads(result.stdout), json.loads((full / "glmq_report.json").read_text())
    assert found["linears"] == []
    assert "report" not in {stage["stage"] for stage in found["passes"][-1]["stages"]}
    for left_out in ("linears", "run"):
        del found[left_out], wanted[left_out]
    assert {key: found[key] for key in wanted} == wanted


def test_without_a_report_the_end_tells_of_sizes_and_statistics(small: Path, small_stats: Path, tmp_path: Path) -> None:
    shown = glmq(*command(small, small_stats, tmp_path / "out", "--no-report")).stdout
    assert "output error" not in shown
    assert re.findall(r"^  (\w[\w ]*):", shown, re.MULTILINE) == ["size", "statistics", "answers", "check it"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--html", "page.html"),
            "--html: it is the page of the report, and --no-report writes none; leave one of the two out",
        ),
        (
            ("--bias-correction",),
            "--no-report: verify checks what --bias-correction did by the report; leave one of them out",
        ),
    ],
)
def test_what_needs_the_report_is_refused_without(
    options: tuple[str, ...], sentence: str, small: Path, small_stats: Path, tmp_path: Path
) -> None:
    result = run(*command(small, small_stats, tmp_path / "out", "--no-report", *options))
    assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
    assert not os.listdir(tmp_path)


def test_patterns_say_how_many_linears_they_match(small: Path, small_stats: Path, tmp_path: Path) -> None:
    result = glmq(
        *command(small, small_stats, tmp_path / "out", "--keep-float", "*.o_proj"),
        "--keep-float", "*.self_attn.[qkv]_proj", "--layer", "*.layers.0.mlp.down_proj=W8A8",
    )  # fmt: skip
    assert result.stderr.splitlines()[:3] == [
        "--layer '*.layers.0.mlp.down_proj=W8A8' matches 1 linear",
        "--keep-float '*.o_proj' matches 2 linears",
        "--keep-float '*.self_attn.[qkv]_proj' matches 6 linears",
    ]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        quantized = [name for name, info in checkpoint.items() if info.dtype == "I8"]
    assert quantized == [
        "model.language_model.layers.0.mlp.down_proj.weight",
        "model.language_model.layers.0.mlp.gate_up_proj.weight",
        "model.language_model.layers.1.mlp.gate_up_proj.weight",
    ]


@pytest.mark.slow
def test_statistics_are_kept_where_they_are_asked_for_and_used_again(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, images = tmp_path / "stats", ("--calib_images", pictures, "--limit", 1)
    glmq(*command(small, stats, tmp_path / "one"), *images)
    before = tree(stats)
    monkeypatch.setattr("glmq.jobs.quantize.write_statistics", None)
    glmq(*command(small, stats, tmp_path / "two"))
    assert tree(stats) == before
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "stats", "two"]


@pytest.mark.slow
def test_overwriting_replaces_an_older_output(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    glmq(*command(small, small_stats, out, *SEED))
    glmq(*command(small, small_stats, out, "--overwrite", "True"))
    assert sorted(path.name for path in out.glob("quant*")) == [
        "quant_model_description.json",
        "quant_model_weight_w8a8.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_needs_no_torchrun(small: Path, small_stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(*command(small, small_stats, small.parent / "out", "--dry-run"))
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --dry-run: needs no torchrun, one process plans for all; run `glmq quantize` itself\n"
    )


def test_a_dry_run_foretells_and_writes_nothing(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = json.loads(glmq(*command(small, small_stats, out, "--dry-run", "--json", *SEED)).stdout)
    assert list(tmp_path.iterdir()) == []
    glmq(*command(small, small_stats, out, *SEED))
    assert found["files"] == [{"name": WEIGHTS, "bytes": (out / WEIGHTS).stat().st_size}]
    assert found["output_bytes"] == (out / WEIGHTS).stat().st_size
    assert (found["statistics_bytes"], found["calibration_seconds"]) == (0, None)
    assert found["quantization_seconds"] > 0


def test_a_dry_run_says_what_engines_do_not_run(small: Path, small_stats: Path, tmp_path: Path) -> None:
    said = glmq(*command(small, small_stats, tmp_path / "out", "--dry-run", "--a_bit", 16)).stderr
    assert "warning: vLLM-Ascend runs W8A16 in float16 only, not in bfloat16: " in " ".join(said.split())


def test_a_dry_run_without_statistics_counts_the_calibration(small: Path, pictures: Path, tmp_path: Path) -> None:
    images = ["--calib-images", pictures, "--limit", 2]
    first = glmq("calibrate", "--model-path", small, "--stats", tmp_path / "stats", *images, "--dry-run", "--json")
    calibration = json.loads(first.stdout)
    options = ["--model_path", small, "--save_directory", tmp_path / "out", *images, *SEED, "--dry-run"]
    found = json.loads(glmq("quantize", *options, "--json").stdout)
    assert found["statistics_bytes"] == calibration["output_bytes"] + calibration["work_bytes"]
    assert found["peak_bytes"] >= calibration["peak_bytes"]
    assert found["calibration_seconds"] > 0
    assert found["quantization_seconds"] is None
    assert re.search(r"time: calibration about \d+(\.\d)? (s|min) on this machine", glmq("quantize", *options).stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_options_written_to_a_file_give_the_same_run(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    options = command(small, small_stats, out, *SEED, "--keep-float", "*.o_proj")
    (tmp_path / "run.toml").write_text(glmq(*options, "--dump-config").stdout)
    glmq(*options)
    glmq("quantize", "--config", tmp_path / "run.toml", "--save_directory", again)
    assert tree(again) == tree(out)


Bad = Callable[[Path, Path, Path], tuple[list[object], int, str]]
"""(work folder with a copy of the model in it, statistics, pictures) -> arguments, exit code, sentence."""


def config_edit(edit: Callable[[dict], object], sentence: str) -> Bad:
    def make(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
        edit_json(work / "model" / "config.json", edit)
        return command(work / "model", stats, work / "out"), 4, sentence.format(config=work / "model" / "config.json")

    return make


def options(*added: object, code: int, sentence: str) -> Bad:
    def make(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
        return command(work / "model", stats, work / "out", *added), code, sentence.format(work=work)

    return make


def missing_shard(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    (work / "model" / FILE).unlink()
    index = work / "model" / "model.safetensors.index.json"
    sentence = f"{index}: names {FILE}, which is not in the folder; download the missing file"
    return command(work / "model", stats, work / "out"), 4, sentence


def truncated_shard(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    path = work / "model" / FILE
    whole = path.stat().st_size
    os.truncate(path, whole - 1000)
    with pytest.raises(Exception, match="bytes") as caught:  # the reader's own sentence, asserted in its tests
        Checkpoint.open(work / "model")
    assert str(caught.value).startswith(f"{path}: ")
    return command(work / "model", stats, work / "out"), 4, str(caught.value)


def no_weights(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    model = work / "model"
    (model / FILE).rename(model / "pytorch_model.bin")
    (model / "model.safetensors.index.json").unlink()
    sentence = f"{model}: wanted *.safetensors weight files, but there are none; found pytorch_model.bin; "
    return command(model, stats, work / "out"), 4, sentence + "convert them to safetensors"


def no_model(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    sentence = f"{work / 'none'}: no such folder; give the folder of the float weights as --model_path"
    return command(work / "none", stats, work / "out"), 4, sentence


def calibrating(work: Path, images: Path, *added: object) -> list[object]:
    paths = ["--model_path", work / "model", "--calib_images", images, "--save_directory", work / "out"]
    return ["quantize", *paths, *added]


def no_images(work: Path, _: Path, __: Path) -> tuple[list[object], int, str]:
    (work / "images").mkdir()
    (work / "images" / "README.md").touch()
    sentence = (
        f"{work / 'images'}: holds no image (bmp, gif, jpeg, jpg, png, tif, tiff, webp are read); "
        "put some there, 30 are wanted for accuracy"
    )
    return calibrating(work, work / "images"), 4, sentence


def bad_images(work: Path, _: Path, pictures: Path) -> tuple[list[object], int, str]:
    images = work / "images"
    shutil.copytree(pictures, images)
    (images / "zz.png").write_bytes(b"no image")
    sentence = (
        f"{images}: 1 of 17 files are not usable images: zz.png (is no picture that Pillow {PIL.__version__} reads); "
        "remove them or pass --skip-bad-images"
    )
    return calibrating(work, images), 4, sentence


def no_tokenizer(work: Path, _: Path, pictures: Path) -> tuple[list[object], int, str]:
    (work / "model" / "chat_template.jinja").unlink()
    sentence = (
        f"{work / 'model'}: has no chat template (a base model comes without); choose one with --chat-template FILE, "
        "e.g. the chat_template.jinja of GLM-4.1V-9B-Thinking"
    )
    return calibrating(work, pictures), 4, sentence


def output_not_empty(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    (work / "out").mkdir()
    (work / "out" / "notes.txt").touch()
    sentence = (
        f"{work / 'out'}: is not empty, and glmq did not write notes.txt in it, so that even --overwrite replaces nothing "
        "there; choose another folder, or empty this one yourself"
    )
    return command(work / "model", stats, work / "out", "--overwrite"), 2, sentence


def output_is_a_file(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    (work / "out").touch()
    sentence = f"{work / 'out'}: is a file, a folder is needed; choose another name"
    return command(work / "model", stats, work / "out", "--overwrite"), 2, sentence


def output_is_the_input(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    (work / "link").symlink_to(work / "model")
    sentence = f"{work / 'link'}: is the folder of the float weights; choose another --save_directory"
    return command(work / "model", stats, work / "link", "--overwrite"), 2, sentence


def output_holds_the_input(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    sentence = f"{work}: holds the float weights ({work / 'model'}); choose another --save_directory"
    return command(work / "model", stats, work, "--overwrite"), 2, sentence


def output_is_the_images(work: Path, _: Path, pictures: Path) -> tuple[list[object], int, str]:
    shutil.copytree(pictures, work / "out")
    sentence = f"{work / 'out'}: is the folder of the calibration images; choose another --save_directory"
    return calibrating(work, work / "out", "--overwrite"), 2, sentence


def output_is_the_statistics(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    shutil.copytree(stats, work / "stats")
    sentence = f"{work / 'stats'}: is the folder of the statistics; choose another --save_directory"
    return command(work / "model", work / "stats", work / "stats", "--overwrite"), 2, sentence


def statistics_in_the_model(work: Path, _: Path, __: Path) -> tuple[list[object], int, str]:
    sentence = f"{work / 'model'}: is the folder of the float weights; choose another --stats"
    return command(work / "model", work / "model", work / "out"), 2, sentence


def unfinished_statistics(work: Path, stats: Path, _: Path) -> tuple[list[object], int, str]:
    shutil.copytree(stats, work / "stats")
    (work / "stats" / "statistics.json").unlink()
    sentence = (
        f"{work / 'stats'}: has no statistics.json, so it is not a finished statistics folder; "
        "run `glmq calibrate` first"
    )
    return command(work / "model", work / "stats", work / "out"), 4, sentence


NEEDED = (
    "but glmq needs 'glm4v' (GLM-4.1V-9B, GLM-4.6V-Flash, AutoGLM-Phone-9B, Glyph); "
    "give the folder of a GLM-4.1V or GLM-4.6V-Flash"
)

BAD_INPUTS: dict[str, Bad] = {
    "a mixture of experts": config_edit(
        lambda c: c.update(model_type="glm4v_moe"),
        f"{{config}}: model_type is 'glm4v_moe': GLM-4.5V and GLM-4.6V are mixtures of experts, {NEEDED}",
    ),
    "an older ChatGLM": config_edit(
        lambda c: c.update(model_type="chatglm"),
        f"{{config}}: model_type is 'chatglm': glm-4v-9b is the older ChatGLM architecture, {NEEDED}",
    ),
    "an unknown layout": config_edit(
        lambda c: c.pop("text_config"),
        "{config}: has neither text_config nor hidden_size, so its layout is none of the three known ones; "
        "take the config.json that belongs to the weights",
    ),
    "a missing shard": missing_shard,
    "a truncated shard": truncated_shard,
    "no safetensors": no_weights,
    "no model": no_model,
    "no images": no_images,
    "bad images": bad_images,
    "no chat template": no_tokenizer,
    "bf16 with a sparse type": options(
        "--w_bit", 4, "--is_lowbit", "True", code=2,
        sentence="W8A8S with bfloat16 float weights (--torch_dtype is bf16 unless given): no engine loads it, "
        "the 300I Duo has no bfloat16; pass --torch_dtype fp16",
    ),
    "contradicting options": options(
        "--co_sparse", "True", *SEED, code=2,
        sentence="--co_sparse True with --is_lowbit True: they are two algorithms for the same type; choose one",
    ),
    "sigma_factor out of range": options(
        *SEED, "--sigma_factor", 3.5, code=2, sentence="--sigma_factor 3.5: a number from 1.0 to 3.0 is needed"
    ),
    "fraction out of range": options(
        *SEED, "--fraction", 0.5, code=2, sentence="--fraction 0.5: a number from 0.01 to 0.1 is needed"
    ),
    "a part size that is none": options(
        "--part_file_size", "0", code=2,
        sentence="--part_file_size 0: a whole number of GB, at least 1, is needed, or a size like 4GB or 500MB",
    ),
    "a pattern without a match": options(
        "--keep-float", "lm_heat", code=2,
        sentence="--keep-float 'lm_heat' matches none of the model's 22 linears; their names look like 'lm_head'",
    ),
    "an output that is not empty": output_not_empty,
    "an output that is a file": output_is_a_file,
    "an output that is the input": output_is_the_input,
    "an output that holds the input": output_holds_the_input,
    "an output that is the images' folder": output_is_the_images,
    "an output that is the statistics' folder": output_is_the_statistics,
    "statistics in the model's folder": statistics_in_the_model,
    "unfinished statistics": unfinished_statistics,
}  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_input_is_one_sentence_and_leaves_everything_as_it_was(
    what: str, as_json: bool, small_copy: Path, small_stats: Path, pictures: Path
) -> None:
    work = small_copy.parent
    arguments, code, sentence = BAD_INPUTS[what](work, small_stats, pictures)
    before = tree(work)
    result = run(*arguments, "--json" if as_json else "--quiet")
    assert result.exit_code == code
    if as_json:
        assert json.loads(result.stdout)["error"]["message"] == sentence
        assert result.stderr == ""
    else:
        assert (result.stdout, result.stderr) == ("", f"error: {sentence}\n")
    assert tree(work) == before


@pytest.mark.slow
def test_bad_images_are_left_out_and_counted_when_asked_to(small: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "images")
    (tmp_path / "images" / "!.png").write_bytes(b"no image")
    result = glmq(
        "quantize", "--model_path", small, "--calib_images", tmp_path / "images", "--limit", 2,
        "--save_directory", tmp_path / "out", "--skip-bad-images",
    )  # fmt: skip
    assert result.stderr.splitlines()[:2] == [
        f"left out !.png: is no picture that Pillow {PIL.__version__} reads",
        "1 file left out, 2 images used",
    ]


def test_a_disk_without_room_stops_the_run_before_it_starts(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = run(*command(small, small_stats, tmp_path / "out", "-q"))
    found = re.fullmatch(
        rf"error: {tmp_path / 'out'}: (\d+) bytes are to be written, but its disk has 1000 free; "
        r"make room or choose another disk\n",
        result.stderr,
    )
    assert result.exit_code == 5
    assert found is not None
    assert int(found[1]) > 600_000
    assert list(tmp_path.iterdir()) == []


def test_a_missing_torch_npu_stops_the_run(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    result = run("quantize", *the_sparse_command(small, tmp_path / "out", pictures, "npu"), "-q")
    assert result.exit_code == 5
    assert result.stderr.startswith("error: --device_type npu: ")
    assert "torch_npu cannot be imported (import of torch_npu halted; None in sys.modules)" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--w_bit", "--device_type", "--torch_dtype", "--anti_method", "--fraction"])
def test_a_value_of_another_kind_is_wrong_usage(option: str, small: Path, tmp_path: Path) -> None:
    result = run("quantize", "--model_path", small, "--save_directory", tmp_path / "out", option, "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.match(rf"error: {option}(?: cuda)?: ", result.stderr)
    assert result.stderr.endswith("; see `root quantize --help`\n")
    assert result.stderr.count("\n") == 1


def test_a_missing_path_is_wrong_usage(small: Path) -> None:
    result = run("quantize", "--model_path", small)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--save-directory: missing" in result.stderr


@pytest.mark.parametrize(
    ("engine", "reached"),
    [
        ("calibrate.calibrate_checkpoint", "calibrate (pass 1 of 2): 0 of 5"),
        ("quantize.quantize_checkpoint", "quantize (pass 2 of 2): 0 of 6"),
    ],
)
def test_ctrl_c_before_the_first_block_leaves_nothing(
    engine: str, reached: str, small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"glmq.jobs.{engine}", stop)
    stats = tmp_path / "stats"
    arguments = command(small, stats, tmp_path / "out", "--calib_images", pictures, "--limit", 1, "-q")
    result = run(*arguments)
    assert result.exit_code == 130
    assert result.stderr == (
        f"error: stopped by Ctrl-C; {reached} blocks are finished; nothing half-written was left behind\n"
        f"  to start again: root {' '.join(map(str, arguments))}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == (["stats"] if engine.startswith("quantize") else [])


@pytest.mark.parametrize(
    ("options", "named", "dry"),
    [
        (
            ("--device_type", "npu", "--trust_remote_code", "True"),
            "--device_type npu, --trust_remote_code True have",
            True,
        ),
        (("--prompt", "What is it?"), "--prompt has", True),
        (("--no-texts",), "--no-texts has", True),
        (("--limit", 1, "--skip-bad-images"), "--limit, --skip-bad-images have", True),
        (("--limit", 1, "--skip-bad-images"), "--limit, --skip-bad-images have", False),
    ],
)
def test_options_that_statistics_leave_without_effect_are_named_once(
    options: tuple[object, ...], named: str, dry: bool, small: Path, small_stats: Path, tmp_path: Path
) -> None:
    result = glmq(*command(small, small_stats, tmp_path / "out", *SEED, *options), *(["--dry-run"] if dry else []))
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: -")]
    assert notes == [f"note: {named} no effect: the statistics in {small_stats} are used, so the model is not run"]


def test_options_that_say_the_same_as_the_statistics_need_no_note(
    small: Path, small_stats: Path, pictures: Path, tmp_path: Path
) -> None:
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[Statistics.open(small_stats).manifest["compute_dtype"]]
    same = ("--calib_images", pictures, "--limit", 2, "--compute-dtype", dtype, "--device_type", "cpu")
    result = glmq(*command(small, small_stats, tmp_path / "out", *same))
    assert not [line for line in result.stderr.splitlines() if line.startswith("note: -")]


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--compute-dtype", "fp16"), "were taken with --compute-dtype {compute_dtype}, the command asks for float16; "
         "drop --compute-dtype"),
        (("--max-pixels", 1000), "were taken with --max-pixels None, the command asks for 1000; drop --max-pixels"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_statistics_are_refused(
    options: tuple[object, ...], sentence: str, dry: bool, small: Path, small_stats: Path, tmp_path: Path
) -> None:
    result = run(*command(small, small_stats, tmp_path / "out", *options), *(["--dry-run"] if dry else []))
    assert result.exit_code == 4
    sentence = sentence.format(**Statistics.open(small_stats).manifest)
    assert result.stderr.splitlines()[-1] == (
        f"error: {small_stats}: these statistics {sentence} to use them as they are, or run `glmq calibrate` again"
    )
    assert list(tmp_path.iterdir()) == []
