"""What an Ascend machine has, as found without loading any of it: torch_npu, CANN and its environment, driver, devices."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.machine import version_of

AUTOLOAD: Final = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Unless it is 0, torch imports torch_npu with itself: an error on a machine without CANN, whatever torch is wanted for."""
INSTALLED: Final = (Path("/usr/local/Ascend"), Path(os.environ.get("HOME", "/root")) / "Ascend")
"""Where CANN and the driver are installed unless somebody chose another place."""
DEVICES: Final = Path("/dev")
_HOMES: Final = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""What set_env.sh of CANN sets."""
_SET_ENV: Final = ("ascend-toolkit/set_env.sh", "cann/set_env.sh", "cann-*/set_env.sh", "nnrt/set_env.sh")
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")


@dataclass(frozen=True, slots=True)
class AscendState:
    """What was found. None: not there."""

    torch: str | None
    """Its version, like the next."""
    torch_npu: str | None
    home: str | None
    """Of CANN, as its environment names it; None: set_env.sh was not sourced."""
    set_env: Path | None
    """The set_env.sh that could be sourced."""
    driver: Path | None
    devices: tuple[str, ...]
    """As in /dev."""

    @property
    def is_home_there(self) -> bool:
        """Whether the environment names a folder that exists."""
        return self.home is not None and Path(self.home).is_dir()

    @property
    def mismatch(self) -> str | None:
        """Why torch and torch_npu cannot work together, by their versions; None if nothing speaks against it."""
        if self.torch is None or self.torch_npu is None:
            return None
        has, needs = (_RELEASE.match(version) for version in (self.torch, self.torch_npu))
        # 2.1.0.post8 belongs to 2.1.0, and so does 2.1.0+cpu.
        if has is None or needs is None or has[0].split(".")[:3] == needs[0].split(".")[:3]:
            return None
        return (
            f"torch_npu {self.torch_npu} belongs to torch {needs[0]}, found torch {self.torch}; "
            f"pip install torch=={needs[0]}, or the torch_npu of {has[0]}"
        )

    def missing(self) -> list[str]:
        """What keeps an NPU from being used, and what to do about each; in the order in which it has to be there."""
        found: list[str] = []
        if self.torch_npu is None:
            release = _RELEASE.match(self.torch or "")
            found.append(f"torch_npu is not installed; pip install torch-npu{f'=={release[0]}' if release else ''}")
        elif self.mismatch is not None:
            found.append(self.mismatch)
        if self.home is not None and not self.is_home_there:
            found.append(f"ASCEND_HOME_PATH is {self.home}, which is no folder; source the set_env.sh of CANN again")
        elif self.home is None and self.set_env is not None:
            found.append(f"CANN is installed, but its environment is not set; source {self.set_env}")
        elif self.home is None:
            places = " or ".join(map(str, INSTALLED))
            found.append(f"CANN is not installed in {places}; install it, or source the set_env.sh of where it is")
        if self.driver is None:
            found.append(
                f"the NPU driver is not in {INSTALLED[0] / 'driver'}; install it, or mount it into the container"
            )
        if not self.devices:
            found.append(
                f"{DEVICES}/davinci0 is not there; use a machine with an NPU, or give the container --device {DEVICES}/davinci0"
            )
        return found


def find_ascend(environment: Mapping[str, str] = os.environ) -> AscendState:
    """Look at this machine. Imports neither torch nor torch_npu: both may be what is broken."""
    drivers = [root / "driver" for root in INSTALLED if (root / "driver").is_dir()]
    scripts = [path for root in INSTALLED for pattern in _SET_ENV for path in sorted(root.glob(pattern))]
    return AscendState(
        torch=version_of("torch"),
        torch_npu=version_of("torch-npu"),
        home=next((environment[name] for name in _HOMES if environment.get(name)), None),
        set_env=scripts[0] if scripts else None,
        driver=drivers[0] if drivers else None,
        devices=tuple(sorted(path.name for path in DEVICES.glob("davinci[0-9]*"))),
    )
