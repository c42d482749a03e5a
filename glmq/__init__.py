"""glmq: quantize and compress GLM-4.1V and GLM-4.6V-Flash for Ascend NPUs.

    import glmq

    stats = glmq.calibrate("GLM-4.1V", images="photos", out="stats")
    result = glmq.quantize("GLM-4.1V", stats, out="w8a8s", recipe=glmq.Recipe.w8a8s(sigma=3.0))
    packed = glmq.compress("w8a8s", out="w8a8sc", tp=2, codec="portable")
    report = glmq.verify("w8a8s", reference="GLM-4.1V")
    assert report.passed, report.findings

Each function does what the command of its name does, prints nothing and returns a record. `watch=` takes a callable that
receives what happens meanwhile; errors are those of `glmq.errors`. Names are imported when they are first used, so
`import glmq` loads neither torch nor transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from glmq.version import __version__

if TYPE_CHECKING:
    from glmq.compression.dry_run import CompressionPlan
    from glmq.errors import GlmqError, InputError, ResourceError, UsageError
    from glmq.inspection.comparison import Comparison
    from glmq.inspection.statistics import StatisticsComparison, StatisticsSummary
    from glmq.jobs.ask import ask
    from glmq.jobs.calibrate import CalibrationForecast, CalibrationResult, calibrate
    from glmq.jobs.calibration_options import CalibrationOptions
    from glmq.jobs.compare import compare, compare_statistics
    from glmq.jobs.compress import CompressionOptions, CompressionResult, compress
    from glmq.jobs.inspect import Choice, inspect
    from glmq.jobs.quantize import QuantizationResult, quantize
    from glmq.jobs.restore import RestorationPlan, RestoreResult, restore
    from glmq.jobs.sweep import sweep
    from glmq.jobs.sweep_recipes import SweepOptions, Variant
    from glmq.jobs.verify import CaseOptions, verify
    from glmq.progress import BlockStep, Event, Note, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan
    from glmq.quantization.dry_run import RunPlan
    from glmq.quantization.recipe import Recipe
    from glmq.records import BlockDone, BytesDone, LinearReport, PassTime
    from glmq.reporting.documents import Answer, Inspection, Verification
    from glmq.reporting.sweeps import Divergence, Sweep, SweepFailure, SweepRow
    from glmq.verification.findings import Finding
    from glmq.verification.limits import Limits

_HOMES = {
    "glmq.compression.dry_run": ("CompressionPlan",),
    "glmq.errors": ("GlmqError", "InputError", "ResourceError", "UsageError"),
    "glmq.jobs.ask": ("ask",),
    "glmq.jobs.calibrate": ("CalibrationForecast", "CalibrationResult", "calibrate"),
    "glmq.jobs.calibration_options": ("CalibrationOptions",),
    "glmq.jobs.compare": ("compare", "compare_statistics"),
    "glmq.jobs.compress": ("CompressionOptions", "CompressionResult", "compress"),
    "glmq.jobs.inspect": ("Choice", "inspect"),
    "glmq.jobs.quantize": ("QuantizationResult", "quantize"),
    "glmq.jobs.sweep": ("sweep",),
    "glmq.jobs.sweep_recipes": ("SweepOptions", "Variant"),
    "glmq.jobs.restore": ("RestorationPlan", "RestoreResult", "restore"),
    "glmq.jobs.verify": ("CaseOptions", "verify"),
    "glmq.progress": ("BlockStep", "Event", "Note", "PassDone", "PassPlan", "PassStarted", "RunPlanned", "StepPlan"),
    "glmq.quantization.dry_run": ("RunPlan",),
    "glmq.quantization.recipe": ("Recipe",),
    "glmq.records": ("BlockDone", "BytesDone", "LinearReport", "PassTime"),
    "glmq.inspection.comparison": ("Comparison",),
    "glmq.inspection.statistics": ("StatisticsComparison", "StatisticsSummary"),
    "glmq.reporting.documents": ("Answer", "Inspection", "Verification"),
    "glmq.reporting.sweeps": ("Divergence", "Sweep", "SweepFailure", "SweepRow"),
    "glmq.verification.limits": ("Limits",),
    "glmq.verification.findings": ("Finding",),
}
"""Where the public names live, by module."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "BlockDone",
    "BlockStep",
    "BytesDone",
    "CalibrationForecast",
    "CalibrationOptions",
    "CalibrationResult",
    "CaseOptions",
    "Choice",
    "Comparison",
    "CompressionOptions",
    "CompressionPlan",
    "CompressionResult",
    "Divergence",
    "Event",
    "Finding",
    "GlmqError",
    "InputError",
    "Inspection",
    "Limits",
    "LinearReport",
    "Note",
    "PassDone",
    "PassPlan",
    "PassStarted",
    "PassTime",
    "QuantizationResult",
    "Recipe",
    "ResourceError",
    "RestorationPlan",
    "RestoreResult",
    "RunPlan",
    "RunPlanned",
    "StatisticsComparison",
    "StatisticsSummary",
    "StepPlan",
    "Sweep",
    "SweepFailure",
    "SweepOptions",
    "SweepRow",
    "UsageError",
    "Variant",
    "Verification",
    "__version__",
    "ask",
    "calibrate",
    "compare",
    "compare_statistics",
    "compress",
    "inspect",
    "quantize",
    "restore",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'glmq' has no attribute {name!r}")
    from glmq.cann import AUTOLOAD

    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"  # glmq imports torch_npu itself where an NPU is asked for
    try:
        value: object = getattr(import_module(_HOME[name]), name)
    finally:
        if before is None:
            del os.environ[AUTOLOAD]
        else:
            os.environ[AUTOLOAD] = before
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
