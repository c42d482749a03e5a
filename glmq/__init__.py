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
    from glmq import errors
    from glmq.calibration.convergence import Assessment, Convergence
    from glmq.calibration.dry_run import CalibrationPlan
    from glmq.calibration.manifest import SampleTokens
    from glmq.calibration.stats import Statistics
    from glmq.checkpoint.foreign import ForeignMethod
    from glmq.checkpoint.header import TensorInfo
    from glmq.checkpoint.json_file import JsonObject, JsonValue
    from glmq.compression.dry_run import AreaEstimate, CompressionPlan, FileEstimate, Trial, WeightEstimate
    from glmq.compression.layouts import Layout, Unsharded
    from glmq.compression.manifest import CodecKind
    from glmq.compression.report import AreaSizes, RankTotals
    from glmq.compression.stream import CompressedLinear
    from glmq.engines import Chip, Engine
    from glmq.errors import GlmqError, InputError, ResourceError, UsageError
    from glmq.inspection.compare import HistogramPair, Incomparable, LayerDiff, WeightDiff
    from glmq.inspection.compare_keys import KeyChange, NamePattern
    from glmq.inspection.comparison import Comparison
    from glmq.inspection.folder import Folder, Kind, StoredTensor
    from glmq.inspection.listing import TensorRow
    from glmq.inspection.parts import PackedWeight
    from glmq.inspection.statistics import InputChange, InputSummary, StatisticsComparison, StatisticsSummary
    from glmq.inspection.values import TensorValues
    from glmq.jobs.ask import ask
    from glmq.jobs.calibrate import CalibrationForecast, CalibrationResult, calibrate
    from glmq.jobs.calibration_options import CalibrationOptions
    from glmq.jobs.compare import compare, compare_statistics
    from glmq.jobs.compress import CodecName, CompressionOptions, CompressionResult, compress
    from glmq.jobs.inspect import Choice, inspect
    from glmq.jobs.quantize import QuantizationResult, quantize
    from glmq.jobs.restore import RestorationPlan, RestoreResult, restore
    from glmq.jobs.settled import Settled
    from glmq.jobs.sweep import sweep
    from glmq.jobs.sweep_recipes import SweepOptions, Variant
    from glmq.jobs.verify import CaseOptions, verify
    from glmq.model.family import Area
    from glmq.numerics.rate import RateCurve
    from glmq.progress import BlockStep, Event, Note, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan, Unit, Watch
    from glmq.quantization.dry_run import LinearPlan, RunPlan
    from glmq.quantization.group import GroupScheme
    from glmq.quantization.output import AreaBytes
    from glmq.quantization.recipe import Recipe
    from glmq.quantization.rules import LayerRule
    from glmq.quantization.targets import Target
    from glmq.records import BlockDone, BytesDone, LinearReport, PassTime, StageTime
    from glmq.reporting.documents import Answer, Caption, Inspection, Verification
    from glmq.reporting.sweeps import Divergence, Sweep, SweepFailure, SweepRow
    from glmq.spec import ActRange, Allocation, FloatDtype, Form, Method, QuantType, Smoothing, StepRule, WeightScheme
    from glmq.verification.answering import AnswerPlan
    from glmq.verification.arithmetic import LinearArithmetic
    from glmq.verification.behaviour import BlockBehaviour, LinearBehaviour
    from glmq.verification.distance import WeightDistance
    from glmq.verification.engines.schemes import ModuleScheme
    from glmq.verification.findings import Check, Finding, Severity
    from glmq.verification.limits import Limits
    from glmq.verification.predictions import Predictions, SamplePredictions
    from glmq.verification.situations import Situation

_HOMES = {
    "glmq.calibration.convergence": "Assessment, Convergence",
    "glmq.calibration.dry_run": "CalibrationPlan",
    "glmq.calibration.manifest": "SampleTokens",
    "glmq.calibration.stats": "Statistics",
    "glmq.checkpoint.foreign": "ForeignMethod",
    "glmq.checkpoint.header": "TensorInfo",
    "glmq.checkpoint.json_file": "JsonObject, JsonValue",
    "glmq.compression.dry_run": "AreaEstimate, CompressionPlan, FileEstimate, Trial, WeightEstimate",
    "glmq.compression.layouts": "Layout, Unsharded",
    "glmq.compression.manifest": "CodecKind",
    "glmq.compression.report": "AreaSizes, RankTotals",
    "glmq.compression.stream": "CompressedLinear",
    "glmq.engines": "Chip, Engine",
    "glmq.errors": "GlmqError, InputError, ResourceError, UsageError",
    "glmq.inspection.compare": "HistogramPair, Incomparable, LayerDiff, WeightDiff",
    "glmq.inspection.compare_keys": "KeyChange, NamePattern",
    "glmq.inspection.comparison": "Comparison",
    "glmq.inspection.folder": "Folder, Kind, StoredTensor",
    "glmq.inspection.listing": "TensorRow",
    "glmq.inspection.parts": "PackedWeight",
    "glmq.inspection.statistics": "InputChange, InputSummary, StatisticsComparison, StatisticsSummary",
    "glmq.inspection.values": "TensorValues",
    "glmq.jobs.ask": "ask",
    "glmq.jobs.calibrate": "CalibrationForecast, CalibrationResult, calibrate",
    "glmq.jobs.calibration_options": "CalibrationOptions",
    "glmq.jobs.compare": "compare, compare_statistics",
    "glmq.jobs.compress": "CodecName, CompressionOptions, CompressionResult, compress",
    "glmq.jobs.inspect": "Choice, inspect",
    "glmq.jobs.quantize": "QuantizationResult, quantize",
    "glmq.jobs.restore": "RestorationPlan, RestoreResult, restore",
    "glmq.jobs.settled": "Settled",
    "glmq.jobs.sweep": "sweep",
    "glmq.jobs.sweep_recipes": "SweepOptions, Variant",
    "glmq.jobs.verify": "CaseOptions, verify",
    "glmq.model.family": "Area",
    "glmq.numerics.rate": "RateCurve",
    "glmq.progress": "BlockStep, Event, Note, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan, Unit, Watch",
    "glmq.quantization.dry_run": "LinearPlan, RunPlan",
    "glmq.quantization.group": "GroupScheme",
    "glmq.quantization.output": "AreaBytes",
    "glmq.quantization.recipe": "Recipe",
    "glmq.quantization.rules": "LayerRule",
    "glmq.quantization.targets": "Target",
    "glmq.records": "BlockDone, BytesDone, LinearReport, PassTime, StageTime",
    "glmq.reporting.documents": "Answer, Caption, Inspection, Verification",
    "glmq.reporting.sweeps": "Divergence, Sweep, SweepFailure, SweepRow",
    "glmq.spec": "ActRange, Allocation, FloatDtype, Form, Method, QuantType, Smoothing, StepRule, WeightScheme",
    "glmq.verification.answering": "AnswerPlan",
    "glmq.verification.arithmetic": "LinearArithmetic",
    "glmq.verification.behaviour": "BlockBehaviour, LinearBehaviour",
    "glmq.verification.distance": "WeightDistance",
    "glmq.verification.engines.schemes": "ModuleScheme",
    "glmq.verification.findings": "Check, Finding, Severity",
    "glmq.verification.limits": "Limits",
    "glmq.verification.predictions": "Predictions, SamplePredictions",
    "glmq.verification.situations": "Situation",
}
"""Where the public names live, by module."""
_HOME = {name: module for module, names in _HOMES.items() for name in names.split(", ")}

__all__ = [
    "ActRange",
    "Allocation",
    "Answer",
    "AnswerPlan",
    "Area",
    "AreaBytes",
    "AreaEstimate",
    "AreaSizes",
    "Assessment",
    "BlockBehaviour",
    "BlockDone",
    "BlockStep",
    "BytesDone",
    "CalibrationForecast",
    "CalibrationOptions",
    "CalibrationPlan",
    "CalibrationResult",
    "Caption",
    "CaseOptions",
    "Check",
    "Chip",
    "Choice",
    "CodecKind",
    "CodecName",
    "Comparison",
    "CompressedLinear",
    "CompressionOptions",
    "CompressionPlan",
    "CompressionResult",
    "Convergence",
    "Divergence",
    "Engine",
    "Event",
    "FileEstimate",
    "Finding",
    "FloatDtype",
    "Folder",
    "ForeignMethod",
    "Form",
    "GlmqError",
    "GroupScheme",
    "HistogramPair",
    "Incomparable",
    "InputChange",
    "InputError",
    "InputSummary",
    "Inspection",
    "JsonObject",
    "JsonValue",
    "KeyChange",
    "Kind",
    "LayerDiff",
    "LayerRule",
    "Layout",
    "Limits",
    "LinearArithmetic",
    "LinearBehaviour",
    "LinearPlan",
    "LinearReport",
    "Method",
    "ModuleScheme",
    "NamePattern",
    "Note",
    "PackedWeight",
    "PassDone",
    "PassPlan",
    "PassStarted",
    "PassTime",
    "Predictions",
    "QuantType",
    "QuantizationResult",
    "RankTotals",
    "RateCurve",
    "Recipe",
    "ResourceError",
    "RestorationPlan",
    "RestoreResult",
    "RunPlan",
    "RunPlanned",
    "SamplePredictions",
    "SampleTokens",
    "Settled",
    "Severity",
    "Situation",
    "Smoothing",
    "StageTime",
    "Statistics",
    "StatisticsComparison",
    "StatisticsSummary",
    "StepPlan",
    "StepRule",
    "StoredTensor",
    "Sweep",
    "SweepFailure",
    "SweepOptions",
    "SweepRow",
    "Target",
    "TensorInfo",
    "TensorRow",
    "TensorValues",
    "Trial",
    "Unit",
    "Unsharded",
    "UsageError",
    "Variant",
    "Verification",
    "Watch",
    "WeightDiff",
    "WeightDistance",
    "WeightEstimate",
    "WeightScheme",
    "__version__",
    "ask",
    "calibrate",
    "compare",
    "compare_statistics",
    "compress",
    "errors",
    "inspect",
    "quantize",
    "restore",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name == "errors":
        return import_module("glmq.errors")
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
