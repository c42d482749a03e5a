"""glmq.log: what a run did, kept in its hidden work folder until the output is whole.

An interrupted run leaves it there, and a resumed one goes on writing it. After a failure that nobody foresaw a copy lies
beside the output, so that there is something to send with a bug report.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from glmq.checkpoint.workplace import Workplace
from glmq.errors import GlmqError
from glmq.jobs.watcher import Watcher
from glmq.machine import logging_to
from glmq.ranks import Ranks

RUN_LOG: Final = "glmq.log"
"""In the work folder while the run lasts; ranks above 0 add their number."""

log = logging.getLogger(__name__)


@contextmanager
def run_log(folder: Path, target: Path, options: object, ranks: Ranks, watcher: Watcher) -> Iterator[None]:
    """Write what the loggers of glmq say into `folder`, and remove it again if nothing goes wrong.

    Args:
        folder: the hidden work folder.
        target: the output folder, beside which the copy of an unforeseen failure lies.
        options: of the run; its repr is written down.
        ranks: those above 0 write files of their own.
        watcher: is told where the copy lies.
    """
    place = ranks.place
    path = folder / (RUN_LOG if place.is_first else f"{RUN_LOG}.{place.rank}")
    with logging_to(path, logging.INFO):
        log.info("options: %r", options)
        try:
            yield
        except BaseException as error:
            log.exception("stopped by %s", type(error).__name__)
            if isinstance(error, Exception) and not isinstance(error, GlmqError):
                watcher.note(_keep_copy(path, Workplace.of(target).home / f".{target.name}.{path.name}"))
            raise
    ranks.barrier()  # nobody writes any more
    if place.is_first:
        for old in folder.glob(f"{RUN_LOG}*"):  # of an interrupted run there may be more
            old.unlink()


def _keep_copy(path: Path, copy: Path) -> str:
    """Copy the log to where it outlives its folder; returns what to tell the user."""
    try:
        shutil.copyfile(path, copy)
    except OSError as error:  # of the disk or folder that may have stopped the run itself, which counts more
        return f"the log of this run cannot be kept in {copy} ({error.strerror})"
    return f"the log of this run is kept in {copy}"
