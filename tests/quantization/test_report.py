import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from glmq.checkpoint.json_file import JsonObject
from glmq.model.family import Area
from glmq.quantization.output import AreaBytes
from glmq.quantization.recipe import Options, make_recipe
from glmq.quantization.report import report_document, write_report
from glmq.records import LinearReport, parse_row, report_row
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
)
PERFECT = replace(REPORT, name="lm_head", quant_type=QuantType.W8A8_DYNAMIC, output_error=0.0, sqnr_db=math.inf)
PARTS = [AreaBytes(Area.TEXT_LINEARS, 4096, 2048), AreaBytes(Area.NORMS, 128, 384)]
FIELDS = [
    "name", "quant_type", "rows", "cols", "method", "step_min", "step_max", "entropy_bits", "outlier_share",
    "zero_share", "saturated", "weight_error", "output_error", "sqnr_db", "input_low", "input_high", "input_range",
    "clipped_share", "bias_shift", "smoothing",
]  # fmt: skip
"""Every field of a row, in order: all but the time, which no two runs share."""


def document() -> JsonObject:
    options = Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16", method="plain", act_method=1)
    return report_document([REPORT, PERFECT], PARTS, make_recipe(options), "ab" * 32, "cd" * 16)


def test_the_document_says_what_was_done() -> None:
    found = document()
    rows = found.pop("linears")
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
        "bytes": [
            {"part": "text linears", "before": 4096, "after": 2048},
            {"part": "text norms", "before": 128, "after": 384},
        ],
    }
    assert [list(row) for row in rows] == [FIELDS, FIELDS]


def test_a_row_has_the_records_numbers_and_null_for_infinity() -> None:
    first, second = document()["linears"]
    assert first == {name: getattr(REPORT, name) for name in FIELDS} | {"quant_type": "W8A8S"}
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
        assert row == {name: "" if value is None else str(value) for name, value in wanted.items()}
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "glmq_report.json": 0o640, "glmq_report.csv": 0o640,
    }  # fmt: skip


def test_a_name_with_a_comma_stays_one_cell(tmp_path: Path) -> None:
    write_report(tmp_path, {}, [REPORT])
    line = (tmp_path / "glmq_report.csv").read_text().splitlines()[1]
    assert line.endswith(',"m2 (threshold 3.1, 12 channels)"')
