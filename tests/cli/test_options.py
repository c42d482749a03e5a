import pytest

from glmq.cli.options import parse_size
from glmq.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 2**30), ("4", 4 * 2**30), ("4GB", 4 * 2**30), ("4 gb", 4 * 2**30), ("4GiB", 4 * 2**30),
        ("500MB", 500 * 2**20), ("1mib", 2**20), (" 2 ", 2**31),
    ],
)  # fmt: skip
def test_sizes_are_gigabytes_unless_they_say_otherwise(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "0MB", "-1", "1.5", "4TB", "GB", "", "4 GB 2"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"--part_file_size {text}: a whole number of GB, at least 1, is needed, or a size like 4GB or 500MB"
    )
