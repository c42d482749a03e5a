"""Files that earlier versions wrote stay readable: never made anew. Documents for others: tests/cli/test_old_documents.py."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import refused, tree

from glmq.calibration.manifest import SampleTokens
from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import read_checksums
from glmq.checkpoint.description import Description, read_description
from glmq.checkpoint.journal import Journal, read_lines
from glmq.codec.codec import decode
from glmq.compression.restore import decompress_checkpoint, read_portable_manifest
from glmq.verification.files import read_report, row_of

FILES = Path(__file__).parent / "old_files"
Q = "model.language_model.layers.0.self_attn.q_proj"


def test_a_matrix_of_gqsc_1_is_read_by_every_version() -> None:
    row, column = np.arange(40)[:, None], np.arange(70)[None]
    wanted = ((row * 37 + column * column * 11) % 61 - 30) // (1 + column % 7)
    assert np.array_equal(decode((FILES / "matrix-1.gqsc").read_bytes()), wanted)


@pytest.mark.parametrize("version", [1, 2])
def test_statistics_are_read(version: int) -> None:
    statistics = Statistics.open(FILES / f"statistics-{version}")
    assert statistics.has_checksums == (version == 2)
    assert statistics.samples() == [SampleTokens("a.png", 40, False), SampleTokens("s.jsonl:2", 41, True)]
    found = statistics.input(Q)
    assert (found.tokens, found.mean.tolist(), found.minimum.tolist()) == (5, [0, 0.25, 0.5], [-1.5, -1.25, -1])
    assert (found.histogram.sum(1).tolist(), found.exponent.tolist()) == ([5, 5, 5], [1, 1, 2])
    assert found.second_moment is not None
    assert found.second_moment[0].tolist() == found.second_moment[:, 0].tolist() == [1.125, 1.125, 1.125]
    assert found.sensitivity is not None
    assert found.sensitivity.tolist() == [1, 0.5]


@pytest.mark.parametrize("version", [1, 2])
def test_checksums_are_read(version: int) -> None:
    found = read_checksums(FILES / f"checksums-{version}")
    assert (len(found.tensors), found.covers_files, len(found.headers)) == (2, version == 2, version - 1)


def test_parts_of_two_ranks_become_the_checkpoint_that_they_were_made_from(tmp_path: Path) -> None:
    folder, out = FILES / "portable-1", tmp_path / "out"
    out.mkdir()
    for _ in decompress_checkpoint(folder, read_portable_manifest(folder), out, 1):
        pass
    digest = hashlib.sha256(json.dumps(tree(out), sort_keys=True).encode()).hexdigest()
    assert digest == "146f05ac2ee353dc51cf25b861148885534bf2dee68e91db0ac3a055013249f8"


def test_the_report_of_a_quantization_is_read() -> None:
    row = row_of(read_report(FILES / "report-1"), Q)
    assert row["quant_type"] == "W8A8S"
    assert isinstance(row["output_error"], float)


def test_descriptions_of_both_forms_are_read() -> None:
    tensors = {f"{Q}.weight": "W4A8_DYNAMIC", "lm_head.weight": "FLOAT"}
    assert read_description(FILES / "description-1.0.0") == Description("W4A8_DYNAMIC", "1.0.0", 64, tensors)
    tensors = {f"{Q}.weight": "W8A8S", "lm_head.weight": "FLOAT"}
    assert read_description(FILES / "description-mindie") == Description("W8A8S", None, None, tensors)


def test_a_journal_is_read_and_continued_by_its_own_version_alone(tmp_path: Path) -> None:
    shutil.copy(FILES / "journal" / "journal.jsonl", tmp_path)
    settings, block = read_lines(tmp_path / "journal.jsonl")
    assert block == {"block": "model.visual.blocks.0", "files": {"a.safetensors": "aa" * 16}}
    code, sentence = refused(lambda: Journal(tmp_path, {**settings, "glmq": "9.9.9"}))
    assert code == 2
    assert "had glmq 0.1.0, this one has glmq 9.9.9" in sentence
