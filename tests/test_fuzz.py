"""A short run of the fuzzer of tests/benchmarks: 500 hostile files, the same ones every time."""

from pathlib import Path

import pytest
from fuzz_readers import READERS, fuzz, make_good

SLOW = [name for name, reader in READERS.items() if reader.weight == 1]
QUICK = [name for name in READERS if name not in SLOW]


@pytest.mark.slow
def test_hostile_files_end_in_a_result_or_in_one_sentence(small: Path, tmp_path: Path) -> None:
    make_good(tmp_path, small)
    found = [
        *fuzz(tmp_path, tmp_path, range(30, 500), QUICK),
        *fuzz(tmp_path, tmp_path, range(30), SLOW),
    ]
    assert {name for name, _, _ in found} == {*READERS}
    assert [f"{name}, seed {seed}: {problem}" for name, seed, problem in found if problem is not None] == []
