"""What a quantization leaves beside its weights to describe itself: report, table, page and model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import psutil

from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import cover_new_files
from glmq.checkpoint.json_file import JsonObject, write_whole
from glmq.machine import PACKAGES, command_line, processor_name, version_of
from glmq.quantization.report import CalibrationFacts, Report, RunFacts, report_document, write_report
from glmq.quoting import file_text
from glmq.ranks import Ranks
from glmq.records import REPORT, PassTime
from glmq.reporting.model_card import model_card
from glmq.reporting.page import write_page
from glmq.reporting.quantization_page import quantization_page
from glmq.version import __version__

CARD: Final = "README.md"
"""The model card; that of the float model is not copied, so it replaces nothing."""
PAGE: Final = f"{REPORT}.html"
SETTINGS: Final = ("compute_dtype", "max_pixels", "wide_moments", "generate")


def calibration_facts(statistics: Statistics) -> CalibrationFacts:
    """What the statistics say of where they come from."""
    settings = {key: statistics.manifest.get(key) for key in SETTINGS}
    return CalibrationFacts(statistics.samples_digest, tuple(statistics.samples()), settings)


def run_facts(model: Path, statistics: Path | None, output: Path, passes: Sequence[PassTime]) -> RunFacts:
    """This run, as it is now."""
    versions = {"glmq": __version__, "Python": platform.python_version()}
    versions |= {package: found for package in PACKAGES if (found := version_of(package)) is not None}
    return RunFacts(
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=file_text(command_line()),
        model=file_text(str(model)),
        statistics=None if statistics is None else file_text(str(statistics)),
        output=file_text(str(output)),
        platform=platform.platform(),
        processor=processor_name(),
        cores=psutil.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        versions=versions,
        passes=tuple(passes),
    )


def describe(report: Report, folder: Path | None, ranks: Ranks) -> JsonObject:
    """Rank 0 writes all of it into `folder`, if one is given, and the checksums again; every rank gets what its report says."""
    document = report_document(report)
    if ranks.place.is_first and folder is not None:
        write_report(folder, document, report.linears)
        write_page(folder / PAGE, quantization_page(report))
        write_whole(folder / CARD, model_card(report).encode(errors="backslashreplace"))
        cover_new_files(folder)
    found: JsonObject = json.loads(ranks.all_gather(json.dumps(document) if ranks.place.is_first else "")[0])
    return found
