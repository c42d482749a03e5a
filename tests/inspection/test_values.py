"""The values of one tensor against slow sums over its elements."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glmq.inspection.folder import scan_folder
from glmq.inspection.values import BINS, TensorValues, tensor_values


def values_of(tensor: Tensor, folder: Path, name: str = "x") -> TensorValues:
    save_file({name: tensor}, folder / "x.safetensors")
    (stored,) = scan_folder(folder).tensors
    return tensor_values(stored)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.float64]
)
def test_values_agree_with_slow_sums(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(37, 29, generator=generator) * 11).to(dtype)
    tensor[0, 0] = 120
    found = values_of(tensor, tmp_path)
    numbers = [float(number) for number in tensor.flatten()]
    mean = math.fsum(numbers) / len(numbers)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    assert (found.minimum, found.maximum, found.nonfinite) == (min(numbers), max(numbers), 0)
    # Both sums run in float64 over 1073 numbers of size 11: rounding stays below 1e-12 of them.
    assert found.mean == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(std, rel=1e-12)
    assert found.zero_share == pytest.approx(numbers.count(0) / len(numbers), rel=1e-12)
    far = sum(abs(number - mean) > 4 * std for number in numbers) / len(numbers)
    assert found.outlier_share == pytest.approx(far, rel=1e-12)
    assert sum(found.histogram) == len(numbers)
    width = (max(numbers) - min(numbers)) / BINS
    assert found.histogram[0] == sum(number < min(numbers) + width for number in numbers)
    shares = [numbers.count(value) / len(numbers) for value in set(numbers)]
    entropy = -math.fsum(share * math.log2(share) for share in shares)
    assert found.entropy_bits == (pytest.approx(entropy, rel=1e-12) if dtype.itemsize <= 2 else None)


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(-100, 100).repeat(7, 3).to(torch.int8)
    whole = values_of(tensor, tmp_path)
    monkeypatch.setattr("glmq.inspection.values.PIECE_BYTES", 1000)
    assert values_of(tensor, tmp_path) == whole


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    found = values_of(torch.tensor([1.0, math.nan, math.inf, 3.0]).half(), tmp_path)
    assert (found.nonfinite, found.minimum, found.maximum, found.mean) == (2, 1.0, 3.0, 2.0)
    assert values_of(torch.tensor([math.nan]), tmp_path).histogram == (0,) * BINS


def test_deq_scale_is_read_as_the_numbers_whose_bits_it_holds(tmp_path: Path) -> None:
    bits = torch.tensor([0.5, 0.25]).view(torch.int32).long()
    found = values_of(bits, tmp_path, "p.deq_scale")
    assert (found.minimum, found.maximum) == (0.25, 0.5)


def test_a_scalar_and_an_empty_tensor_are_described(tmp_path: Path) -> None:
    assert values_of(torch.tensor(3.0), tmp_path).histogram[0] == 1
    assert values_of(torch.zeros(0, 4), tmp_path).histogram == (0,) * BINS
