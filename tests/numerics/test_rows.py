import pytest
import torch

from glmq.numerics import rows
from glmq.numerics.rows import column_energy, column_max, even_rows, row_energy, row_max


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
