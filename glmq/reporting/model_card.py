"""README.md beside the weights: the model card. What the checkpoint is, how large and how good, and how to serve it.

It holds nothing that two equal runs do not share.
"""

from __future__ import annotations

from statistics import median
from typing import Final

from glmq.engines import ENGINES, Engine
from glmq.model.config import FAMILY
from glmq.quantization.report import Report
from glmq.reporting.words import percent
from glmq.spec import Form
from glmq.wording import counted, size

SERVING: Final = {
    Engine.MINDIE: "set `modelWeightPath` to this folder in `conf/config.json` of mindie-service, start `mindieservice_daemon`",
    Engine.VLLM_ASCEND: "`vllm serve FOLDER --quantization ascend`; it does not list GLM-4.1V among its models",
    Engine.SGLANG: "by its ModelSlim loader",
}
"""How each engine is told of a folder."""


def model_card(report: Report) -> str:
    """The card, as Markdown with the header that model hubs read."""
    recipe = report.recipe
    before, after = sum(area.before for area in report.areas), sum(area.after for area in report.areas)
    errors = sorted(report.linears, key=lambda linear: (-linear.output_error, linear.name))
    samples = report.calibration.samples
    middle = median(linear.output_error for linear in errors)
    answers = sum(sample.has_answer for sample in samples)
    kept = counted(len(report.kept_float), "linear")
    parts = "\n".join(
        f"| {area.area.value} | {size(area.before)} | {size(area.after)} |"
        for area in report.areas
        if area.before or area.after
    )
    return f"""---
pipeline_tag: image-text-to-text
tags: [glmq, {recipe.quant_type.value.lower()}, {recipe.form.value.lower()}]
---

# {FAMILY.title}, {recipe.quant_type.value}

Quantized to {recipe.quant_type.value} ({recipe.form.value}, {recipe.dtype.value}) by glmq.
The terms of the float model hold for it too; `glmq_report.html` says which folder that was.

| part | float model | here |
|---|---|---|
{parts}
| **all** | **{size(before)}** | **{size(after)}** |

## Quality

Output error of a linear, ||y_q - y|| / ||y|| on calibration tokens, over {len(errors)} quantized linears:
median {percent(middle)}, worst {percent(errors[0].output_error)} (`{FAMILY.short_name(errors[0].name)}`).
{kept} stayed float. Calibrated on {counted(len(samples), "sample")}, {answers} of them with an answer.
Every linear: `glmq_report.html`, `glmq_report.csv`.

How it answers beside the float model (KL, equal top tokens), and whether its bytes are those that were written:

```
glmq verify FOLDER --reference FLOAT --calib-images PHOTOS
glmq ask FOLDER --image PHOTO
```

## Serve

{_serving(report)}
"""


def _serving(report: Report) -> str:
    recipe = report.recipe
    if recipe.quant_type.spec.is_sparse and recipe.form is Form.ASCEND_V1 and Engine.MINDIE in report.engines:
        return (
            "Sparse weights are compressed first, for the number of ranks that serve them (Atlas 300I Duo, MindIE):\n\n"
            "```\nglmq compress --model_path FOLDER --save_directory OUT --tp 1\n```"
        )
    lines = []
    for engine, spec in ENGINES.items():
        if engine in report.engines:
            on = ", ".join(f"Atlas {chip.value}" for chip in report.engines[engine])
            lines.append(f"- {spec.title} ({on}): {SERVING[engine]}.")
    plugin = "with glmq's plugin (`pip install 'glmq[vllm]'`)"
    if recipe.form is Form.COMPRESSED_TENSORS:
        lines.append("- vLLM on a CPU or an NVIDIA card: `vllm serve FOLDER`.")
    else:
        lines.append(f"- vLLM on a CPU or an NVIDIA card, {plugin}: `vllm serve FOLDER`.")
    return "\n".join(lines)
