"""Every pair of the parameters that matter passes the checklist; every combination that does not work is refused at once."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest
from helpers import calibrate, quantize
from make_checkpoint import Size, make_checkpoint

from glmq.checkpoint.description import read_description
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import UsageError
from glmq.verification.structure import check_structure


@dataclass(frozen=True)
class Mode:
    """One way to spell a quantization type, with the options that have an effect in it."""

    name: str
    options: dict[str, object]
    quant_type: str
    takes: frozenset[str]


MODES = (
    Mode("w8a8", {}, "W8A8", frozenset({"act_method", "do_smooth"})),
    Mode("dynamic", {"is_dynamic": True}, "W8A8_DYNAMIC", frozenset({"do_smooth"})),
    Mode(
        "sigma",
        {"w_bit": 4, "is_lowbit": True, "use_sigma": True},
        "W8A8S",
        frozenset({"act_method", "do_smooth", "sigma_factor", "use_sigma"}),
    ),
    Mode(
        "fraction",
        {"w_bit": 4, "is_lowbit": True},
        "W8A8S",
        frozenset({"act_method", "do_smooth", "open_outlier", "fraction"}),
    ),
    Mode(
        "co_sparse",
        {"co_sparse": True},
        "W8A8S",
        frozenset({"act_method", "do_smooth", "open_outlier", "fraction"}),
    ),
    Mode(
        "w4a8",
        {"w_bit": 4, "is_lowbit": True, "is_dynamic": True},
        "W4A8_DYNAMIC",
        frozenset({"do_smooth", "open_outlier", "group_size"}),
    ),
)  # fmt: skip

VARIATIONS: tuple[dict[str, object], ...] = (
    {},
    {"act_method": 1},
    {"act_method": 3},
    {"open_outlier": False},
    {"do_smooth": True},
    {"do_smooth": True, "act_method": 1},
    {"fraction": 0.05},
    {"use_sigma": True},
    {"use_sigma": True, "sigma_factor": 1.5},
    {"sigma_factor": 2.0},
    {"group_size": 128},
    {"method": "plain"},
    {"method": "reference"},
)
Combination: TypeAlias = tuple[Mode, dict[str, object], dict[str, object]]
FORMS = ({"torch_dtype": "fp16"}, {"torch_dtype": "bf16"}, {"torch_dtype": "fp16", "mindie_format": True})


COMBINATIONS = list(itertools.product(MODES, VARIATIONS, FORMS))


def refused(mode: Mode, variation: dict[str, object], form: dict[str, object]) -> str | None:
    """The option that must be named in the refusal, or None if it must work: the table of options in other words."""
    ineffective = _without_effect(mode, variation)
    if ineffective is not None:
        return ineffective
    if mode.quant_type == "W8A8S" and form["torch_dtype"] == "bf16":
        return "--torch_dtype"
    if mode.name == "fraction" and variation == {"method": "reference"}:
        return "--fraction 0.01 with --method reference"  # the small model's rows have 64 weights
    if variation.get("group_size") == 128:
        return "choose another group size"
    return None


def _without_effect(mode: Mode, variation: dict[str, object]) -> str | None:
    effective = set(mode.takes)
    if mode.name == "fraction" and variation.get("use_sigma"):
        effective |= {"use_sigma", "sigma_factor"}
    for option in ("use_sigma", "sigma_factor", "fraction", "open_outlier", "act_method", "group_size"):
        if option in variation and option not in effective:
            return f"--{option}"
    return None


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model that has every kind of linear."""
    folder = tmp_path_factory.mktemp("one") / "model"
    make_checkpoint(folder, Size(layers=1))
    return folder


@pytest.fixture(scope="module")
def one_layer_stats(one_layer: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(one_layer, tmp_path_factory.mktemp("one") / "stats", pictures, limit=1)


def label(combination: Combination) -> str:
    mode, variation, form = combination
    return "-".join([mode.name, *(f"{key}={value}" for part in (variation, form) for key, value in part.items())])


WORKING = [combination for combination in COMBINATIONS if refused(*combination) is None]


def pairs(combination: Combination) -> set[str]:
    mode, *others = combination
    return {f"{a} {b}" for a, b in itertools.combinations([mode.name, *others], 2)}


def by_pairs() -> list[Combination]:
    """Of the combinations that work enough for every pair of a mode, a variation and a form."""
    each = [
        (mode, variation, working[(i + j) % len(working)])
        for (i, mode), (j, variation) in itertools.product(enumerate(MODES), enumerate(VARIATIONS))
        if (working := [form for form in FORMS if refused(mode, variation, form) is None])
    ]
    seen = set().union(*map(pairs, each))
    for combination in WORKING:
        if combination not in each and not pairs(combination) <= seen:
            each.append(combination)
            seen |= pairs(combination)
    return each


def parameters() -> list[object]:
    """In the quick half each mode has every form and each variation comes once; the refusals are all there."""
    working = by_pairs()
    first = {str(combination[1]): combination for combination in reversed(working)}
    quick = [combination for combination in working if combination[1] == {} or combination in first.values()]
    return [
        pytest.param(combination, id=label(combination), marks=[] if combination in quick else [pytest.mark.slow])
        for combination in working
    ] + [pytest.param(combination, id=label(combination)) for combination in COMBINATIONS if combination not in WORKING]


def test_there_are_at_least_150_combinations() -> None:
    assert len(COMBINATIONS) >= 150


@pytest.mark.parametrize("combination", parameters())
def test_a_combination_passes_the_checklist_or_is_refused_with_its_reason(
    combination: Combination,
    one_layer: Path,
    one_layer_stats: Path,
    tmp_path: Path,
) -> None:
    mode, variation, form = combination
    options = {**mode.options, **variation, **form}
    out = tmp_path / "out"
    wanted = refused(mode, variation, form)
    if wanted is not None:
        with pytest.raises(UsageError, match=re.escape(wanted)) as caught:
            quantize(one_layer, one_layer_stats, out, **options)
        assert len(str(caught.value).splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
        return
    # What the report says depends on the type and on a variation, not on both at once.
    reports = variation == {} or mode.name in ("w8a8", "sigma")
    quantize(one_layer, one_layer_stats, out, reports=reports, **options)
    description = read_description(out)
    assert description is not None
    assert description.model_quant_type == mode.quant_type
    with Checkpoint.open(one_layer) as source:
        assert list(check_structure(out, source)) == []
