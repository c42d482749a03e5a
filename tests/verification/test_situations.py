"""What verify says it did not check is what its documentation says."""

from pathlib import Path

import pytest

import glmq
from glmq.verification.situations import Situation, situation_of, situations_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "verify.md"


def test_the_table_in_the_documentation_is_that_of_verify() -> None:
    assert situations_table() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("checksums", "reference", "samples", "wanted"),
    [
        (True, True, True, Situation.CHECKSUMS),
        (False, True, True, Situation.SAMPLES),
        (False, True, False, Situation.REFERENCE),
        (False, False, False, Situation.ALONE),
    ],
)
def test_the_situation_is_the_strongest_there_is(
    checksums: bool, reference: bool, samples: bool, wanted: Situation
) -> None:
    assert situation_of(has_checksums=checksums, has_reference=reference, has_samples=samples) is wanted


def test_verify_says_what_passes_in_its_situation(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = glmq.quantize(small, small_stats, out=tmp_path / "out").folder
    assert glmq.verify(out).not_checked[-1] == Situation.CHECKSUMS.misses
    for own in ("glmq_checksums.json", "glmq_report.json", "glmq_report.csv"):
        (out / own).unlink()
    assert glmq.verify(out).not_checked[-1] == Situation.ALONE.misses
    assert glmq.verify(out, reference=small).not_checked[-1] == Situation.REFERENCE.misses
