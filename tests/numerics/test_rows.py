import pytest
import torch

from glmq.numerics import rows
from glmq.numerics.rows import column_energy, column_max, even_rows, fill_dead_rows, is_one_number, row_energy, row_max


def test_sums_and_maxima_of_rows_and_columns_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.0, -4.0, 0.5], [-7.0, 0.0, 0.0]])
    monkeypatch.setattr(rows, "CHUNK_WEIGHTS", 6)
    assert row_max(weight).tolist() == [[3.0], [4.0], [7.0]]
    assert column_max(weight).tolist() == [7.0, 4.0, 3.0]
    assert row_energy(weight).tolist() == [[14.0], [16.25], [49.0]]
    assert column_energy(weight).tolist() == [50.0, 20.0, 9.25]


def test_a_curve_looks_at_evenly_spaced_rows() -> None:
    weight = torch.arange(10.0)[:, None]
    assert even_rows(weight, 4)[:, 0].tolist() == [0.0, 3.0, 6.0, 9.0]
    assert even_rows(weight, 10) is weight


def test_a_matrix_of_one_number_is_known() -> None:
    assert is_one_number(torch.full((3, 4), 0.02))
    assert is_one_number(torch.zeros(2, 2))
    for row, column in ((0, 3), (2, 0)):
        weight = torch.full((3, 4), 0.02)
        weight[row, column] = 0.03
        assert not is_one_number(weight)


def test_a_row_whose_step_no_engine_could_hold_counts_as_zeros() -> None:
    steps = torch.tensor([[0.25], [0.0], [1e-38], [2.0**-100]])
    assert fill_dead_rows(steps).tolist() == [[0.25], [0.25], [0.25], [2.0**-100]]
    assert fill_dead_rows(torch.tensor([[1e-38], [0.0]])).tolist() == [[1.0], [1.0]]
