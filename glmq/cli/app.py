"""The Typer app. `glmq --help` imports neither torch nor transformers: each command imports its engine when it runs."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from glmq.cann import AUTOLOAD
from glmq.cli.ask import ask
from glmq.cli.calibrate import calibrate
from glmq.cli.clean import clean
from glmq.cli.command import CONTEXT, GlmqCommand, GlmqGroup
from glmq.cli.complaint import complain, describe_failure
from glmq.cli.compress import compress
from glmq.cli.demo import demo
from glmq.cli.doctor import doctor
from glmq.cli.inspect import inspect
from glmq.cli.quantize import quantize
from glmq.cli.streams import mend_streams
from glmq.cli.sweep import sweep
from glmq.cli.verify import verify
from glmq.version import __version__

# Large tensors in huge pages: a fresh one costs a quarter of the time. torch reads this when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread of torch's that waits for another spins for milliseconds before it sleeps. Where another program wants the core too,
# it takes the time of the one that it waits for: with one of two cores busy, runs took 1.4 to 4 times as long. For libgomp.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# torch_npu is imported where an NPU is asked for: left to torch, a machine without CANN could not even run on its CPU.
os.environ[AUTOLOAD] = "0"

app = typer.Typer(
    cls=GlmqGroup,
    help="Quantize and compress GLM-4.1V and GLM-4.6V-Flash for Huawei Ascend NPUs.",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
    rich_markup_mode=None,
)

for command in (calibrate, quantize, sweep, compress, inspect, verify, ask, demo, doctor, clean):
    app.command(cls=GlmqCommand, context_settings=CONTEXT)(command)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"glmq {__version__}")
    for package in ("torch", "transformers", "safetensors", "torch-npu"):
        try:
            typer.echo(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{package} is not installed")
    raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the versions of glmq and its libraries.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Quantize and compress GLM-4.1V and GLM-4.6V-Flash for Huawei Ascend NPUs."""


def main() -> None:
    """The entry point of the `glmq` program."""
    mend_streams()
    # torch and transformers are a million objects that stay. Looking for garbage among them every 700 allocations, and once
    # more at the end, takes a quarter of the start and the whole of the second that a process takes to leave.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    # Where the parent ignores it, as some supervisors do, the system forgets how a child ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        app(prog_name="glmq")
    except OSError as error:  # of stdout, which does not take a help or a list of versions
        code, message, exit_code = describe_failure(error)
        complain(code, message, json_wanted="--json" in sys.argv, debug="--debug" in sys.argv)
        sys.exit(exit_code)
