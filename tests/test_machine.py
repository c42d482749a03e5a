import logging
from pathlib import Path

import psutil
import pytest

from glmq import machine
from glmq.machine import logging_to

FREE = 10**9


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with FREE bytes of memory, and no limit yet."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": FREE}))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path / "fs")
    return tmp_path


def group(root: Path, name: str, **files: object) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (root / name / file.replace("__", ".")).write_text(f"{text}\n")


def test_without_a_limit_the_machines_memory_is_available(root: Path) -> None:
    assert machine.available_memory() == FREE
    (root / "cgroup").write_text("0::/\n")
    assert machine.available_memory() == FREE
    group(root, "fs/user", memory__max="max", memory__current=5)
    (root / "cgroup").write_text("0::/user\n")
    assert machine.available_memory() == FREE


@pytest.mark.parametrize(
    ("groups", "cgroup", "available"),
    [
        ({"fs": {"memory__max": 1000, "memory__current": 300}}, "0::/\n", 700),
        ({"fs": {"memory__max": 1000, "memory__current": 300}}, "0::/docker/abc\n", 700),  # as containers see themselves
        ({"fs": {"memory__max": 1000, "memory__current": 1200}}, "0::/\n", 0),
        ({"fs/a": {"memory__max": 500, "memory__current": 100}, "fs/a/b": {"memory__max": "max", "memory__current": 50}},
         "0::/a/b\n", 400),
        ({"fs/a": {"memory__max": 500, "memory__current": 400, "memory__stat": "anon 100\ninactive_file 300"}},
         "0::/a\n", 400),
        ({"fs/memory/a": {"memory__limit_in_bytes": 900, "memory__usage_in_bytes": 100}}, "4:cpu:/a\n7:memory:/a\n", 800),
        ({"fs/memory": {"memory__limit_in_bytes": 900, "memory__usage_in_bytes": 100, "memory__stat": "total_inactive_file 9"}},
         "7:memory:/a\n", 809),
        ({"fs/memory": {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": 100}}, "7:memory:/\n", FREE),
    ],
)  # fmt: skip
def test_the_limit_of_a_container_is_what_is_available(
    groups: dict[str, dict[str, object]], cgroup: str, available: int, root: Path
) -> None:
    (root / "cgroup").write_text(cgroup)
    for name, files in groups.items():
        group(root, name, **files)
    assert machine.available_memory() == available


def test_the_processor_is_named_with_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor_features() == ()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 amx_bf16 sse\n")
    assert machine.processor_name() == "A Processor"
    assert machine.processor_features() == ("avx2", "amx_bf16")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd i8mm\n")
    assert machine.processor_features() == ("asimd", "i8mm")


def test_a_log_that_is_closed_takes_no_line_and_levels_last_as_long_as_a_log_wants_them(tmp_path: Path) -> None:
    logger = logging.getLogger("glmq")
    before = logger.level
    with logging_to(tmp_path / "a", logging.DEBUG) as first:
        with logging_to(tmp_path / "b", logging.INFO):
            pass
        assert logger.isEnabledFor(logging.DEBUG)
    assert logger.level == before
    (tmp_path / "a").unlink()
    first.handle(logging.LogRecord("glmq", logging.INFO, "", 0, "late", None, None))  # of another thread
    assert not (tmp_path / "a").exists()


def test_a_log_that_ends_before_one_that_began_later_leaves_it_its_level(tmp_path: Path) -> None:
    logger = logging.getLogger("glmq")
    before = logger.level
    first, second = logging_to(tmp_path / "a", logging.INFO), logging_to(tmp_path / "b", logging.INFO)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.isEnabledFor(logging.INFO)
    second.__exit__(None, None, None)
    assert logger.level == before
