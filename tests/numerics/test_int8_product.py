import pytest
import torch
from torch import Tensor

from glmq.numerics import int8_product, rows
from glmq.numerics.int8_product import has_exact_product, matmul_int8


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@pytest.fixture(params=["the platform's", "float32"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways to multiply."""
    if request.param == "float32":
        monkeypatch.setattr(int8_product, "has_exact_product", lambda _: False)
    elif not has_exact_product("cpu"):
        pytest.skip("PyTorch has no exact int8 product on this processor")


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("columns", [1, 1023, 1024, 1025, 3000])
def test_integer_products_are_exact(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_WEIGHTS", 3 * columns)
    xq, q = integers(5, columns), integers(7, columns, seed=1)
    xq[0], q[0] = -128, -128  # the largest sums
    q[1] = 127
    assert torch.equal(matmul_int8(xq, q), (xq.long() @ q.long().T).double())
    xq, q = xq[:, columns // 2 :], q[:, columns // 2 :]  # as groups of columns are
    assert torch.equal(matmul_int8(xq, q), (xq.long() @ q.long().T).double())


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("extra", [0, 1])
def test_sums_of_all_columns_at_once_are_exact_up_to_the_limit(extra: int) -> None:
    xq = torch.full((1, 4096), -128, dtype=torch.int8)
    xq[0, 0] = -127  # an odd sum, which float32 has no room for beyond 2^24
    q = torch.full((2, 4096), 32, dtype=torch.int8)
    q[0, 0] += 1 - 2 * (1 - extra)  # magnitudes add up to 2^17 at most, or to one more
    assert torch.equal(matmul_int8(xq, q), (xq.long() @ q.long().T).double())


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch._int_mm` does with AVX2: pairs of products are added in 16 bits."""

    def saturating(xq: Tensor, q: Tensor) -> Tensor:
        pairs = (xq.int()[:, None, :] * q.int()[None]).unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2, dtype=torch.int32)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(int8_product, "_int_product", saturating)
    has_exact_product.cache_clear()
    try:
        assert not has_exact_product("cpu")
    finally:
        has_exact_product.cache_clear()
    assert not has_exact_product("meta")
