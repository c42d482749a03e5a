"""Sums over two stored weights: the compiled kernel against torch, and torch against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glmq.checkpoint.reader import Checkpoint
from glmq.inspection import sums as module
from glmq.inspection.scaling import UNSCALED, Scaling
from glmq.inspection.sums import KERNELS, Sums, sum_by_torch, sum_rows
from glmq.inspection.weights import StoredMatrix

ROWS, FIRST, LAST = 14, 2, 12
HALVES = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
"""Every float16 number, infinities and NaN too."""
CHOICES = (*((name,) for name in KERNELS), ())
"""Each compiled kernel by itself, and torch."""

compiled_only = pytest.mark.skipif(not KERNELS, reason="installed without a compiler")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (ROWS, columns), generator=generator, dtype=torch.int8)


def stored(folder: Path, kind: str, columns: int, seed: int) -> StoredMatrix:
    """A matrix of that kind in a checkpoint of its own: a dtype, `int8` with a step per row, `int4` with groups of 32."""
    tensors = {"x.weight": integers(columns, seed)}
    if kind in ("int8", "int4"):
        tensors["x.weight_scale"] = random(ROWS, 1, seed=seed + 1).abs() + 0.1
    else:
        tensors["x.weight"] = random(ROWS, columns, seed=seed).to(getattr(torch, kind))
    if kind == "int4":
        tensors["x.weight_scale_second"] = random(ROWS, columns // 32, seed=seed + 2).abs() + 0.1
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return StoredMatrix(Checkpoint.open(folder), "x")


def real_values(matrix: StoredMatrix) -> Tensor:
    """float64 rows FIRST to LAST."""
    values = matrix.stored(FIRST, LAST).double()
    if matrix.step is None:
        return values
    steps = matrix.step.double() if matrix.second is None else matrix.step.double() * matrix.second.double()
    return values * steps[FIRST:LAST].repeat_interleave(values.shape[1] // steps.shape[1], 1)


@pytest.mark.parametrize("columns", [32, 1056])  # one group; more than a run, and not a multiple of one
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("other", ["int8", "int4", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("one", ["int8", "int4", "bfloat16", "float16"])
def test_sums_are_those_of_the_real_weights(
    one: str,
    other: str,
    scaled: bool,
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = stored(tmp_path / "a", one, columns, 1), stored(tmp_path / "b", other, columns, 5)
    scaling = UNSCALED
    if scaled:
        scaling = Scaling(random(ROWS, seed=8).abs() + 0.5, random(columns, seed=9).abs() + 0.5)
    x, y = real_values(a), scaling.undone(real_values(b), FIRST)
    sums = [float(x.square().sum()), float(y.square().sum()), float((y - x).square().sum()), float((y - x).abs().max())]
    p, q = a.stored(FIRST, LAST), b.stored(FIRST, LAST)
    changed = int((p != q).sum()) if a.is_integer and b.is_integer else 0
    wanted_counts = [
        np.bincount(values.numpy().ravel().astype(int) + 128, minlength=256) if matrix.is_integer else np.zeros(256)
        for values, matrix in ((p, a), (q, b))
    ]
    for kernels in CHOICES:
        monkeypatch.setattr(module, "KERNELS", kernels)
        found = sum_rows(a, b, scaling, (FIRST, LAST))
        assert [found.a, found.b, found.noise, found.max_abs] == pytest.approx(sums, rel=1e-5), kernels
        assert (found.changed, found.identical) == (changed, False), kernels
        assert np.array_equal(found.counts, wanted_counts), kernels


@pytest.mark.parametrize("kernels", CHOICES)
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "float16", "float64"])
def test_equal_rows_have_no_noise(
    kind: str, kernels: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KERNELS", kernels)
    a, b = stored(tmp_path / "a", kind, 96, 1), stored(tmp_path / "b", kind, 96, 1)
    found = sum_rows(a, b, UNSCALED, (FIRST, LAST))
    assert (found.identical, found.changed, found.noise, found.max_abs) == (True, 0, 0.0, 0.0)
    assert found.cosine == pytest.approx(1, abs=1e-12)


@compiled_only
def test_one_flipped_bit_of_a_float_is_seen(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", "bfloat16", 1056, 1)
    folder = tmp_path / "b"
    folder.mkdir()
    weight = a.stored(0, ROWS).clone()
    weight.view(torch.int16)[FIRST + 1, 1055] ^= 1
    save_file({"x.weight": weight}, folder / "model.safetensors")
    found = sum_rows(a, StoredMatrix(Checkpoint.open(folder), "x"), UNSCALED, (FIRST, LAST))
    assert not found.identical
    assert found.noise > 0


@compiled_only
def test_every_float16_number_is_widened_exactly() -> None:
    finite = HALVES[HALVES.isfinite()]
    noise, signal = _difference(finite, finite.float())
    assert noise == 0
    assert signal == pytest.approx(float(finite.double().square().sum()), rel=1e-5)


@compiled_only
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_spoils_the_sums(value: float) -> None:
    noise, signal = _difference(torch.tensor([value]).half(), torch.zeros(1))
    assert not np.isfinite([noise, signal]).any()


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Noise and a . a of one row of float16 and one of float32 numbers by the kernel."""
    counts = np.zeros((2, 256), dtype=np.int64)
    sums = module._sums.sum_pair(
        KERNELS[0],
        a.view(torch.uint8).numpy(), 2, None, 1, b.view(torch.uint8).numpy(), 3, None, 1, None, None, counts, 1, a.numel()
    )  # fmt: skip
    return sums[2], sums[0]


@compiled_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "avx1024"}, "no kernel avx1024 on this machine"),
        ({"rows": 2**40, "columns": 2**40}, "fewer than 2\\^32 together"),
        ({"rows": 0}, "rows and columns must be positive"),
        ({"columns": 5}, "data has 32 bytes, 40 are needed"),
        ({"kind_a": 4}, "no such kind"),
        ({"kind_b": -1}, "no such kind"),
        ({"groups_b": 3}, "groups that do not divide"),
        ({"steps_a": None}, "steps has 0 bytes, 32 are needed"),
        ({"steps_b": np.zeros(9, np.float32)}, "steps has 36 bytes, 32 are needed"),
        ({"column_scales": np.zeros(3, np.float32)}, "column_scales has 12 bytes, 16 are needed"),
        ({"row_scales": np.zeros(3, np.float32)}, "row_scales has 12 bytes, 32 are needed"),
        ({"counts": np.zeros(256, np.int64)}, "counts has 2048 bytes, 4096 are needed"),
        (
            {"groups_a": 2, "steps_a": np.ones(16, np.float32), "groups_b": 4, "steps_b": np.ones(32, np.float32)},
            "the groups of both sides differ",
        ),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    data, steps = np.zeros(32, np.int8), np.ones(8, np.float32)
    arguments: dict[str, object] = {
        "kernel": KERNELS[-1],
        "a": data, "kind_a": 0, "steps_a": steps, "groups_a": 1, "b": data, "kind_b": 0, "steps_b": steps, "groups_b": 1,
        "column_scales": None, "row_scales": None, "counts": np.zeros((2, 256), np.int64), "rows": 8, "columns": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        module._sums.sum_pair(*(arguments | changes).values())


def test_sums_of_parts_add_up(tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a", "int8", 96, 1), stored(tmp_path / "b", "int8", 96, 5)
    whole, parts = sum_rows(a, b, UNSCALED, (0, ROWS)), Sums()
    for rows in ((0, 6), (6, ROWS)):
        parts.merge(sum_by_torch(a, b, UNSCALED, rows[0], a.stored(*rows), b.stored(*rows)))
    assert (parts.changed, parts.identical, parts.max_abs) == (whole.changed, False, pytest.approx(whole.max_abs))
    assert [parts.a, parts.b, parts.noise] == pytest.approx([whole.a, whole.b, whole.noise])
    assert np.array_equal(parts.counts, whole.counts)
