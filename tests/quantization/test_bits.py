import pytest

from glmq.errors import UsageError
from glmq.numerics.rate import RateCurve
from glmq.quantization.bits import needs_curves, spread_bits
from glmq.quantization.options import Options
from glmq.quantization.recipe import Recipe, make_recipe

SPARSE = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
LINEARS = ("q", "k")
CURVES = (
    RateCurve("q", 3000, (5.0, 4.0, 3.0, 2.0), (0.01, 0.04, 0.16, 0.64), 3.5),
    RateCurve("k", 1000, (5.0, 4.0, 3.0, 2.0), (0.01, 0.04, 0.16, 0.64), 2.5),
)


def recipe(**options: object) -> Recipe:
    return make_recipe(Options(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"target_bits": 4.0}, False),
        (SPARSE, True),
        (SPARSE | {"method": "plain"}, False),
        (SPARSE | {"method": "plain", "target_bits": 3.0}, True),
        (SPARSE | {"method": "reference"}, False),
    ],
)
def test_curves_are_measured_where_the_rule_alone_does_not_decide(options: dict[str, object], expected: bool) -> None:
    assert needs_curves(recipe(**options)) is expected


def test_without_a_target_the_mean_is_what_the_rule_would_spend() -> None:
    bits = spread_bits(recipe(**SPARSE), LINEARS, CURVES)
    mean = (3000 * bits["q"] + 1000 * bits["k"]) / 4000
    assert 3.25 - 1e-3 <= mean <= 3.25
    assert bits["k"] > bits["q"]  # the same loss for a third of the weights


def test_a_target_is_the_mean_of_sparse_linears_and_the_limit_of_each_other() -> None:
    bits = spread_bits(recipe(**SPARSE, target_bits=4.0), LINEARS, CURVES)
    assert 4.0 - 1e-3 <= (3000 * bits["q"] + 1000 * bits["k"]) / 4000 <= 4.0
    assert spread_bits(recipe(target_bits=4.0), LINEARS, ()) == {"q": 4.0, "k": 4.0}


@pytest.mark.parametrize("options", [{}, SPARSE | {"method": "plain"}, SPARSE | {"method": "reference"}])
def test_nothing_is_limited_where_the_rule_alone_decides(options: dict[str, object]) -> None:
    assert spread_bits(recipe(**options), LINEARS, ()) == {}


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        spread_bits(recipe(**SPARSE, target_bits=1.5), LINEARS, CURVES)
    assert str(caught.value) == "a mean of 1.500 bits per weight was asked for, but these linears can have 2.000 to 8"
