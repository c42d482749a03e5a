"""What a serving engine would look up in a folder, and what would make it refuse: from names, dtypes and JSON alone.

The steps are those of MindIE-LLM 8b4871a and vLLM-Ascend 182b75e, as read or run when this project's format notes were made;
both are emulated here, not run. Values are not read: `check_structure` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from glmq.errors import ModelError
from glmq.inspection.folder import Folder, Kind
from glmq.model.config import parse_config
from glmq.verification.engines.mindie import check_mindie
from glmq.verification.engines.vllm_ascend import check_vllm_ascend
from glmq.verification.findings import Check, Finding


class Target(Enum):
    """A serving engine."""

    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"


def check_target(folder: Folder, target: Target) -> Iterator[Finding]:
    """What would keep `target` from loading the folder, or make it compute something else; nothing if all is well.

    A warning says that it loads, but not as one would think.
    """
    check = Check.MINDIE if target is Target.MINDIE else Check.VLLM_ASCEND
    if folder.kind is Kind.STATISTICS:
        yield check.error("", "the folder holds calibration statistics, no model")
        return
    if folder.kind is Kind.PORTABLE:
        yield check.error("", "the weights are in glmq's storage form; `glmq compress --decompress` restores them")
        return
    for problem in folder.problems:
        yield check.error("", problem)
    config = None
    if folder.config:
        try:
            config = parse_config(folder.config, str(folder.directory / "config.json"))
        except ModelError as error:
            yield check.error("", str(error))
    for severity, tensor, message in (
        check_mindie(folder, config) if target is Target.MINDIE else check_vllm_ascend(folder, config)
    ):
        yield Finding(check, "error" if severity else "warning", tensor, message)


def describe_engines(folder: Folder) -> str:
    """For which engine and chip a folder is, in one line."""
    match folder.quant_type, folder.kind:
        case "W8A8SC", Kind.SHARDED:
            return "vLLM-Ascend (load_format sharded_state) on the Atlas 300I Duo; GLM-4.1V is not in its support table"
        case "W8A8SC", _:
            return "MindIE on the Atlas 300I Duo, with as many ranks as there are parts"
        case "W8A8S", _:
            return "the input of `glmq compress`; as it is, MindIE on the Atlas 300I Duo"
        case "W8A8", _:
            return "MindIE on the Atlas 800I A2 or 300I Duo, 1 or 2 ranks"
        case "W8A8_DYNAMIC", _:
            return "MindIE loads it, though it is not in its support table for GLM-4.1V"
        case "W4A8_DYNAMIC", _:
            return "no current engine: MindIE refuses it, vLLM-Ascend has it for mixtures of experts only"
        case _, Kind.FLOAT:
            return "any engine for float GLM-4.1V; the input of `glmq quantize`"
        case _, Kind.PORTABLE:
            return "no engine; `glmq compress --decompress` restores the W8A8S weights"
        case _, Kind.STATISTICS:
            return "the input of `glmq quantize --stats`"
        case _:
            return "unknown"
