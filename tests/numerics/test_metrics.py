import math

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmq.numerics.metrics import cosine, count_int8, entropy_bits, relative_l2, sqnr_db, top1


def test_relative_error_is_noise_over_signal() -> None:
    assert relative_l2(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == 4 / 3
    assert relative_l2(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_l2(torch.ones(3), torch.zeros(3)) == math.inf


def test_twenty_decibels_are_a_tenth() -> None:
    assert sqnr_db(0.1) == 20.0
    assert sqnr_db(1.0) == 0.0
    assert sqnr_db(0.0) == math.inf


def test_cosine_of_parallel_opposite_orthogonal_and_absent_vectors() -> None:
    a = torch.tensor([3.0, 4.0])
    assert cosine(a, 2 * a) == 1.0
    assert cosine(a, -a) == -1.0
    assert cosine(a, torch.tensor([4.0, -3.0])) == 0.0
    assert cosine(a, torch.zeros(2)) == 0.0


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=200))
@settings(deadline=None)
def test_counts_and_entropy_equal_those_of_a_counter(values: list[int]) -> None:
    counts = count_int8(torch.tensor(values, dtype=torch.int8))
    assert counts.tolist() == [values.count(v) for v in range(-128, 128)]
    # Up to 200 float64 terms of at most 8 bits each: 200 * 8 * 2^-52 < 1e-12.
    assert math.isclose(entropy_bits(counts), reference.entropy_bits(values), rel_tol=0, abs_tol=1e-12)


def test_entropy_of_equal_shares_is_their_logarithm() -> None:
    assert entropy_bits(torch.tensor([5, 0, 5, 5, 5])) == 2.0
    assert entropy_bits(torch.tensor([7])) == 0.0
    assert entropy_bits(torch.zeros(256, dtype=torch.int64)) == 0.0


def test_top1_is_the_share_of_equal_winners() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert top1(a, torch.tensor([[5.0, 0.0], [1.0, 0.0], [2.0, 1.0], [0.0, 9.0]])) == 0.75
