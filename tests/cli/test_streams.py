import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from glmq.cli.console import VisibleConsole
from glmq.cli.streams import mend_streams

CODE = (
    "import os, sys\n"
    "from glmq.cli.streams import mend_streams\n"
    "mend_streams()\n"
    "print('out'), print('err', file=sys.stderr), sys.stdin.read()\n"
    "sys.exit(os.open('weights', os.O_CREAT | os.O_WRONLY))\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_no_file_takes_the_place_of_a_stream_that_is_closed(closed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, CODE],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    assert (tmp_path / "weights").read_bytes() == b""


def test_characters_that_a_stream_cannot_write_are_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    mend_streams()
    print("照片.png", flush=True)
    assert written.getvalue() == b"\\u7167\\u7247.png\n"


class Full(io.StringIO):
    """A file on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk_does_not_end_the_run() -> None:
    talk = VisibleConsole(file=Full(), stderr=True)
    talk.print("calibrate: 1/5")
    talk.print("calibrate: 2/5")
    with pytest.raises(OSError, match="No space left on device"):
        VisibleConsole(file=Full()).print("the result")
