import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from helpers import edit_json, without_checksums
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmq.calibration.convergence import Convergence
from glmq.calibration.manifest import MANIFEST, SampleTokens
from glmq.calibration.samples import Sample, digest
from glmq.calibration.soundness import find_defect
from glmq.calibration.stats import Settings, Statistics
from glmq.calibration.stats_writer import StatsWriter, has_moment
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, StatisticsError
from glmq.model.config import read_config
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.numerics.triangle import pack_triangle, unpack_triangle
from glmq.version import __version__

SAMPLES = (
    Sample("a.png", Path("a.png"), "What?", None, "11" * 32),
    Sample("s.jsonl:2", None, None, "text", "22" * 32),
)
WEIGHTS = {"b.10": "aa" * 16, "b.2": "bb" * 16}
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
    writer.finish(WEIGHTS)
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
    document = json.loads((folder / MANIFEST).read_text())
    assert document.pop("digest") == xxhash.xxh3_128_hexdigest(
        json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    )
    stored = load_file(folder / "block.0.safetensors") | load_file(folder / "block.1.safetensors")
    for site, entry in document["inputs"].items():
        assert entry.pop("xxh3") == {
            name.removeprefix(f"{site}."): xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
            for name, tensor in stored.items()
            if name.startswith(f"{site}.")
        }
    entry = {"file": "block.0.safetensors", "width": 5, "tokens": 9, "second_moment": True, "sensitivity_rows": 0}
    assert document == {
        "schema": "glmq.statistics/2",
        "glmq": __version__,
        "model": "f" * 64,
        "weights": {"b.2": "bb" * 16, "b.10": "aa" * 16},
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
    edit_json(folder / MANIFEST, lambda m: m.update(schema="glmq.statistics/3"))
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder)
    assert str(caught.value) == (
        f"{folder / MANIFEST}: schema is 'glmq.statistics/3', this glmq reads 'glmq.statistics/2'; "
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
        ("inputs", lambda m: m["inputs"][SITE].update(tokens=True)),
        ("inputs", lambda m: m["inputs"][SITE].pop("file")),
        ("inputs", lambda m: m["inputs"][SITE].update(tokens=0)),
        ("inputs", lambda m: m["inputs"][SITE].update(tokens=-9)),
        ("inputs", lambda m: m["inputs"][SITE].update(width=10**30)),
        ("inputs", lambda m: m["inputs"][SITE].update(second_moment=1)),
        ("inputs", lambda m: m["inputs"][SITE].update(settled="much")),
        ("inputs", lambda m: m["inputs"][SITE].update(settled={"range": 0.1, "diagonal": "x", "correlation": None})),
        ("inputs", lambda m: m["inputs"][SITE].pop("xxh3")),
        ("inputs", lambda m: m["inputs"][SITE]["xxh3"].pop("mean")),
        ("inputs", lambda m: m["inputs"][SITE]["xxh3"].update(mean=7)),
        ("weights", lambda m: m.pop("weights")),
        ("weights", lambda m: m["weights"].update({"b.2": None})),
        ("samples", lambda m: m["samples"][0].update(tokens=10**30)),
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


def test_files_that_the_manifest_names_and_that_are_missing_are_named_when_the_folder_is_opened(folder: Path) -> None:
    def refusal() -> str:
        with pytest.raises(StatisticsError) as caught:
            Statistics.open(folder)
        return str(caught.value)

    advice = "copy the folder again or run `glmq calibrate` again"
    names = f"{folder}: is incomplete: {MANIFEST} names"
    (folder / "block.1.safetensors").unlink()
    assert refusal() == f"{names} block.1.safetensors, which is not in the folder; {advice}"
    (folder / "block.0.safetensors").unlink()
    assert refusal() == f"{names} block.0.safetensors, block.1.safetensors, which are not in the folder; {advice}"


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


def test_an_altered_manifest_is_refused(folder: Path) -> None:
    edit_json(folder / MANIFEST, lambda m: m["inputs"][SITE].update(tokens=8))
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder)
    assert str(caught.value) == (
        f"{folder / MANIFEST}: its digest does not fit its contents, so it was altered; "
        "copy it again or run `glmq calibrate` again"
    )


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_of_any_field_is_found_when_it_is_read(field: str, folder: Path) -> None:
    name, path = f"{SITE}.{field}", folder / "block.0.safetensors"
    info, content = Checkpoint.open(folder).info(name), bytearray(path.read_bytes())
    content[info.end - 1] ^= 1
    path.write_bytes(content)
    statistics = Statistics.open(folder)
    assert statistics.input("other").tokens == 9
    with pytest.raises(StatisticsError) as caught:
        statistics.input(SITE)
    assert str(caught.value) == (
        f"{path}: tensor {name!r} is not the one that `glmq calibrate` wrote; "
        "copy the folder again or run `glmq calibrate` again"
    )


def test_statistics_of_an_older_glmq_are_read_and_say_that_they_have_no_checksums(folder: Path) -> None:
    assert Statistics.open(folder).has_checksums
    assert Statistics.open(folder).weights_wanted() is not None
    statistics = Statistics.open(without_checksums(folder, folder.with_name("older")))
    assert not statistics.has_checksums
    assert statistics.weights_wanted() is None
    assert torch.equal(statistics.input(SITE).mean, make_stats(SITE, with_moment=True).mean)
    assert statistics.settled() == {SITE: Convergence(0.0123, 0.5, 0.25), "narrow": Convergence(0.0, 1.0, None)}


def put(tensors: dict, field: str, index: object, value: float) -> None:
    tensors[f"{SITE}.{field}"][index] = value


def replace(tensors: dict, field: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[f"{SITE}.{field}"] = change(tensors[f"{SITE}.{field}"]).contiguous()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda t: put(t, "maximum", 0, 1e30), "its exponents do not fit its extremes"),
        (lambda t: put(t, "maximum", 0, torch.inf), "its maximum holds NaN or infinity"),
        (lambda t: put(t, "mean", 2, torch.nan), "its mean holds NaN or infinity"),
        (lambda t: put(t, "maximum", 1, -9.0), "its minimum is above its maximum"),
        (lambda t: replace(t, "mean", lambda x: x + 9), "its mean lies outside its minimum and maximum"),
        (lambda t: replace(t, "exponent", lambda x: x + 1), "its exponents do not fit its extremes"),
        (lambda t: replace(t, "exponent", torch.zeros_like), "its exponents do not fit its extremes"),
        (lambda t: replace(t, "square_mean", lambda x: x * 0), "its mean of squares is below the square of its mean"),
        (lambda t: replace(t, "square_mean", lambda x: x * 99), "its mean of squares is above the square of its extremes"),
        (lambda t: replace(t, "histogram", torch.zeros_like), "its histogram does not count its 9 tokens"),
        (lambda t: put(t, "histogram", (0, 7), -1), "its histogram does not count its 9 tokens"),
        (lambda t: replace(t, "histogram", lambda x: x.flip(1)), "its histogram does not end at its extremes"),
        (lambda t: replace(t, "histogram", lambda x: x.roll(1, 1)), "its histogram does not end at its extremes"),
        (lambda t: replace(t, "sample", lambda x: x * 99), "a token that it keeps lies outside its minimum and maximum"),
        (lambda t: put(t, "sample", (0, 0), torch.nan), "a token that it keeps lies outside its minimum and maximum"),
        (lambda t: replace(t, "sample", lambda x: x[:0]), "it keeps 0 of 9 tokens"),
        (lambda t: replace(t, "second_moment", lambda x: -x), "the diagonal of its second moment is not its mean of squares"),
        (lambda t: put(t, "second_moment", 0, torch.nan), "the diagonal of its second moment is not its mean of squares"),
        (lambda t: put(t, "second_moment", 1, 99.0), "its second moment is not one of numbers"),
        (lambda t: put(t, "second_moment", 1, torch.nan), "its second moment is not one of numbers"),
        (lambda t: replace(t, "mean", lambda x: x[:4]), "mean is F32 [4], F32 [5] is needed"),
        (lambda t: replace(t, "mean", lambda x: x.double()), "mean is F64 [5], F32 [5] is needed"),
        (lambda t: replace(t, "sample", lambda x: x[0, 0].clone()), "sample is F32 [], F32 [0, 5] is needed"),
        (lambda t: replace(t, "second_moment", lambda x: x[:9]), "second_moment is F32 [9], F32 [15] is needed"),
    ],
)  # fmt: skip
def test_impossible_statistics_are_refused_without_a_checksum(
    damage: Callable[[dict], None], what: str, folder: Path
) -> None:
    folder = without_checksums(folder, folder.with_name("older"))
    path = folder / "block.0.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(StatisticsError) as caught:
        Statistics.open(folder).input(SITE)
    assert str(caught.value) == f"{folder}: the statistics of {SITE!r} are damaged: {what}; run `glmq calibrate` again"


@given(
    st.integers(1, 6), st.integers(1, 40), st.floats(-44, 40), st.floats(-3, 3), st.integers(0, 2**32), st.booleans()
)
@settings(deadline=None)
def test_sound_statistics_have_no_defect(
    samples: int, tokens: int, scale: float, offset: float, seed: int, some_are_zero: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    accumulator = InputAccumulator("x", 7, with_moment=True)
    for _ in range(samples):
        x = (torch.randn(tokens, 7, generator=generator) + offset) * 2.0**scale
        x[:, 0] = x[0, 0]
        x[:, 1] *= 2.0 ** torch.randn(tokens, generator=generator).mul(3)
        accumulator.update(x * (torch.rand(tokens, 7, generator=generator) < 0.3) if some_are_zero else x, keep_rows=3)
    assert find_defect(accumulator.finish()) is None
