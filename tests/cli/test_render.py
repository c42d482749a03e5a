import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.text import Text

from glmq.cli import console
from glmq.cli.console import stdout
from glmq.cli.render import areas_table, error_table, next_steps, print_json
from glmq.model.config import read_config
from glmq.model.family import Area
from glmq.quantization.options import Options
from glmq.quantization.output import AreaBytes
from glmq.quantization.plan import loading_engines, plan_groups
from glmq.quantization.recipe import make_recipe
from glmq.records import LinearReport
from glmq.spec import QuantType
from glmq.wording import size

REPORT = LinearReport(
    name="model.language_model.layers.0.self_attn.q_proj", quant_type=QuantType.W8A8S, rows=64, cols=32, method="plain",
    step_min=0.25, step_max=0.5, entropy_bits=3.875, outlier_share=0.0625, zero_share=0.125, saturated=0,
    weight_error=0.0625, output_error=0.03125, sqnr_db=30.103, input_low=-2.5, input_high=3.25, input_range="histogram",
    clipped_share=0.001, bias_shift=0, smoothing="none", seconds=0.5,
)  # fmt: skip


def reports(*errors: float) -> list[LinearReport]:
    return [replace(REPORT, name=f"layers.{i}", output_error=error) for i, error in enumerate(errors)]


def text_of(table: object, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a table on a console of that width, without trailing blanks and empty lines."""
    buffer = io.StringIO()
    monkeypatch.setattr(stdout, "_width", width)
    monkeypatch.setattr(stdout, "_file", buffer)
    stdout.print(table() if callable(table) else table)
    return [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]


def test_the_worst_linear_comes_first_and_bad_ones_have_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = text_of(lambda: error_table(reports(0.05, 0.25, 0.1, 0.05), verbose=False), 160, monkeypatch)
    rows = [re.split(r"   +", line.strip()) for line in lines if line.lstrip().startswith("layers.")]
    assert [row[0] for row in rows] == ["layers.1", "layers.2", "layers.0", "layers.3"]
    assert [row[6] for row in rows] == ["!! 25.00%", "! 10.00%", "5.00%", "5.00%"]
    assert lines[-1] == "!: 10% or more, !!: 20% or more"


def test_every_column_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = text_of(lambda: error_table([REPORT], verbose=False), 160, monkeypatch)
    assert re.split(r"   +", lines[1].strip()) == [
        "linear", "type", "step", "bits", "|q|>7", "weight error", "output error", "SQNR dB", "input range", "range by",
        "clipped",
    ]  # fmt: skip
    assert lines[-1].split() == [
        "layers.0.self_attn.q_proj", "W8A8S", "0.25..0.5", "3.88", "6.2%", "6.25%", "3.12%", "30.1", "-2.5..3.25",
        "histogram", "0.100%",
    ]  # fmt: skip


def test_dynamic_types_have_no_input_range(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = replace(REPORT, quant_type=QuantType.W8A8_DYNAMIC)
    row = text_of(lambda: error_table([dynamic], verbose=False), 160, monkeypatch)[-1]
    assert row.split()[-6:] == ["per", "token"] * 3


def test_a_long_table_is_cut_unless_all_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    many = reports(*(0.01 * i for i in range(30)))
    cut = text_of(lambda: error_table(many, verbose=False), 140, monkeypatch)
    assert sum(line.lstrip().startswith("layers.") for line in cut) == 24
    left = "6 better ones are left out; -v shows all, glmq_report.csv has them"
    assert cut[-1].strip() == f"{left}; !: 10% or more, !!: 20% or more"
    whole = text_of(lambda: error_table(many, verbose=True), 140, monkeypatch)
    assert sum(line.lstrip().startswith("layers.") for line in whole) == 30


def test_the_bytes_of_each_part_and_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [AreaBytes(Area.TEXT_LINEARS, 2**31, 2**30), AreaBytes(Area.NORMS, 0, 512)]
    lines = text_of(areas_table(parts), 140, monkeypatch)
    assert [line.split() for line in lines[-3:]] == [
        ["text", "linears", "2.00", "GiB", "1.00", "GiB", "0.500"],
        ["text", "norms", "0", "B", "512", "B", "-"],
        ["total", "2.00", "GiB", "1.00", "GiB", "0.500"],
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (7_550_000, "7.2 MiB"), (2**30, "1.00 GiB"),
        (14_667_314_155, "13.66 GiB"),
    ],
)  # fmt: skip
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_json_has_sorted_keys_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"b": "\u00e9", "a": 0.5})
    out = capsys.readouterr().out
    assert out == '{\n "a": 0.5,\n "b": "\u00e9"\n}\n'
    assert json.loads(out) == {"a": 0.5, "b": "\u00e9"}
    with pytest.raises(ValueError, match="Out of range float values"):
        print_json({"a": float("nan")})


def test_the_next_step_depends_on_the_type_and_on_what_loads_it(small: Path) -> None:
    folder = Path("/data/my out")

    def steps(folder: Path = folder, **options: object) -> list[str]:
        recipe = make_recipe(Options(**options))  # type: ignore[arg-type]
        return next_steps(folder, recipe, loading_engines(recipe, plan_groups(recipe, read_config(small)).values()))

    sparse = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
    assert (
        steps(**sparse)[-1] == "  glmq compress --model_path '/data/my out' --save_directory '/data/my out-sc' --tp 1"
    )
    set_path = "set modelWeightPath to /data/my out in"
    older, note = steps(**sparse, mindie_format=True)
    assert older.startswith(f"Next: serve it with MindIE on the Atlas 300I Duo (world size 1 or 2): {set_path}")
    assert note == (
        "Note: `glmq compress` takes the ascendV1 form alone; to compress, quantize without --mindie_format."
    )
    assert steps()[0].startswith(f"Next: serve it with MindIE on the Atlas 800I A2 (world size 1 or 2): {set_path}")
    assert f"set modelWeightPath to {Path.cwd() / 'out'} in" in steps(Path("out"))[0]
    assert "MindIE on the Atlas 800I A2 or 300I Duo" in steps(torch_dtype="fp16")[0]
    assert "MindIE on the Atlas 300I Duo" in steps(torch_dtype="fp16", target="mindie-300i-duo")[0]
    four_bits = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
    with_vllm = [
        "Next: serve it with vLLM-Ascend on the Atlas 800I A2; what that makes of it:",
        "  glmq verify '/data/my out' --target vllm-ascend",
    ]
    assert steps(**four_bits) == steps(layer=("*.o_proj=W8A8_DYNAMIC",)) == steps(layer=("lm_head=W8A8",)) == with_vllm
    assert steps(target="vllm-ascend") == with_vllm
    assert "MindIE on the Atlas 800I A2" in steps(is_dynamic=True, layer=("*.o_proj=W8A8",))[0]
    assert steps(**sparse, target="vllm-ascend") == [
        "No engine is known to load it as it is; this says why:",
        with_vllm[1],
    ]
    assert steps(**sparse, layer=("*.blocks.*=W8A8S",)) == [
        "No engine is known to load it as it is; this says why:",
        "  glmq verify '/data/my out' --target mindie",
    ]
    assert steps(**four_bits, mindie_format=True) == [
        "No engine is known to load it in this form; for vLLM-Ascend write it with --format ascendv1."
    ]
    assert steps(a_bit=16) == ["No engine is known to load it as it is; this says why:", with_vllm[1]]


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for stream in (console.stdout, console.stderr):
        stream.print("/data/[red]/:smile:/[/bold]", soft_wrap=True)
    assert capsys.readouterr() == ("/data/[red]/:smile:/[/bold]\n",) * 2


def test_no_text_from_outside_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\nerror: b\u202e"
    console.stderr.print(evil)
    console.stderr.print(Text(evil, style="red"))
    table = console.VisibleTable(evil)
    table.add_column("name")
    table.add_row(evil)
    console.stderr.print(table)
    shown = capsys.readouterr().err
    assert shown.count(r"a\x1b[2J\nerror: b\u202e") == 4
    assert "\x1b" not in shown
    assert "\u202e" not in shown
