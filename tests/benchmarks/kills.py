"""Interrupt `glmq quantize`, calibration included, again and again; resume it each time; compare with an unbroken run.

    python tests/benchmarks/kills.py --kills 60

Kinds of interruption, each in forked processes that really die:
- at every boundary: kill -9 right before and right after each journal line, one after the other in one chain of resumes;
- inside blocks: kill -9 after a random time, until a run comes to its end; as many such chains as the kills need;
- Ctrl-C and SIGTERM after random times, which must also say the sentence and leave by exit code 130 and 143;
- a full disk (as root, on a small tmpfs): a file eats the rest of it in the middle; exit code 5; then it goes away again.

On the way, between two kills: the command without --resume must refuse and name --resume; with another option it must refuse
and name both values; the output's own name must never exist before the end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.command_line import run
from helpers import tree

from glmq.checkpoint.journal import Journal
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES

SEED = [
    "--w_bit",
    "4",
    "--is_lowbit",
    "True",
    "--use_sigma",
    "True",
    "--torch_dtype",
    "fp16",
    "--part_file_size",
    "1MB",
]


@dataclass
class Trial:
    """One chain of interrupted runs that ended with a whole output."""

    kind: str
    places: Counter[str] = field(default_factory=Counter)
    """How often a run was interrupted while it was at this pass."""
    seconds: float = 0.0

    @property
    def interruptions(self) -> int:
        return self.places.total()


class Bench:
    """A folder to work in and the command that is interrupted."""

    def __init__(self, folder: Path, model: Path, pictures: Path, limit: int) -> None:
        self.out = folder / "out"
        self.command = ["quantize", "--model_path", model, "--save_directory", self.out, "--calib_images", pictures]
        self.command += ["--limit", limit, *SEED, "-q"]
        for _ in range(2):  # the second one is timed, without imports
            shutil.rmtree(self.out, ignore_errors=True)
            started = time.perf_counter()
            _, status = os.waitpid(self.child(), 0)
            assert status == 0, self.said()
            self.seconds = time.perf_counter() - started
        self.whole = tree(self.out)
        shutil.rmtree(self.out)

    def child(self, *, before: Callable[[], None] = lambda: None) -> int:
        """Start the command with --resume in a forked process; returns its process id. It leaves by its exit code."""
        child = os.fork()
        if child:
            return child
        before()
        result = run(*self.command, "--resume")
        if result.exit_code:
            (self.out.parent / "said").write_text(result.stderr)
        os._exit(result.exit_code)

    def said(self) -> str:
        """What the last child that failed printed."""
        return (self.out.parent / "said").read_text().strip()

    def place(self) -> str:
        """Which pass an interrupted run is in; `nothing` if no block is finished."""
        work = self.out.parent / ".out.partial"
        lines = lines_of(work)
        if any(line.startswith('{"block": "model.') for line in lines):
            return "quantize"
        if (work / "statistics").exists():
            return "rate"
        return "calibrate" if len(lines_of(work / ".statistics.partial")) > 1 else "nothing"

    def look_around(self) -> None:
        """What must hold between an interruption and the resume."""
        assert not self.out.exists(), "an interrupted run left an output"
        if self.place() == "nothing":
            return
        said = self._must(2, *self.command)
        assert "run the same command with --resume to continue it" in said, said
        said = self._must(2, *self.command, "--resume", "--max-pixels", 50000)
        for text in ("had max pixels", "None", "this one has", "50000"):
            assert text in said, said

    def check_whole(self) -> None:
        """The output of a resumed run is that of an unbroken one, and nothing else is left. Takes it away."""
        assert tree(self.out) == self.whole, "other bytes than an unbroken run"
        left = sorted(path.name for path in self.out.parent.iterdir())
        assert left in (["out"], ["out", "said"]), left
        shutil.rmtree(self.out)

    def _must(self, code: int, *command: object) -> str:
        result = run(*command)
        assert result.exit_code == code, f"exit code {result.exit_code}: {result.output}"
        return result.stderr


def lines_of(folder: Path) -> list[str]:
    """The journal lines of an unfinished folder."""
    path = folder / "journal.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def die_at(record: int, *, after: bool) -> Callable[[], None]:
    """Kill this process right before or after it writes its journal line number `record`."""

    def prepare() -> None:
        original, count = Journal.record, 0

        def record_and_die(journal: Journal, *args: object) -> None:
            nonlocal count
            count += 1
            if count == record and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(journal, *args)  # type: ignore[arg-type]
            if count == record:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.record = record_and_die  # type: ignore[method-assign]

    return prepare


def boundaries(bench: Bench) -> Trial:
    """Every journal line of one chain: killed right before it is written, killed again right after."""
    trial, started, after = Trial("kill -9 at boundaries"), time.perf_counter(), False
    while True:
        _, status = os.waitpid(bench.child(before=die_at(1, after=after)), 0)
        if not os.WIFSIGNALED(status):
            break
        trial.places[bench.place()] += 1
        bench.look_around()
        after = not after
    bench.check_whole()
    trial.seconds = time.perf_counter() - started
    return trial


def at_random(bench: Bench, kind: str, sent: signal.Signals, code: int, rng: random.Random) -> Trial:
    """Interrupted after random times until a run comes to its end."""
    trial, started = Trial(kind), time.perf_counter()
    while True:
        child = bench.child()
        deadline = time.perf_counter() + rng.uniform(0.03, 0.35) * bench.seconds
        status = 0
        while time.perf_counter() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.005)
        else:
            os.kill(child, sent)
            done, status = os.waitpid(child, 0)
        if status == 0:
            break
        if sent is signal.SIGKILL:
            assert os.WIFSIGNALED(status), status
        else:
            assert os.WEXITSTATUS(status) == code, (status, bench.said())
        trial.places[bench.place()] += 1
        bench.look_around()
    bench.check_whole()
    trial.seconds = time.perf_counter() - started
    return trial


def full_disk(bench: Bench, lines: int) -> Trial:
    """A file eats the rest of the disk after some journal lines; later it is gone again."""
    trial, started = Trial("full disk"), time.perf_counter()
    ballast = bench.out.parent / "ballast"

    def prepare() -> None:
        original, count = Journal.record, 0

        def record_and_fill(journal: Journal, *args: object) -> None:
            nonlocal count
            original(journal, *args)  # type: ignore[arg-type]
            count += 1
            if count == lines:
                with ballast.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass

        Journal.record = record_and_fill  # type: ignore[method-assign]

    _, status = os.waitpid(bench.child(before=prepare), 0)
    assert os.WEXITSTATUS(status) == 5, (status, bench.said())
    assert ballast.exists(), bench.said()
    ballast.unlink()
    print(f"    {bench.said()}", flush=True)
    trial.places[bench.place()] += 1
    bench.look_around()
    _, status = os.waitpid(bench.child(), 0)
    assert status == 0, status
    bench.check_whole()
    trial.seconds = time.perf_counter() - started
    return trial


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    folder = Path(tempfile.mkdtemp(prefix="kills-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="kill -9 at least this often, boundaries included")
    parser.add_argument("--signals", type=int, default=4, help="Ctrl-C and SIGTERM at least this often each")
    parser.add_argument("--disk-megabytes", type=int, default=40, help="size of the disk that fills up")
    parser.add_argument("--model", type=Path, default=TINY_CHECKPOINT)
    parser.add_argument("--images", type=Path, default=TINY_PICTURES)
    parser.add_argument("--limit", type=int, default=4, help="images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(args.seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        bench = Bench(Path(name), args.model, args.images, args.limit)
        print(f"unbroken: {bench.seconds:.1f} s, {len(bench.whole)} files", flush=True)

        def add(trial: Trial) -> None:
            trials.append(trial)
            print(f"  {trial.kind}: {dict(trial.places)}, {trial.seconds:.0f} s, same bytes", flush=True)

        if args.kills:
            add(boundaries(bench))
        while sum(t.interruptions for t in trials if t.kind.startswith("kill")) < args.kills:
            add(at_random(bench, "kill -9 inside blocks", signal.SIGKILL, 0, rng))
        for kind, sent, code in (("Ctrl-C", signal.SIGINT, 130), ("SIGTERM", signal.SIGTERM, 143)):
            while sum(t.interruptions for t in trials if t.kind == kind) < args.signals:
                add(at_random(bench, kind, sent, code, rng))
    if os.geteuid() == 0:
        with small_disk(args.disk_megabytes) as folder:
            bench = Bench(folder, args.model, args.images, args.limit)
            for lines in (2, 7, 13, 20):
                add(full_disk(bench, lines))
    else:
        print("no root: a full disk was not tried")
    print("\n| interruption | chains | first block | calibrate | rate | quantize | all | whole, with the same bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(trial.kind for trial in trials):
        same = [trial for trial in trials if trial.kind == kind]
        places = sum((trial.places for trial in same), Counter())
        cells = " | ".join(str(places[name]) for name in ("nothing", "calibrate", "rate", "quantize"))
        print(f"| {kind} | {len(same)} | {cells} | {places.total()} | {len(same)} of {len(same)} |")


if __name__ == "__main__":
    main()
