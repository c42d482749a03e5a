"""The adapter to the vendor's `compress_excutor` (spelled so), which makes the W8A8SC that the serving engine runs.

It takes eleven arguments and a weight in fractal NZ order, and writes three files. Its exit status 0 does not mean success, so
every output is checked against what the engine will assume.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from glmq.checkpoint.disk import DISK_FULL
from glmq.compression.fractal import COLS, ROWS, count_fractals, to_nz
from glmq.compression.manifest import CodecKind
from glmq.compression.weight_codec import Compressed, EncodedTensor
from glmq.errors import CompressProgramError, DeviceError, SpaceError, TooLargeError, UsageError

PROGRAM: Final = "compress_excutor"
VARIABLE: Final = "GLMQ_EXECUTOR"
"""Environment variable with the program's path."""
MAX_DIMENSION: Final = 50_000
"""Above it the program prints a message and goes on as if nothing had happened."""
TIME_LIMIT: Final = 600.0
"""Seconds for one weight, as in the vendor's own tool."""
TILING: Final = 8
"""The only tiling, in both directions, that the engine's kernel knows."""

_PACKAGE: Final = "msmodelslim"
_BUILD: Final = f"pytorch/weight_compression/compress_graph/build/{PROGRAM}"
_PATH: Final = re.compile(r"[A-Za-z0-9_./-]+")
_MAX_DEPTH: Final = 32


def find_executor(given: Path | None) -> Path | None:
    """The program: `given` if there is one, else the one that the installed msmodelslim package was built with, else None.

    Raises:
        DeviceError: `given` is not a program.
    """
    if given is not None:
        path = given.absolute()
        if not path.is_file() or not os.access(path, os.X_OK):
            raise CompressProgramError(f"--executor {given}: is not a program; {how_to_build()}")
        return path
    spec = find_spec(_PACKAGE)  # finds it without importing it, which would patch torch
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(location) / _BUILD
        if path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def how_to_build() -> str:
    """What to install and do to get the program."""
    return (
        f"install CANN and {_PACKAGE} on the Atlas 300I Duo host, run `bash build.sh $ASCEND_HOME_PATH` in the package's "
        f"pytorch/weight_compression/compress_graph, and give build/{PROGRAM} as --executor or in {VARIABLE}"
    )


class AscendCodec:
    """Runs the program, one process per weight.

    Args:
        program: its path.
        time_limit: seconds for one weight.
    """

    def __init__(self, program: Path, time_limit: float = TIME_LIMIT) -> None:
        self._program = program
        self._time_limit = time_limit
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    @property
    def kind(self) -> CodecKind:
        return CodecKind.ASCEND

    def check(self, name: str, rows: int, cols: int) -> None:
        """See Codec. Raises CodecError for a weight larger than the program takes."""
        if max(rows, cols) > MAX_DIMENSION:
            raise TooLargeError(
                f"{name}: is {rows} x {cols}, the engine's compression ends at {MAX_DIMENSION} per dimension; "
                "split it over more ranks (--tp) or keep it float"
            )

    def at_most_bytes(self, rows: int, cols: int) -> int:
        """See Codec. The program states no bound; what it cannot compress it stores in about its own size."""
        return rows * cols

    def compress(self, name: str, matrix: NDArray[np.int8], folder: Path) -> Compressed:
        """See Codec.

        Raises:
            UsageError: a folder whose path the program refuses.
            DeviceError: the program failed, ran too long, or wrote something else than the engine needs.
            SpaceError: the disk is full.
        """
        rows, cols = matrix.shape
        folder = folder.resolve()
        _check_path(folder)
        source, weight, index, info = (folder / stem for stem in ("input", "weight", "index", "info"))
        for output in (weight, index, info):
            output.unlink(missing_ok=True)
        k1, n1 = count_fractals(rows, cols)
        _write_input(source, to_nz(matrix))
        # k1, n1, isTight, k_value, n_value, compressType (0: low sparsity), isTiling
        numbers = (k1, n1, 1, 1, 1, 0, 0)
        self._run(name, [*map(str, numbers), *map(str, (source, weight, index, info))], folder)
        source.unlink()
        compressed_bytes = self._check_outputs(name, n1, k1, weight, index, info)
        info.write_bytes(np.array([TILING, TILING, cols, rows, 1], dtype="<i8").tobytes())
        return Compressed(
            (
                EncodedTensor(".weight", "I8", (compressed_bytes,), weight),
                EncodedTensor(".index", "I8", (index_bytes(rows, cols),), index),
                EncodedTensor(".info", "I64", (5,), info),
            ),
            None,
        )

    def stop(self) -> None:
        """Kill the running processes; later ones do not start."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill(process)

    def _run(self, name: str, arguments: list[str], folder: Path) -> None:
        log = folder / "log"
        with log.open("wb") as output:
            process = self._start([str(self._program), *arguments], folder, output.fileno())
            try:
                status = process.wait(self._time_limit)
            except BaseException as error:
                _kill(process)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise CompressProgramError(
                    f"{name}: {PROGRAM} did not finish in {self._time_limit:g} s{_last_words(log)}; "
                    "is the NPU busy or hung? see `npu-smi info`"
                ) from None
            finally:
                with self._lock:
                    self._running.discard(process)
        if status != 0:
            raise CompressProgramError(
                f"{name}: {PROGRAM} failed with exit status {status}{_last_words(log)}; "
                "source CANN's set_env.sh in this shell and see `npu-smi info`"
            )

    def _start(self, command: list[str], folder: Path, output: int) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_stopped:
                raise CompressProgramError(f"{PROGRAM}: was stopped")
            try:
                # Its own session, so that its helpers can be killed with it.
                process = subprocess.Popen(
                    command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                raise CompressProgramError(
                    f"{command[0]}: cannot be started ({error.strerror}); {how_to_build()}"
                ) from None
            self._running.add(process)
        return process

    def _check_outputs(self, name: str, n1: int, k1: int, weight: Path, index: Path, info: Path) -> int:
        """The size of the compressed weight; raises DeviceError unless all three files are what the engine needs."""

        def refuse(what: str) -> DeviceError:
            words = _last_words(info.parent / "log")
            return CompressProgramError(
                f"{name}: {PROGRAM} ended with status 0, but {what}{words}; its result cannot be used, "
                "check that the program fits this CANN and this NPU"
            )

        for output in (weight, index, info):
            if output.is_symlink() or not output.is_file():
                raise refuse(f"it wrote no {output.name} file")
        content = info.read_bytes()
        if len(content) != 12:
            raise refuse(f"its info file has {len(content)} bytes, wanted 12 (three numbers)")
        tiling_n, tiling_k, announced = (int(value) for value in np.frombuffer(content, dtype="<u4"))
        if (tiling_n, tiling_k) != (TILING, TILING):
            raise refuse(
                f"its tilings are {tiling_n} and {tiling_k}, and the engine's kernel knows only {TILING} and {TILING}"
            )
        found, padded = weight.stat().st_size, n1 * ROWS * k1 * COLS
        if found != announced:
            raise refuse(f"its weight file has {found} bytes, its info file says {announced}")
        if not 0 < found <= padded:
            raise refuse(f"its weight file has {found} bytes, wanted 1 to {padded}")
        wanted = index_bytes(n1 * ROWS, k1 * COLS)
        if index.stat().st_size != wanted:
            raise refuse(f"its index file has {index.stat().st_size} bytes, wanted {wanted}")
        return found


def index_bytes(rows: int, cols: int) -> int:
    """Length of the index of a weight [rows, cols]: 8 bytes per 8 x 8 fractals of 16 x 32."""
    return 8 * -(-rows // (8 * ROWS)) * -(-cols // (8 * COLS))


def _check_path(folder: Path) -> None:
    text = str(folder)
    if not _PATH.fullmatch(text) or len(folder.parts) > _MAX_DEPTH - 1:
        raise UsageError(
            f"{text}: {PROGRAM} takes only paths of letters, digits, `_`, `-` and `.`, at most {_MAX_DEPTH} folders deep; "
            "choose another --save_directory"
        )


def _write_input(path: Path, nz: NDArray[np.int8]) -> None:
    try:
        with path.open("wb") as file:
            file.write(np.ascontiguousarray(nz).data)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise SpaceError(f"{path}: {nz.nbytes} bytes are to be written, but its disk is full; make room") from None
        raise


def _last_words(log: Path) -> str:
    """The last line that the program printed, in brackets, or nothing."""
    lines = log.read_bytes()[-4000:].decode("utf-8", "replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" (it said: {''.join(c for c in last if c.isprintable())[:200]})" if last else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, if it still runs, with everything it started."""
    if process.poll() is None:
        # It may have ended since, and the thread that waits for it have noticed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
