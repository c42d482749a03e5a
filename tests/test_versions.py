"""What pyproject.toml promises of versions is what `.ci/lowest` installs."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")] + [0] * (2 - version.count("."))


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = {name: numbers(least) for name, least in re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(promised), re.M)}
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    pinned = {name: numbers(version) for name, version in re.findall(r"^([\w-]+)==([\d.]+)", text, re.M)}
    assert len(bounds) == len(promised)
    assert pinned == bounds
