"""Kill every verb that writes at its first change of the disk, its second, and so on; run it again; compare with a whole run.

    python tests/benchmarks/kill_syscalls.py --kills 1000

A preloaded library, kill_shim.c, counts the system calls of a run that create, write, sync, rename, link or remove anything
beside the output, and kills the run (SIGKILL) right before one of them, right after it, or with half of its bytes written.
Then the verb is run again, with `resume` where it has that. What must hold:

- the second run ends well, or says in one sentence that the killed one had put its result in its place already;
- a verb without `resume` may refuse to drop a finished result, and ends well with `overwrite`;
- everything beside the output, names, modes and bytes, is then what an unbroken run leaves;
- the former contents of an output that is replaced are there until the new ones are.

Every run is a fork of this process, which has everything imported. Needs Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import W8A8S, calibrate, quantize, tree
from make_checkpoint import Size, make_checkpoint

import glmq
from glmq.errors import GlmqError
from glmq.model.tiny import TINY_PICTURES

SHIM: Final = "GLMQ_KILL_SHIM"
"""Set for the second process, which runs with the library loaded: its path."""
OLD: Final = "old.txt"
IN_PLACE: Final = ("had put it in its place", "is not empty")
"""What a second run says where the first was killed when only tidying up was left."""


class Moment(IntEnum):
    """When a system call kills; the numbers are those of kill_shim.c."""

    BEFORE = 0
    AFTER = 1
    HALFWAY = 2


@dataclass(frozen=True)
class Verb:
    """A function of the library that writes a folder."""

    name: str
    work: Callable[[Path, bool, bool], object]
    """Takes the output, and whether to resume and to overwrite."""
    resumes: bool = True
    replaces: bool = False
    """An older output lies in the place."""


@dataclass(frozen=True)
class Death:
    """Where a run is killed."""

    number: int
    """Of the system call, from 1."""
    moment: Moment


@dataclass
class Tally:
    """How the kills of one verb went."""

    verb: str
    calls: Counter[str] = field(default_factory=Counter)
    """System calls of an unbroken run, by name."""
    ends: Counter[str] = field(default_factory=Counter)
    """Kills, by how the second run ended."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Bench:
    """A folder with nothing in it but the output, one on another disk, and files elsewhere for what the runs say."""

    def __init__(self, folder: Path, other_disk: Path) -> None:
        self.place = folder / "place"
        self.out = self.place / "out"
        self._work = other_disk / "work"
        self._lines, self._said = folder / "lines", folder / "said"
        self._shim = ctypes.CDLL(os.environ[SHIM])

    def clear(self, verb: Verb) -> None:
        """As it is before a run."""
        for folder in (self.place, self._work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if verb.replaces:
            self.out.mkdir()
            (self.out / OLD).write_text("old")

    def run(self, verb: Verb, *, resume: bool = False, overwrite: bool = False, death: Death | None = None) -> int:
        """Run the verb in a forked process that dies as told; returns its exit code, below 0 for a signal."""
        process = os.fork()
        if process:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        lines = os.open(self._lines, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        number, moment = (death.number, death.moment) if death else (0, Moment.BEFORE)
        folders = os.fsencode(self.place), os.fsencode(self._work)
        self._shim.kill_shim_arm(*folders, ctypes.c_long(number), int(moment), lines)
        code, said = 0, ""
        try:
            verb.work(self.out, resume, overwrite or verb.replaces)
        except GlmqError as error:
            code, said = error.exit_code, str(error)
        except BaseException as error:
            code, said = 1, repr(error)
        self._said.write_text(said)
        os._exit(code)

    def said(self) -> str:
        """The sentence of the last run that was not killed."""
        return self._said.read_text()

    def calls(self) -> list[str]:
        """The system calls of the last run: name and path."""
        return self._lines.read_text().splitlines()

    def listing(self) -> dict[str, tuple[str, str]]:
        """Everything beside the output and on the other disk: name, mode and digest."""
        return {
            name: (stat.filemode((folder / name).lstat().st_mode), digest)
            for folder in (self.place, self._work)
            for name, digest in tree(folder).items()
        }


def build(folder: Path) -> Path:
    """Compile the library."""
    target = folder / "kill_shim.so"
    source = Path(__file__).with_name("kill_shim.c")
    subprocess.run(["cc", "-O1", "-std=gnu11", "-shared", "-fPIC", "-o", target, source, "-ldl"], check=True)
    return target


def verbs(folder: Path, other_disk: Path) -> Iterator[Verb]:
    """All that write, each in the smallest run that has all of its steps, and what they need."""
    elsewhere = other_disk / "work"
    model, stats, sparse, packed = (folder / name for name in ("model", "stats", "sparse", "packed"))
    make_checkpoint(model, Size())
    few = {"limit": 2, "texts": False}
    calibration = glmq.CalibrationOptions(images=TINY_PICTURES, limit=2, texts=False)
    shards = {"shard_bytes": 500_000, **W8A8S}
    calibrate(model, stats, TINY_PICTURES, **few)
    quantize(model, stats, sparse, **shards)
    glmq.compress(sparse, out=packed, tp=2, codec="portable")

    def measured(out: Path, resume: bool, overwrite: bool) -> object:
        return calibrate(model, out, TINY_PICTURES, resume=resume, **few)

    def answered(out: Path, resume: bool, overwrite: bool) -> object:
        return calibrate(model, out, TINY_PICTURES, resume=resume, limit=1, texts=False, generate=3)

    def quantized(source: Path | None) -> Callable[[Path, bool, bool], object]:
        def work(out: Path, resume: bool, overwrite: bool) -> object:
            given = None if source is None else calibration
            chosen = calibration if given is None else glmq.CalibrationOptions()
            return quantize(model, source, out, calibration=chosen, resume=resume, overwrite=overwrite, **shards)

        return work

    def kept(out: Path, resume: bool, overwrite: bool) -> object:
        return quantize(model, out.parent / "stats", out, calibration=calibration, resume=resume, **shards)

    def compressed(out: Path, resume: bool, overwrite: bool) -> object:
        return glmq.compress(sparse, out=out, tp=2, codec="portable", overwrite=overwrite)

    def restored(out: Path, resume: bool, overwrite: bool) -> object:
        return glmq.restore(packed, out=out, overwrite=overwrite)

    def restored_from_elsewhere(out: Path, resume: bool, overwrite: bool) -> object:
        return glmq.restore(packed, out=out, overwrite=overwrite, work_dir=elsewhere)

    def measured_elsewhere(out: Path, resume: bool, overwrite: bool) -> object:
        options = glmq.CalibrationOptions(images=TINY_PICTURES, limit=1, texts=False, work_dir=elsewhere)
        return glmq.calibrate(model, out=out, options=options, resume=resume, overwrite=overwrite)

    yield Verb("calibrate", measured)
    yield Verb("calibrate, answers generated", answered)
    yield Verb("quantize with statistics", quantized(stats))
    yield Verb("quantize with statistics, replacing", quantized(stats), replaces=True)
    yield Verb("quantize with its own statistics", quantized(None))
    yield Verb("quantize with its own statistics, kept", kept)
    yield Verb("compress", compressed, resumes=False)
    yield Verb("compress, replacing", compressed, resumes=False, replaces=True)
    yield Verb("decompress", restored, resumes=False)
    yield Verb("calibrate on another disk", measured_elsewhere)
    yield Verb("calibrate on another disk, replacing", measured_elsewhere, replaces=True)
    yield Verb("decompress on another disk", restored_from_elsewhere, resumes=False)


def deaths(calls: Sequence[str], kills: int) -> list[Death]:
    """Every moment of every call; of more than `kills` of them so many.

    A third are the first ones, while the folder is made, a third the last, while it is put in its place and things are tidied
    up, and a third are evenly spread over the rest.
    """
    every = [
        Death(number, moment)
        for number, call in enumerate(calls, 1)
        for moment in Moment
        if moment is not Moment.HALFWAY or call.split(" ")[0] in ("write", "pwrite", "pwrite64")
    ]
    if len(every) <= kills:
        return every
    edge, spread = kills // 3, kills - kills // 3 * 2
    middle = every[edge : len(every) - edge]
    return (
        every[:edge] + [middle[index * len(middle) // spread] for index in range(spread)] + every[len(every) - edge :]
    )


def try_verb(bench: Bench, verb: Verb, kills: int, *, twice: bool) -> Tally:
    """All kills of one verb, after an unbroken run; `twice`: the second run is killed at its call of that number too."""
    tally, started = Tally(verb.name), time.perf_counter()
    bench.clear(verb)
    assert bench.run(verb) == 0, bench.said()
    calls, whole = bench.calls(), bench.listing()
    tally.calls = Counter(call.split(" ")[0] for call in calls)
    for death in deaths(calls, kills):
        bench.clear(verb)
        fault, end = "", "not killed"
        if bench.run(verb, death=death) != -signal.SIGKILL:
            fault = f"was not killed: {bench.said()}"
        else:
            place = bench.calls()[-1].replace(f"{bench.place}/", "")
            if verb.replaces and not (bench.out / OLD).exists() and tree(bench.out).keys() < set(_below_out(whole)):
                fault = "neither the former contents nor the new ones are there"
            if twice:
                bench.run(verb, resume=verb.resumes, death=death)
            end = run_again(bench, verb)
            if not fault and bench.listing() != whole:
                fault = f"{end}, but {_difference(whole, bench.listing())}"
        tally.ends["failure" if fault else end] += 1
        if fault:
            tally.faults.append(f"{death.moment.name.lower()} call {death.number}, {place}: {fault}"[:400])
            print(f"  {verb.name}, {tally.faults[-1]}", flush=True)
    tally.seconds = time.perf_counter() - started
    return tally


def run_again(bench: Bench, verb: Verb) -> str:
    """Run a killed verb again as its user would; returns how that ended."""
    code = bench.run(verb, resume=verb.resumes)
    if code == 0:
        return "run again"
    if code == 2 and any(text in bench.said() for text in IN_PLACE):
        return "was in place"
    if code == 2 and not verb.resumes and "pass --overwrite to start again" in bench.said():
        code = bench.run(verb, overwrite=True)
        if code == 0:
            return "overwritten"
    return f"exit code {code}: {bench.said()}"


def _below_out(whole: dict[str, tuple[str, str]]) -> list[str]:
    return [name.removeprefix("out/") for name in whole if name.startswith("out/")]


def _difference(whole: dict[str, tuple[str, str]], found: dict[str, tuple[str, str]]) -> str:
    more, less = sorted(found.keys() - whole.keys()), sorted(whole.keys() - found.keys())
    other = sorted(name for name in whole.keys() & found.keys() if whole[name] != found[name])
    return f"there is also {more[:4]}, missing is {less[:4]}, changed is {[(n, whole[n][0], found[n][0]) for n in other[:3]]}"


def report(tallies: Sequence[Tally]) -> str:
    """The table."""
    ends = ("run again", "was in place", "overwritten", "failure")
    lines = [
        "| verb | system calls | kills | run again to the same bytes | whole already | with `overwrite` | failures |",
        "|---|---|---|---|---|---|---|",
    ]
    for tally in tallies:
        counts = " | ".join(str(tally.ends[end]) for end in ends)
        lines.append(f"| {tally.verb} | {tally.calls.total()} | {tally.ends.total()} | {counts} |")
    every: Counter[str] = sum((tally.ends for tally in tallies), Counter())
    calls: Counter[str] = sum((tally.calls for tally in tallies), Counter())
    lines.append(f"| all | {calls.total()} | {every.total()} | {' | '.join(str(every[end]) for end in ends)} |")
    lines.append(f"\nof the calls: {', '.join(f'{count} {name}' for name, count in calls.most_common())}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000, help="of each verb at most; more than its calls take: all")
    parser.add_argument("--twice", action="store_true", help="kill the second run too, and run it a third time")
    parser.add_argument("--other-disk", type=Path, default="/dev/shm", help="a folder on another file system")
    parser.add_argument("--verb", default="", help="only verbs whose name begins so")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kill-syscalls-") as name,
        tempfile.TemporaryDirectory(prefix="kill-syscalls-", dir=args.other_disk) as other,
    ):
        if SHIM not in os.environ:
            shim = str(build(Path(name)))
            environment = os.environ | {SHIM: shim, "LD_PRELOAD": shim, "TOKENIZERS_PARALLELISM": "false"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
        torch.set_num_threads(1)  # threads do not survive a fork
        tallies: list[Tally] = []
        bench = Bench(Path(name).resolve(), Path(other).resolve())
        for verb in verbs(Path(name), Path(other)):
            if verb.name.startswith(args.verb):
                tallies.append(try_verb(bench, verb, args.kills, twice=args.twice))
                print(f"{verb.name}: {tallies[-1].ends.total()} kills, {tallies[-1].seconds:.0f} s", flush=True)
    print(f"\n{report(tallies)}")
    sys.exit(1 if any(tally.faults for tally in tallies) else 0)


if __name__ == "__main__":
    main()
