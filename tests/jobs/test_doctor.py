from pathlib import Path

import pytest

from glmq.cann import AscendState
from glmq.jobs import doctor


def test_a_machine_without_working_torch_is_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_kernels", fail)
    found = doctor.diagnose()
    assert found.kernels == {}
    assert found.problems[0] == "torch cannot be imported (ImportError: libtorch.so: cannot open shared object file)"


def test_missing_kernels_and_a_torch_npu_of_another_torch_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_kernels", lambda: {"rounding": "torch", "codec": "avx2-gather"})
    state = AscendState("2.13.0", "2.9.0", "/", None, Path("/d"), ("davinci0",))
    monkeypatch.setattr(doctor, "find_ascend", lambda: state)
    assert doctor.diagnose().problems == (
        "no compiled kernel for rounding: torch computes it and takes 1.5 times as long; install a C compiler and install glmq "
        "again",
        "no NPU can be used: torch_npu 2.9.0 belongs to torch 2.9.0, found torch 2.13.0; pip install torch==2.9.0, "
        "or the torch_npu of 2.13.0",
    )


def test_a_machine_without_a_temporary_folder_is_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", fail)
    found = doctor.diagnose()
    assert list(found.disks) == [str(Path.cwd())]
    assert found.problems[-1] == (
        "no temporary folder can be written to (of TMPDIR, /tmp, /var/tmp and the current one); set TMPDIR to one that can"
    )
