import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st

from glmq.calibration.convergence import Convergence
from glmq.calibration.samples import Sample, digest
from glmq.calibration.stats import (
    MANIFEST,
    SampleTokens,
    Settings,
    Statistics,
    StatsWriter,
    has_moment,
    pack_triangle,
    unpack_triangle,
)
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, StatisticsError
from glmq.model.config import read_config
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.version import __version__

SAMPLES = (
    Sample("a.png", Path("a.png"), "What?", None, "11" * 32),
    Sample("s.jsonl:2", None, None, "text", "22" * 32),
)
SETTINGS = Settings("float32", None, False)
SITE = "model.language_model.layers.0.self_attn.q_proj"
FIELDS = ("minimum", "maximum", "mean", "histogram", "exponent", "square_mean", "second_moment", "sample")


def make_stats(name: str, *, with_moment: bool, seed: int = 0) -> InputStats:
    accumulator = InputAccumulator(name, 5, with_moment=with_moment)
    accumulator.update(torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)), keep_rows=4)
    return accumulator.finish()


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    writer = StatsWriter(folder, "f" * 64, SAMPLES, SETTINGS)
    site, narrow = make_stats(SITE, with_moment=True), make_stats("narrow", with_moment=False)
    writer.write("block.0", [(site, Convergence(0.0123456, 0.5, 0.25)), (narrow, Convergence(0.0, 1.0, None))])
    writer.write("block.1", [(make_stats("other", with_moment=False, seed=1), None)])
    for number, sample in enumerate(SAMPLES):
        writer.set_tokens(sample, 40 + number)
    writer.finish()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "stats")


@given(st.integers(1, 12), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_symmetric_matrix_survives_its_triangle(size: int, seed: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    matrix = x.T @ x
    matrix = matrix.triu() + matrix.triu(1).T
    packed = pack_triangle(matrix)
    assert packed.tolist() == [float(matrix[i, j]) for i in range(size) for j in range(i, size)]
    assert torch.equal(unpack_triangle(packed, size), matrix)


def test_statistics_are_read_as_they_were_written(folder: Path) -> None:
    statistics = Statistics.open(folder)
    for wanted in (
        make_stats(SITE, with_moment=True),
        make_stats("narrow", with_moment=False),
        make_stats("other", with_moment=False, seed=1),
    ):
        found = statistics.input(wanted.name)
        assert (found.name, found.tokens, found.width) == (wanted.name, 9, 5)
        for field in FIELDS:
            tensor, other = getattr(found, field), getattr(wanted, field)
            assert (tensor is None) == (other is None)
            # The lower half of a second moment is the mirrored upper one; a sum over tokens may round the halves apart.
            upper = torch.triu if field == "second_moment" and tensor is not None else lambda x: x
            assert tensor is None or (tensor.dtype == other.dtype and torch.equal(upper(tensor), upper(other)))


def test_the_manifest_says_where_everything_comes_from(folder: Path) -> None:
    statistics = Statistics.open(folder)
    assert statistics.model_fingerprint == "f" * 64
    assert statistics.samples_digest == digest(SAMPLES, None)
    assert statistics.samples() == [SampleTokens("a.png", 40, False), SampleTokens("s.jsonl:2", 41, True)]
    entry = {"file": "block.0.safetensors", "width": 5, "tokens": 9, "second_moment": True}
    assert json.loads((folder / MANIFEST).read_text()) == {
        "schema": "glmq.statistics/1",
        "glmq": __version__,
        "model": "f" * 64,
        "samples_sha256": digest(SAMPLES, None),
        "compute_dtype": "float32",
        "max_pixels": None,
        "wide_moments": False,
        "generate": None,
        "samples": [
            {"name": "a.png", "sha256": "11" * 32, "tokens": 40, "answer": False},
            {"name": "s.jsonl:2", "sha256": "22" * 32, "tokens": 41, "answer": True},
        ],
        "inputs": {
            SITE: entry | {"settled": {"range": "1.23e-02", "diagonal": "5.00e-01", "correlation": "2.50e-01"}},
            "narrow": entry
            | {"second_moment": False, "settled": {"range": "0.00e+00", "diagonal": "1.00e+00", "correlation": None}},
            "other": entry | {"file": "block.1.safetensors", "second_moment": False, "settled": None},
        },
    }
    assert statistics.settled() == {SITE: Convergence(0.0123, 0.5, 0.25), "narrow": Convergence(0.0, 1.0, None)}


def test_files_are_readable_by_the_group_and_by_nobody_else(folder: Path) -> None:
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "block.0.safetensors": 0o640, "block.1.safetensors": 0o640, MANIFEST: 0o640,
    }  # fmt: skip


def test_a_site_is_in_the_statistics_or_not(folder: Path) -> None:
    statistics = Statistics.open(folder)
    assert SITE in statistics
    assert "elsewhere" not in statistics
    with pytest.raises(StatisticsError) as caught:
        statistics.input("elsewhere")
    assert str(caught.value) == f"{folder}: has no statistics of 'elsewhere'; run `glmq calibrate` on this model"


def test_statistics_of_another_checkpoint_are_refused(folder: Path) -> None:
    statistics = Statistics.open(folder)
    statistics.check_model("f" * 64)
    with pytest.raises(StatisticsError) as caught:
        statistics.check_model("0123456789abcdef")
    assert str(caught.value) == (
        f"{folder}: these statistics come from another checkpoint "
        "(theirs ffffffffffff, this model's 0123456789ab); run `glmq calibrate` on this model"
    )


def test_an_unfinished_folder_is_not_a_statistics_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder)
    assert str(caught.value) == (
        f"{folder}: has no statistics.json, so it is not a finished statistics folder; run `glmq calibrate` first"
    )


def test_statistics_of_another_version_are_refused(folder: Path) -> None:
    edit_json(folder / MANIFEST, lambda m: m.update(schema="glmq.statistics/2"))
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder)
    assert str(caught.value) == (
        f"{folder / MANIFEST}: schema is 'glmq.statistics/2', this glmq reads 'glmq.statistics/1'; "
        "run `glmq calibrate` again"
    )


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("model", lambda m: m.pop("model")),
        ("model", lambda m: m.update(model=7)),
        ("samples_sha256", lambda m: m.update(samples_sha256=None)),
        ("samples", lambda m: m.update(samples={})),
        ("samples", lambda m: m["samples"].append("a.png")),
        ("samples", lambda m: m["samples"][0].pop("tokens")),
        ("samples", lambda m: m["samples"][0].update(name=None)),
        ("inputs", lambda m: m.pop("inputs")),
        ("inputs", lambda m: m.update(inputs=[])),
        ("inputs", lambda m: m["inputs"].update({SITE: None})),
        ("inputs", lambda m: m["inputs"][SITE].pop("second_moment")),
        ("inputs", lambda m: m["inputs"][SITE].update(width="5")),
        ("inputs", lambda m: m["inputs"][SITE].update(tokens=None)),
    ],
)
def test_a_damaged_manifest_is_refused_by_its_key(key: str, damage: Callable[[dict], object], folder: Path) -> None:
    edit_json(folder / MANIFEST, damage)
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder)
    assert str(caught.value) == f"{folder / MANIFEST}: {key!r} is missing or damaged; run `glmq calibrate` again"


def test_a_manifest_that_is_not_json_is_named(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Statistics.open(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "block.0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(path)):
        Statistics.open(folder)


def test_a_missing_file_is_named_when_its_input_is_wanted(folder: Path) -> None:
    (folder / "block.1.safetensors").unlink()
    statistics = Statistics.open(folder)
    assert statistics.input(SITE).tokens == 9
    with pytest.raises(CheckpointError, match=r"has no tensor 'other\.minimum'"):
        statistics.input("other")


def test_equal_statistics_give_equal_bytes(folder: Path) -> None:
    again = write_folder(folder.with_name("again"))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("wide", [False, True])
def test_second_moments_are_kept_of_text_inputs_up_to_the_hidden_size_or_of_all(wide: bool, small: Path) -> None:
    config = read_config(small)
    kept = {
        g.site
        for block in config.family.blocks(config)
        for g in block.groups
        if has_moment(g, config, wide_moments=wide)
    }
    sites = {group.site for block in config.family.blocks(config) for group in block.groups}
    narrow = {
        f"model.language_model.layers.{i}.{end}"
        for i in range(2)
        for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    }
    assert kept == (sites if wide else narrow)


def test_reading_a_folder_opens_no_tensor_before_it_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    statistics = Statistics.open(folder)
    assert read == []
    statistics.input("other")
    assert {name.rpartition(".")[0] for name in read} == {"other"}
