"""Codes of errors: each is explained in both languages, with its exit code, and each is raised somewhere."""

import re
from pathlib import Path

import pytest

from glmq import errors

ROOT = Path(__file__).parents[1]
KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and "code" in vars(kind)}
SIGNALS = {errors.INTERRUPTED, errors.TERMINATED}


@pytest.mark.parametrize("document", ["errors.md", "zh/errors.md"])
def test_each_code_is_explained_once_under_its_exit_code(document: str) -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    explained = {
        code: section.partition("\n")[0]
        for section in sections
        for code in re.findall(r"^\| (GLMQ-E\d{3}) \| [^|]+ \| [^|]+ \|$", section, flags=re.MULTILINE)
    }
    assert set(explained) == {kind.code for kind in KINDS.values()} | SIGNALS
    for kind in KINDS.values():
        assert re.search(rf"\b{kind.exit_code}\b", explained[kind.code]), kind


def test_each_kind_is_raised_somewhere() -> None:
    called = {
        name
        for path in (ROOT / "glmq").rglob("*.py")
        for name in re.findall(r"(?<!class )\b([A-Z]\w+)\(", path.read_text(encoding="utf-8"))
    }
    assert set(KINDS) - called == {"GlmqError"}  # its code is that of what nobody foresaw


def test_what_only_gathers_others_is_not_raised() -> None:
    for path in (ROOT / "glmq").rglob("*.py"):
        assert not re.search(r"raise (Input|Resource|Glmq)Error\b", path.read_text(encoding="utf-8")), path
