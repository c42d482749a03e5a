"""Weights that look damaged because quantizing left them so are a warning, where checksums of both sides prove it."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import calibrate, edit_tensors, findings_as_of_another_tool, quantize

import glmq
from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import read_checksums
from glmq.checkpoint.reader import Checkpoint
from glmq.verification.checksums import checksum_of
from glmq.verification.findings import Finding

V = "model.language_model.layers.0.self_attn.v_proj.weight"
OWN = "; quantize left it so: every byte is as it wrote it, and the float weight is the one it read"
OTHER = "; it was made from another float model than --reference"
CAUSE = "; the norm in front or the column is wrong"


def make_constant(tensors: dict[str, torch.Tensor]) -> None:
    tensors[V][:] = 0.02


@pytest.fixture(scope="module")
def constant(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a v_proj of one number, and what its W8A8 is: compensation moves errors between columns that are alike."""
    root = tmp_path_factory.mktemp("constant")
    model = Path(shutil.copytree(small, root / "model"))
    edit_tensors(model, make_constant)
    stats = calibrate(model, root / "stats", pictures, limit=2)
    return model, quantize(model, stats, root / "out")


def strange_columns(found: list[Finding]) -> list[tuple[str, str]]:
    """Severity and everything but the numbers of what is said of the columns of v_proj."""
    assert {(f.tensor, f.message.split()[0]) for f in found} == {(V, "column")}, found
    return [(f.severity, "; " + f.message.partition("; ")[2]) for f in found]


def test_what_quantize_left_so_is_a_warning(constant: tuple[Path, Path]) -> None:
    model, out = constant
    report = glmq.verify(out, reference=model)
    assert report.passed
    assert strange_columns(report.findings) == [("warning", OWN)]


def test_without_checksums_it_may_be_damage(constant: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = constant
    found = findings_as_of_another_tool(Path(shutil.copytree(out, tmp_path / "out")), model)
    assert strange_columns(found) == [("error", CAUSE)]


def test_beside_a_changed_byte_it_may_be_damage(constant: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = constant
    out = Path(shutil.copytree(out, tmp_path / "out"))
    (out / "tokenizer_config.json").write_bytes((out / "tokenizer_config.json").read_bytes() + b"\n")
    found = [f for f in glmq.verify(out, reference=model).findings if f.tensor == V]
    assert strange_columns(found) == [("error", CAUSE)]


def test_another_float_model_is_called_that(constant: tuple[Path, Path], small: Path) -> None:
    report = glmq.verify(constant[1], reference=small)
    assert not report.passed
    errors = [f for f in report.findings if f.tensor == V]
    assert [(f.severity, f.message.endswith(OTHER)) for f in errors] == [("error", True)] * len(errors)
    assert errors


def test_checksums_tell_every_float_tensor_that_was_read(constant: tuple[Path, Path]) -> None:
    model, out = constant
    weights = dict(Statistics.open(model.parent / "stats").weights)
    assert read_checksums(out).source == weights
    with Checkpoint.open(model) as source:
        assert weights == {name: checksum_of(source, name) for name in source}
