from pathlib import Path

import pytest

from glmq import cann
from glmq.cann import AscendState, find_ascend

WHOLE = AscendState("2.9.0", "2.9.0", "/", Path("/usr/local/Ascend/cann/set_env.sh"), Path("/d"), ("davinci0",))


def with_(**fields: object) -> AscendState:
    return AscendState(**{**{name: getattr(WHOLE, name) for name in AscendState.__slots__}, **fields})


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        (WHOLE, []),
        (with_(torch_npu=None), ["torch_npu is not installed; pip install torch-npu==2.9.0"]),
        (with_(torch="2.9.0+cpu", torch_npu=None), ["torch_npu is not installed; pip install torch-npu==2.9.0"]),
        (with_(torch=None, torch_npu=None), ["torch_npu is not installed; pip install torch-npu"]),
        (with_(torch="2.13.0+cpu"), ["torch_npu 2.9.0 belongs to torch 2.9.0, found torch 2.13.0+cpu; "
         "pip install torch==2.9.0, or the torch_npu of 2.13.0"]),
        (with_(home=None), ["CANN is installed, but its environment is not set; source /usr/local/Ascend/cann/set_env.sh"]),
        (with_(home="/nowhere"), ["ASCEND_HOME_PATH is /nowhere, which is no folder; source the set_env.sh of CANN again"]),
        (with_(home=None, set_env=None), [f"CANN is not installed in /usr/local/Ascend or {cann.INSTALLED[1]}; install it, "
         "or source the set_env.sh of where it is"]),
        (with_(driver=None), ["the NPU driver is not in /usr/local/Ascend/driver; install it, or mount it into the container"]),
        (with_(devices=()), ["/dev/davinci0 is not there; use a machine with an NPU, or give the container --device "
         "/dev/davinci0"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_what_to_do(state: AscendState, missing: list[str]) -> None:
    assert state.missing() == missing


@pytest.mark.parametrize(
    ("torch", "torch_npu", "belong"),
    [
        ("2.9.0", "2.9.0", True),
        ("2.9.0+cpu", "2.9.0rc1", True),
        ("2.1.0", "2.1.0.post8", True),
        ("2.9.1", "2.9.0", False),
        ("2.13.0+cpu", "2.9.0", False),
        (None, "2.9.0", True),
        ("2.9.0", None, True),
        ("unknown", "2.9.0", True),
    ],
)
def test_torch_and_torch_npu_of_one_release_belong_together(
    torch: str | None, torch_npu: str | None, belong: bool
) -> None:
    assert (with_(torch=torch, torch_npu=torch_npu).mismatch is None) is belong


def test_a_machine_is_looked_at_without_loading_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cann, "INSTALLED", (tmp_path / "Ascend",))
    monkeypatch.setattr(cann, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(cann, "version_of", {"torch": "2.9.0"}.get)
    assert find_ascend({}) == AscendState("2.9.0", None, None, None, None, ())
    for folder in ("Ascend/driver", "Ascend/ascend-toolkit", "dev"):
        (tmp_path / folder).mkdir(parents=True)
    script = tmp_path / "Ascend" / "ascend-toolkit" / "set_env.sh"
    for path in (script, *(tmp_path / "dev" / name for name in ("davinci1", "davinci0", "davinci_manager"))):
        path.touch()
    found = find_ascend({"ASCEND_TOOLKIT_HOME": str(tmp_path)})
    assert found == AscendState(
        "2.9.0", None, str(tmp_path), script, script.parents[1] / "driver", ("davinci0", "davinci1")
    )
