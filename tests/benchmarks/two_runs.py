"""Two runs at once into one folder: over all verbs that write, with what users do meanwhile.

    python tests/benchmarks/two_runs.py --trials 200

In each trial two processes write the same folder, the second one up to `--spread` seconds after the first, with or without
--overwrite and --resume; in some, a user makes or fills the folder meanwhile, or a killed run lies there. What must hold:

- a run that ends with exit code 0 has left its whole result, byte for byte that of a run alone, unless the other one, which
  also ended with 0 and was asked to overwrite, has replaced it by the same;
- exit codes are 0, 2 or 5, nothing else;
- a user's file is still there, whatever happened;
- nothing hidden is left where no sentence said so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.command_line import run
from helpers import tree
from make_checkpoint import Size, make_checkpoint

from glmq.model.tiny import TINY_PICTURES

ALLOWED = (0, 2, 5)
THESIS = "thesis.txt"


@dataclass(frozen=True)
class Verb:
    """A command that writes a folder."""

    name: str
    command: tuple[object, ...]
    """Without the output."""
    option: str
    """That names the output."""
    can_resume: bool
    whole: dict[str, str]
    """Files and digests of a run alone."""
    seconds: float
    """That a run alone takes."""

    def arguments(self, out: Path, *extra: str) -> list[object]:
        return [*self.command, self.option, out, *extra]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    codes: tuple[int, int]
    faults: tuple[str, ...]


def measure(name: str, command: Sequence[object], option: str, folder: Path, *, can_resume: bool) -> Verb:
    """Run a verb alone, for its bytes and its time. In this process, so that its children need not import anything."""
    out = folder / f"alone-{name}"
    for _ in range(2):  # the second one is timed, without imports
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        result = run(*command, option, out)
        assert result.exit_code == 0, result.output
    return Verb(name, tuple(command), option, can_resume, tree(out), time.perf_counter() - started)


def child(arguments: Sequence[object], delay: float, said: Path) -> int:
    """Start `glmq` in a forked process after `delay` seconds; returns its process id."""
    process = os.fork()
    if process:
        return process
    time.sleep(delay)
    result = run(*arguments)
    said.write_text(result.stderr)
    os._exit(result.exit_code)


def wait(process: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def trial(verb: Verb, folder: Path, spread: float, rng: random.Random) -> Outcome:
    """Two runs of one verb into one folder, perhaps with a user in between."""
    out, parent = folder / "place" / "out", folder / "place"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    extras = [["--overwrite"], [], ["--resume"]] if verb.can_resume else [["--overwrite"], []]
    chosen = [rng.choice(extras) for _ in range(2)]
    theirs: Path | None = None
    match rng.choice(["nothing", "nothing", "before", "during", "hidden", "killed"]):
        case "before":  # what --overwrite may replace
            out.mkdir()
            (out / "old.txt").write_text("old")
        case "hidden":  # a folder that only has our name
            theirs = parent / ".out.partial" / THESIS
        case "killed":
            killed = child(verb.arguments(out), 0.0, folder / "said-killed")
            time.sleep(rng.uniform(0.1, 1.1) * verb.seconds)
            os.kill(killed, signal.SIGKILL)
            os.waitpid(killed, 0)
        case "during":
            theirs = out / THESIS
        case _:
            pass
    if theirs is not None and theirs.parent != out:
        theirs.parent.mkdir()
        theirs.write_text("years of work")
    said = [folder / "said-1", folder / "said-2"]
    for path in said:
        path.unlink(missing_ok=True)
    started = [child(verb.arguments(out, *chosen[0]), 0.0, said[0])]
    started.append(child(verb.arguments(out, *chosen[1]), rng.uniform(0, spread), said[1]))
    is_theirs = theirs is not None
    if theirs is not None and theirs.parent == out:
        time.sleep(rng.uniform(0.1, 1.2) * verb.seconds)
        try:
            out.mkdir(exist_ok=True)
            theirs.write_text("years of work")
        except OSError:  # a finished run took the place in between
            is_theirs = False
    codes = (wait(started[0]), wait(started[1]))
    return Outcome(codes, tuple(_faults(verb, out, codes, chosen, theirs if is_theirs else None, said)))


def _faults(
    verb: Verb, out: Path, codes: tuple[int, int], chosen: list[list[str]], theirs: Path | None, said: list[Path]
) -> list[str]:
    texts = [path.read_text() for path in said]
    faults = [f"exit code {code}: {text}" for code, text in zip(codes, texts) if code not in ALLOWED]
    found = tree(out) if out.is_dir() else {}
    ours = {name: digest for name, digest in found.items() if name != THESIS}
    if 0 in codes and ours != verb.whole:
        faults.append(f"exit code 0, but the result is not whole: {sorted(set(verb.whole) - set(ours))[:3]}")
    may_replace = (
        ["--overwrite"] in chosen and theirs is not None and theirs.parent == out
    )  # if it was there when that began
    if theirs is not None and not may_replace and not any(path.name == THESIS for path in out.parent.rglob("*")):
        faults.append("the user's file is gone")
    hidden = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
    is_explained = any(".out.partial" in text for text in texts)
    if hidden and not is_explained:
        faults.append(f"left behind: {hidden}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="over all verbs together")
    parser.add_argument(
        "--spread", type=float, default=2.0, help="the second run starts at most this many seconds later"
    )
    parser.add_argument("--model", type=Path, help="float weights; without it a model of 2 random text layers")
    parser.add_argument("--images", type=Path, default=TINY_PICTURES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(args.seed)
    counts: Counter[tuple[str, tuple[int, int]]] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="two-runs-") as name:
        folder = Path(name)
        if args.model is None:
            make_checkpoint(folder / "model", Size())
        few = ["--calib-images", args.images, "--limit", 1, "--no-texts", "-q"]
        model = ["--model_path", args.model or folder / "model"]
        stats, packed = folder / "alone-calibrate", folder / "alone-compress"
        sparse = ["--w_bit", 4, "--is_lowbit", "True", "--use_sigma", "True", "--torch_dtype", "fp16", "-q"]
        verbs = [measure("calibrate", ["calibrate", *model, *few], "--stats", folder, can_resume=True)]
        with_stats = ["quantize", *model, "--stats", stats, *sparse]
        verbs.append(measure("quantize", with_stats, "--save_directory", folder, can_resume=True))
        alone = ["quantize", *model, *few, *sparse]
        verbs.append(measure("quantize, own statistics", alone, "--save_directory", folder, can_resume=True))
        packing = ["compress", "--model_path", folder / "alone-quantize", "--codec", "portable", "-q"]
        verbs.append(measure("compress", packing, "--save_directory", folder, can_resume=False))
        unpacking = ["compress", "--decompress", "--model_path", packed, "-q"]
        verbs.append(measure("decompress", unpacking, "--save_directory", folder, can_resume=False))
        for verb in verbs:
            print(f"{verb.name}: {verb.seconds:.1f} s alone, {len(verb.whole)} files", flush=True)
        for number in range(args.trials):
            verb = verbs[number % len(verbs)]
            outcome = trial(verb, folder, min(args.spread, 1.5 * verb.seconds), rng)
            counts[verb.name, tuple(sorted(outcome.codes))] += 1
            for fault in outcome.faults:
                faults += 1
                print(f"trial {number}, {verb.name}, {outcome.codes}: {fault}", flush=True)
    print("\n| verb | exit codes | trials |\n|---|---|---|")
    for (name, codes), count in sorted(counts.items()):
        print(f"| {name} | {codes[0]} and {codes[1]} | {count} |")
    print(f"\n{sum(counts.values())} trials, {faults} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
