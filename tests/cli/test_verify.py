"""`glmq verify` as a user runs it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli.command_line import glmq, run
from helpers import edit_json, edit_tensors, quantize

from glmq.compression.manifest import MANIFEST, read_manifest
from glmq.jobs.compress import compress
from glmq.model.tiny import TINY_CASES

LAYER = "model.language_model.layers.0"
CASES = TINY_CASES / "images.jsonl"


@pytest.fixture
def copy(small_seed: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in small_seed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_a_good_checkpoint_passes_with_behaviour_and_captions(tiny: Path, tiny_seed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = glmq("verify", tiny_seed, "--reference", tiny, "--cases", CASES, "--limit", 2, "--html", page)
    shown = result.stdout
    assert "passed: nothing wrong with files, integers and behaviour" in shown
    lines = shown.splitlines()
    assert lines[0] == lines[-1] == "passed: nothing wrong with files, integers and behaviour"
    assert re.search(
        r"^output error of 30 linears: [\d.]+% at worst \(layers\.\d\.\S+\), [\d.]+% in the median; -v shows each$",
        shown, re.MULTILINE,
    )  # fmt: skip
    assert re.search(
        r"^predicted tokens: KL \S+ ± \S+ nats \(mean and its standard error over \d+ positions of 2 samples\), same top "
        r"token [\d.]+%$", shown, re.MULTILINE,
    )  # fmt: skip
    assert "Integer linears" not in shown
    assert "images.jsonl:1: the same" in shown
    assert f"written: {page}" in result.stderr
    html = page.read_text(encoding="utf-8")
    assert "Captions side by side" in html
    assert "<h2>Linears, worst output error first</h2>" in html
    assert html.count("<svg") >= 3


@pytest.mark.slow
def test_json_has_findings_linears_blocks_and_predictions(small: Path, small_seed: Path, pictures: Path) -> None:
    found = json.loads(
        glmq("verify", small_seed, "--reference", small, "--calib-images", pictures, "--limit", 1, "--json").stdout
    )
    assert (found["schema"], found["passed"], found["errors"]) == ("glmq.verify/1", True, 0)
    assert len(found["linears"]) == 10
    assert len(found["blocks"]) == 4
    assert found["predictions"]["nll_float"] is None  # pictures alone have no answers
    assert 0 <= found["predictions"]["kl"] < 0.1
    assert [caption["name"] for caption in found["captions"]] == ["00.png"]


def test_files_alone_need_no_reference(small_seed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = glmq("verify", small_seed, "--target", "mindie", "--html", page).stdout
    assert "passed: nothing wrong with files and integers" in shown
    assert "\nchecked: the look-ups of MindIE, as its loader makes them\n" in shown
    assert "<h2>Linears</h2>" in page.read_text(encoding="utf-8")  # sorted by name: none is the worst
    assert "not checked: the float weights (--reference)\n" in shown
    assert "not checked: behaviour (--calib-images or --cases, with --reference)\n" in shown


def test_the_screen_says_what_was_checked_and_the_exit_code_whether_it_passed(small_seed: Path, tmp_path: Path) -> None:
    portable = compress(small_seed, out=tmp_path / "portable", codec="portable", tp=2).folder
    manifest = read_manifest(portable)
    stored = sum(len(part.tensors) for part in manifest.rank_files)
    shown = glmq("verify", portable).stdout
    assert f"checked: the bytes of {stored} tensors" in " ".join(shown.split())
    (portable / MANIFEST).unlink()
    for options in ((), ("--json",)):
        assert run("verify", portable, *options).exit_code == 3


def test_without_behaviour_the_worst_weights_come_first(small: Path, small_seed: Path) -> None:
    shown = glmq("verify", small_seed, "--reference", small, "-v").stdout
    assert "Integer linears, largest weight error first" in shown
    errors = [float(found[1]) for found in re.finditer(r"^ layers\S+ +([\d.]+)%", shown, re.MULTILINE)]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)


def test_a_checkpoint_without_checksums_is_said_to_be_unproven(copy: Path) -> None:
    for name in ("glmq_checksums.json", "glmq_report.json"):
        (copy / name).unlink()
    found = json.loads(glmq("verify", copy, "--json").stdout)
    assert (found["passed"], found["warnings"]) == (True, 0)
    assert found["not_checked"][0] == "single bits (no glmq_checksums.json was written)"


def test_lost_checksums_are_an_error(copy: Path) -> None:
    (copy / "glmq_checksums.json").unlink()
    result = run("verify", copy)
    assert result.exit_code == 3
    assert "!! failed: 1 error in files and integers" in result.stdout
    assert (
        "error: glmq_checksums.json is missing, glmq_report.json says it was written; "
        "copy the folder again, or quantize again" in result.stdout
    )


def test_a_float_checkpoint_with_missing_files_is_not_recommended_as_reference(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "float"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    result = run("verify", folder)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == (
        f"error: {folder}: is a float checkpoint, verify checks quantized ones, and as it is no --reference either: "
        f"{folder / 'model.safetensors.index.json'}: names model-00002-of-00002.safetensors, which is not in the folder; "
        "download the missing file\n"
    )


@pytest.mark.slow
def test_problems_are_grouped_counted_and_end_with_3(small: Path, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "chat_template.jinja").unlink()
    edit_tensors(copy, lambda tensors: tensors[f"{LAYER}.self_attn.o_proj.quant_bias"].add_(5))
    result = run("verify", copy, "--reference", small)
    assert result.exit_code == 3
    assert "!! check 18, tokenizer and processor files: 2 errors" in result.stdout
    assert "!! check 11, quant_bias and scales recomputed: 1 error" in result.stdout
    assert "!! check 34, bytes as glmq_checksums.json says: 3 errors" in result.stdout
    assert "!! failed: 6 errors in files and integers" in result.stdout
    found = json.loads(run("verify", copy, "--reference", small, "--json").stdout)
    assert found["counts"] == {
        "quant_bias and scales recomputed": 1,
        "tokenizer and processor files": 2,
        "bytes as glmq_checksums.json says": 3,
    }
    assert run("verify", copy, "--reference", small, "-q").stdout == "!! failed: 6 errors in files and integers\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (("--max-kl", 0), "KL from the float model is"),
        (("--max-error", 0.001), "away from the float linear's output, wanted at most 0.001"),
    ],
)
def test_limits_decide_what_behaviour_is_right(
    small: Path, small_seed: Path, limits: tuple[object, ...], message: str
) -> None:
    result = run(
        "verify", small_seed, "--reference", small, "--cases", TINY_CASES / "texts.jsonl", "--limit", 1, *limits
    )
    assert result.exit_code == 3
    assert message in result.stdout


@pytest.mark.slow
def test_a_model_that_says_something_else_fails(small: Path, copy: Path) -> None:
    def edit(tensors: dict) -> None:
        for name in list(tensors):
            if name.endswith("o_proj.weight"):
                tensors[name].zero_()
                tensors[name.replace("weight", "quant_bias")].zero_()

    edit_tensors(copy, edit)
    result = run("verify", copy, "--reference", small, "--cases", TINY_CASES / "texts.jsonl", "--limit", 1)
    assert result.exit_code == 3
    assert "agrees on the most likely token at" in result.stdout
    assert "is 1 away from the float linear's output, wanted at most 0.3" in result.stdout


@pytest.mark.slow
def test_behaviour_that_cannot_be_measured_is_a_finding(small: Path, copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.__delitem__("model.language_model.norm.weight"))
    result = run("verify", copy, "--reference", small, "--cases", CASES, "--limit", 1)
    assert result.exit_code == 3
    assert "error: cannot be measured: " in result.stdout
    assert "has no tensor 'model.language_model.norm.weight'" in result.stdout


@pytest.mark.slow
def test_a_checkpoint_of_another_tool_without_its_config_is_still_run(small: Path, copy: Path) -> None:
    (copy / "config.json").unlink()
    result = run("verify", copy, "--reference", small, "--cases", CASES, "--limit", 1)
    assert result.exit_code == 3
    assert "!! check 17, config.json: 1 error" in result.stdout
    assert "predicted tokens: KL" in result.stdout


def test_engine_look_ups_are_emulated_on_request(copy: Path) -> None:
    key = "model.visual.merger.gate_up_proj.weight"
    edit_json(copy / "quant_model_description.json", lambda found: found.pop(key))
    for name in ("glmq_checksums.json", "glmq_report.json"):  # as a checkpoint of another tool
        (copy / name).unlink()
    assert run("verify", copy, "--target", "mindie").exit_code == 0
    result = run("verify", copy, "--target", "vllm-ascend")
    assert result.exit_code == 3
    assert f"error: {key} is not in the description, vLLM looks it up for" in result.stdout


def test_a_portable_folder_is_compared_with_its_source(small_seed: Path, tmp_path: Path) -> None:
    glmq("compress", "--model_path", small_seed, "--save_directory", tmp_path / "sc", "--codec", "portable")
    assert "passed: nothing wrong with files" in glmq("verify", tmp_path / "sc", "--reference", small_seed).stdout


def test_options_that_do_not_fit_are_refused(small: Path, small_seed: Path, pictures: Path, small_stats: Path) -> None:
    result = run("verify", small_seed, "--calib-images", pictures)
    assert result.exit_code == 2
    assert "behaviour needs an un-compressed quantized checkpoint and its float source as --reference" in result.stderr
    result = run("verify", small_seed, "--reference", small, "--calib-images", pictures, "--cases", CASES)
    assert result.exit_code == 2
    assert "--calib-images and --cases: give one of them" in result.stderr
    result = run("verify", small_stats)
    assert result.exit_code == 4
    assert f"{small_stats}: holds calibration statistics, no weights; give a quantized checkpoint" in result.stderr


@pytest.mark.parametrize("option", [("--limit", 3), ("--max-pixels", 1000), ("--prompt", "hello"), ("--recursive",)])
def test_options_of_samples_are_refused_without_samples(option: tuple[object, ...], small_seed: Path) -> None:
    result = run("verify", small_seed, *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {option[0]} has no effect without --calib-images or --cases; drop it\n"


@pytest.mark.parametrize("option", [("--prompt", "hello"), ("--recursive",)])
def test_options_of_pictures_are_refused_with_cases(option: tuple[object, ...], small: Path, small_seed: Path) -> None:
    result = run("verify", small_seed, "--reference", small, "--cases", CASES, *option)
    assert result.exit_code == 2
    assert result.stderr == f"error: {option[0]} has no effect without --calib-images; drop it\n"


def test_messages_name_only_options_that_verify_has(small: Path, small_seed: Path, tmp_path: Path) -> None:
    def said(*samples: object) -> tuple[int, str]:
        result = run("verify", small_seed, "--reference", small, *samples)
        return result.exit_code, result.stderr

    (tmp_path / "a.png").touch()
    assert said("--calib-images", tmp_path) == (
        4, f"error: {tmp_path}: 1 of 1 files are not usable images: a.png (is empty); remove them\n"
    )  # fmt: skip
    assert said("--calib-images", tmp_path / "none") == (
        4,
        f"error: {tmp_path / 'none'}: no such folder; give a folder of images as --calib-images, or a list of samples as "
        "--cases\n",
    )
    (tmp_path / "b.jsonl").write_bytes(b"PAR1")
    assert said("--cases", tmp_path / "b.jsonl") == (
        4, f"error: {tmp_path / 'b.jsonl'}: is a Parquet file; give a JSON-lines file as --cases\n"
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_to_be_known_of_the_pictures_is_said(
    small: Path, small_seed: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("a.png", "deeper/b.png"):
        (tmp_path / name).write_bytes((pictures / "00.png").read_bytes())
    result = run("verify", small_seed, "--reference", small, "--calib-images", tmp_path)
    assert "note: 1 sub-folder of pictures not entered: deeper; --recursive enters them\n" in result.stderr


@pytest.mark.parametrize("option", ["--html", "--reference", "--cases"])
def test_list_checks_refuses_options_that_it_would_ignore(option: str, tmp_path: Path) -> None:
    result = run("verify", "--list-checks", option, tmp_path / "z")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {option} with --list-checks: no checkpoint is looked at; drop one of them\n"
    assert not (tmp_path / "z").exists()


def test_list_checks_needs_no_folder_and_prints_every_check() -> None:
    shown = glmq("verify", "--list-checks").stdout
    assert re.search(r"^ *12 +linears of one input agree +errors or warnings *$", shown, re.MULTILINE)
    assert re.search(r"^ *33 +bytes as glmq_manifest\.json says +errors *$", shown, re.MULTILINE)
    document = json.loads(glmq("verify", "--list-checks", "--json").stdout)
    assert document["schema"] == "glmq.verify-checks/1"
    assert [check["check"] for check in document["checks"]] == [*range(1, 26), *range(27, 39)]
    assert document["checks"][11] == {
        "check": 12, "title": "linears of one input agree", "severities": ["error", "warning"],
    }  # fmt: skip


def test_without_a_folder_a_sentence_asks_for_one() -> None:
    result = run("verify")
    assert result.exit_code == 2
    assert "give the folder of a quantized or compressed checkpoint" in re.sub(r"[\s│]+", " ", result.stderr)


@pytest.mark.slow
def test_a_tensor_of_any_name_is_reported_and_stops_nothing(small: Path, small_stats: Path, tmp_path: Path) -> None:
    names = {"layers.1\u00b2.x", "layers." + "7" * 4301 + ".weight", "layers.\u0663.weight"}
    copy = quantize(small, small_stats, tmp_path / "copy")
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(2, dtype=torch.bfloat16) for name in names}))
    for command in (("verify", copy), ("verify", copy, "--reference", small)):
        result = run(*command, "--json")
        assert result.exit_code == 3
        assert names <= {finding["tensor"] for finding in json.loads(result.stdout)["findings"]}
    for command in (("inspect", copy), ("inspect", copy, "--values"), ("inspect", copy, small)):
        assert run(*command).exit_code == 0
    assert names <= {tensor["name"] for tensor in json.loads(glmq("inspect", copy, "--json").stdout)["tensors"]}
