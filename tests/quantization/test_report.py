import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from glmq.calibration.manifest import SampleTokens
from glmq.checkpoint.json_file import JsonObject
from glmq.model.config import read_config
from glmq.model.family import Area
from glmq.quantization.options import Options
from glmq.quantization.output import AreaBytes
from glmq.quantization.plan import plan_groups
from glmq.quantization.recipe import make_recipe
from glmq.quantization.report import (
    RUN_NOTE,
    CalibrationFacts,
    KeptFloat,
    Report,
    RunFacts,
    kept_float,
    report_document,
    write_report,
)
from glmq.quantization.rules import LayerRule
from glmq.records import LinearReport, PassTime, StageTime, parse_row, report_row
from glmq.spec import QuantType
from glmq.version import __version__

REPORT = LinearReport(
    name="model.language_model.layers.0.self_attn.q_proj",
    quant_type=QuantType.W8A8S,
    rows=64,
    cols=32,
    method="plain",
    step_min=0.25,
    step_max=0.5,
    entropy_bits=3.875,
    outlier_share=0.0625,
    zero_share=0.125,
    saturated=0,
    weight_error=0.0625,
    output_error=0.03125,
    sqnr_db=30.103,
    input_low=-2.5,
    input_high=3.25,
    input_range="min-max",
    clipped_share=0.001,
    bias_shift=3,
    smoothing="m2 (threshold 3.1, 12 channels)",
    seconds=0.5,
    first_integer=-1,
    integers=(3, 0, 4),
)
PERFECT = replace(REPORT, name="lm_head", quant_type=QuantType.W8A8_DYNAMIC, output_error=0.0, sqnr_db=math.inf)
PARTS = [AreaBytes(Area.TEXT_LINEARS, 4096, 2048), AreaBytes(Area.NORMS, 128, 384)]
FIELDS = [
    "name", "quant_type", "rows", "cols", "method", "step_min", "step_max", "entropy_bits", "outlier_share",
    "zero_share", "saturated", "weight_error", "output_error", "sqnr_db", "input_low", "input_high", "input_range",
    "clipped_share", "bias_shift", "smoothing",
]  # fmt: skip
"""Every column of a row, in order: not the time, which no two runs share, nor the histogram."""
RECIPE = make_recipe(Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16", method="plain", act_method=1))
RUN = RunFacts(
    finished="2026-01-01T00:00:00+00:00",
    command="glmq quantize",
    model="GLM",
    statistics=None,
    output="w8a8s",
    platform="Linux",
    processor="a processor",
    cores=2,
    memory_bytes=4096,
    versions={"glmq": "1"},
    passes=(PassTime("quantize", 2.5, 1024, (StageTime("read", 1.5, 0, 64),)),),
)


def document() -> JsonObject:
    facts = CalibrationFacts("ab" * 32, (SampleTokens("a.png", 40, False),), {"compute_dtype": "float32"})
    kept = (KeptFloat("lm_head", "by default (lm_head)"),)
    return report_document(Report(RECIPE, (REPORT, PERFECT), tuple(PARTS), kept, "cd" * 16, facts, RUN, {}))


def test_the_document_says_what_was_done() -> None:
    found = document()
    rows = found.pop("linears")
    recipe, run = found.pop("recipe"), found.pop("run")
    assert (recipe["quant_type"], recipe["scheme"]["weight"]["sigma_factor"]) == ("W8A8S", 3.0)
    assert {"pattern": "lm_head", "quant_type": "FLOAT", "option": ""} in recipe["rules"]
    assert run["note"] == RUN_NOTE
    assert run["passes"] == [
        {
            "title": "quantize",
            "seconds": 2.5,
            "peak_bytes": 1024,
            "stages": [{"stage": "read", "seconds": 1.5, "flops": 0, "nbytes": 64}],
        }
    ]
    assert {key: run[key] for key in ("finished", "command", "statistics", "versions")} == {
        "finished": RUN.finished, "command": "glmq quantize", "statistics": None, "versions": {"glmq": "1"},
    }  # fmt: skip
    assert found == {
        "schema": "glmq.quantize/1",
        "glmq": __version__,
        "quant_type": "W8A8S",
        "dtype": "float16",
        "method": "plain",
        "step_rule": "sigma",
        "smoothing": "m2",
        "act_range": "minmax",
        "samples_sha256": "ab" * 32,
        "checksums": "cd" * 16,
        "calibration": {
            "samples": [{"name": "a.png", "tokens": 40, "has_answer": False}],
            "compute_dtype": "float32",
        },
        "kept_float": [{"name": "lm_head", "why": "by default (lm_head)"}],
        "bytes": [
            {"part": "text linears", "before": 4096, "after": 2048},
            {"part": "text norms", "before": 128, "after": 384},
        ],
    }
    assert [list(row) for row in rows] == [[*FIELDS, "first_integer", "integers"]] * 2


def test_a_row_has_the_records_numbers_and_null_for_infinity() -> None:
    first, second = document()["linears"]
    assert first == {name: getattr(REPORT, name) for name in FIELDS} | {
        "quant_type": "W8A8S", "first_integer": -1, "integers": [3, 0, 4],
    }  # fmt: skip
    assert second["quant_type"] == "W8A8_DYNAMIC"
    assert second["sqnr_db"] is None


@pytest.mark.parametrize("report", [REPORT, PERFECT])
def test_a_row_becomes_the_record_again(report: LinearReport) -> None:
    assert parse_row(json.loads(json.dumps(report_row(report)))) == report


@pytest.mark.slow
def test_both_files_have_the_same_rows_and_no_time(tmp_path: Path) -> None:
    write_report(tmp_path, document(), [REPORT, PERFECT])
    assert json.loads((tmp_path / "glmq_report.json").read_text()) == document()
    with (tmp_path / "glmq_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == FIELDS
    for row, wanted in zip(rows, document()["linears"], strict=True):
        assert row == {name: "" if wanted[name] is None else str(wanted[name]) for name in FIELDS}
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "glmq_report.json": 0o640, "glmq_report.csv": 0o640,
    }  # fmt: skip


def test_a_name_with_a_comma_stays_one_cell(tmp_path: Path) -> None:
    write_report(tmp_path, {}, [REPORT])
    line = (tmp_path / "glmq_report.csv").read_text().splitlines()[1]
    assert line.endswith(',"m2 (threshold 3.1, 12 channels)"')


def test_a_linear_stays_float_for_a_reason(tiny: Path) -> None:
    config = read_config(tiny)
    asked = make_recipe(Options(keep_float=("*.layers.0.self_attn.*",)))
    worst = replace(
        asked, rules=(*asked.rules, LayerRule("*.layers.1.mlp.gate_up_proj", QuantType.FLOAT, "--keep-float x"))
    )
    found = {kept.name: kept.why for kept in kept_float(plan_groups(worst, config), worst, asked)}
    layer = "model.language_model.layers"
    assert found["lm_head"] == "by default (lm_head)"
    assert found[f"{layer}.0.self_attn.q_proj"] == "--keep-float '*.layers.0.self_attn.*'"
    assert found[f"{layer}.1.mlp.gate_up_proj"] == "one of the worst (--fallback-topk, --max-error)"
    assert f"{layer}.1.self_attn.q_proj" not in found
