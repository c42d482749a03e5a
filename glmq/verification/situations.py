"""What `glmq verify` can and cannot find in an un-sharded checkpoint, by what it has to compare with."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Situation(Enum):
    """What lies beside the quantized weights: what verify then finds, and what passes.

    Checksums that somebody wrote anew, report included, prove nothing: such a folder is as one without them.
    """

    ALONE = (
        "no checksums, no --reference",
        "lost, added or misshapen tensors; values that no type has; tensors that contradict each other: scales, scale_bias, "
        "linears of one input, quant_bias where the linear has a bias",
        "changes of integers, norms, float tensors, and of steps and ranges together, that contradict no other tensor",
    )
    REFERENCE = (
        "no checksums, --reference",
        "that, any bit of a float tensor, config.json and side files against the float model, norms and steps off by a few "
        "per cent (coarse steps: some ten), one weight off by more than 2 steps or 12 times the error of its column",
        "what rounding could have done: smaller changes of weights and steps, a quant_bias off by 1; and static ranges "
        "(input_scale and deq_scale changed together; input_zero_point in the compressed-tensors form), of which no stored "
        "tensor tells",
    )
    SAMPLES = (
        "no checksums, --reference and pictures",
        "that, ranges that waste more than 2 bits or clip, outputs and answers beyond the limits",
        "what rounding could have done: smaller changes of weights, steps and ranges than change outputs beyond the limits",
    )
    CHECKSUMS = (
        "checksums",
        "any changed bit of any tensor and file that glmq wrote",
        "changes by somebody who also rewrote checksums and report; a copy of glmq_checksums.json kept elsewhere shows them",
    )

    def __init__(self, has: str, finds: str, misses: str) -> None:
        self.has: Final = has
        self.finds: Final = finds
        self.misses: Final = misses


def situation_of(*, has_checksums: bool, has_reference: bool, has_samples: bool) -> Situation:
    """Which one a run of verify is in; checksums find what the others do."""
    if has_checksums:
        return Situation.CHECKSUMS
    if has_samples:
        return Situation.SAMPLES
    return Situation.REFERENCE if has_reference else Situation.ALONE


def situations_table() -> str:
    """The situations as a Markdown table, for docs/verify.md."""
    rows = ["| There are | Found | Not checked |", "|---|---|---|"]
    rows += [f"| {one.has} | {one.finds} | {one.misses} |" for one in Situation]
    return "\n".join(rows) + "\n"
