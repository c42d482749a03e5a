"""Everything that `glmq verify` looks for, as one table; and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning"]
"""An error keeps an engine from loading a checkpoint or makes wrong results; a warning may."""


class Check(Enum):
    """One kind of thing that is looked for: its number, its title and how severe its findings can be.

    Numbers never change their meaning; those of checks that were dropped are not given again.
    """

    DESCRIPTION_FILE = (1, "one description file", "error")
    DESCRIPTION_KEYS = (2, "description: type, version, keys", "error")
    GROUP_SIZE = (3, "description: group size", "error", "warning")
    WEIGHT_FILES = (4, "weight files and their index", "error")
    DESCRIBED_TENSORS = (5, "tensors and description agree", "error")
    FLOAT_TENSORS = (6, "no tensor lost, added or changed", "error", "warning")
    LINEAR_TENSORS = (7, "tensors of each quantized linear", "error")
    SHAPES = (8, "shapes", "error")
    DTYPES = (9, "dtypes", "error")
    VALUES = (10, "values", "error")
    RECOMPUTED = (11, "quant_bias and scales recomputed", "error")
    SHARED_INPUT = (12, "linears of one input agree", "error", "warning")
    SPARSE_DTYPE = (13, "sparse types are float16", "error")
    VISION_KEYS = (14, "vision tower described", "error")
    NORMS = (15, "norms", "error", "warning")
    WEIGHT_DISTANCE = (16, "distance from the float weights", "error", "warning")
    CONFIG = (17, "config.json", "error", "warning")
    SIDE_FILES = (18, "tokenizer and processor files", "error", "warning")
    FILE_MODES = (19, "modes and names of files", "error", "warning")
    MINDIE = (20, "MindIE's look-ups", "error", "warning")
    PART_FILES = (21, "parts: files and config.json", "error")
    PART_NAMES = (22, "parts: names", "error")
    PART_LINEARS = (23, "parts: compressed tensors", "error")
    PART_BIAS = (24, "parts: bias of row-parallel linears", "error")
    PART_SOURCE = (25, "parts: against the W8A8S checkpoint", "error")
    SHARD_FILES = (27, "shards: files and config.json", "error")
    SHARD_LINEARS = (28, "shards: compressed tensors", "error")
    VLLM_ASCEND = (29, "vLLM-Ascend's look-ups", "error", "warning")
    INTEGERS = (30, "integers of each linear", "error", "warning")
    BEHAVIOUR = (31, "behaviour", "error", "warning")
    REPORT = (32, "integers as glmq_report.json says", "error")
    MANIFEST = (33, "bytes as glmq_manifest.json says", "error")
    CHECKSUMS = (34, "bytes as glmq_checksums.json says", "error")
    FOLDER_KIND = (35, "one checkpoint in the folder", "error")
    COMPRESSED_CONFIG = (36, "quantization_config of compressed-tensors", "error")
    SERVED = (37, "answers in the serving engine", "error", "warning")
    SGLANG = (38, "SGLang's look-ups", "error", "warning")

    def __init__(self, number: int, title: str, *severities: Severity) -> None:
        self.number: Final = number
        self.title: Final = title
        self.severities: Final = severities

    def error(self, tensor: str, message: str) -> Finding:
        """An error about this tensor, linear or norm, or (empty) about the checkpoint as a whole."""
        return Finding(self, "error", tensor, message)

    def warning(self, tensor: str, message: str) -> Finding:
        """A warning about this tensor, linear or norm, or (empty) about the checkpoint as a whole."""
        return Finding(self, "warning", tensor, message)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a checkpoint."""

    check: Check
    """What found it."""
    severity: Severity
    tensor: str
    """The tensor, linear or norm it is about; empty for the checkpoint as a whole."""
    message: str
    """One sentence: what was wanted and what was found."""

    def __post_init__(self) -> None:
        assert self.severity in self.check.severities, f"check {self.check.number} has no {self.severity}s"


@dataclass(frozen=True, slots=True)
class Checked:
    """Something that was looked at."""

    what: str
    """With counts, e.g. `310 tensors in 1 file`."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that could not be looked at."""

    what: str
    """And in brackets what was missing for it."""
