"""The flags of the vendor's `quant_glm41v.py` that decide what is written, as `glmq quantize` takes them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier

WBit = Annotated[int, typer.Option("--w-bit", help="Weight bits: 4 or 8.", rich_help_panel=o.QUANTIZATION), Tier.VENDOR]
ABit = Annotated[
    int,
    typer.Option(
        "--a-bit",
        help="Activation bits: 8, or 16 for float. With 16 it makes W8A16, and W4A16 with --format compressed-tensors.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
AntiMethod = Annotated[
    Literal["m2", "none"],
    typer.Option("--anti-method", help="Outlier suppression at the norms.", rich_help_panel=o.QUANTIZATION),
    Tier.VENDOR,
]
ActMethod = Annotated[
    int,
    typer.Option(
        "--act-method",
        help="Range: 1 min-max, 2 histogram, 3 the better. It is that of each input's activations.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
OpenOutlier = Annotated[
    bool,
    typer.Option(
        "--open-outlier/--no-open-outlier",
        help="Split weight outliers off in sparse types. If not, the step covers the largest weight.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
IsDynamic = Annotated[
    bool,
    typer.Option(
        "--is-dynamic/--no-is-dynamic",
        help="Activation scales per token at run time.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
IsLowbit = Annotated[
    bool,
    typer.Option(
        "--is-lowbit/--no-is-lowbit",
        help="Low-bit algorithm: W8A8S. With --is_dynamic it makes W4A8_DYNAMIC.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
CoSparse = Annotated[
    bool,
    typer.Option(
        "--co-sparse/--no-co-sparse",
        help="W8A8S with outliers chosen over the whole tensor.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
Fraction = Annotated[
    float,
    typer.Option(
        "--fraction",
        help="Share of outliers in sparse types, 0.01 to 0.1.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
DoSmooth = Annotated[
    bool,
    typer.Option(
        "--do-smooth/--no-do-smooth",
        help="SmoothQuant scales instead of m2's.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
UseSigma = Annotated[
    bool,
    typer.Option(
        "--use-sigma/--no-use-sigma",
        help="Choose outliers by standard deviations. They replace --fraction.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
SigmaFactor = Annotated[
    float,
    typer.Option(
        "--sigma-factor",
        help="How many deviations, 1.0 to 3.0. Only with --use_sigma.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
TorchDtype = Annotated[
    Literal["bf16", "fp16"],
    typer.Option("--torch-dtype", help="Dtype of the stored float weights.", rich_help_panel=o.OUTPUT),
    Tier.VENDOR,
]
GroupSize = Annotated[
    int,
    typer.Option(
        "--group-size",
        help="Input columns per step, of types with groups. In W4A8_DYNAMIC 64, 128, 256 or 512; in W8A16 and W4A16 in "
        "compressed-tensors 32, 64 or 128.",
        rich_help_panel=o.QUANTIZATION,
    ),
    Tier.VENDOR,
]
MindieFormat = Annotated[
    bool,
    typer.Option(
        "--mindie-format/--no-mindie-format",
        help="Older MindIE layout, as --format mindie.",
        rich_help_panel=o.OUTPUT,
    ),
    Tier.VENDOR,
]
PartFileSize = Annotated[
    str | None,
    typer.Option(
        "--part-file-size",
        help="Largest weight file: 4 or 4GB, 500MB.",
        rich_help_panel=o.OUTPUT,
        show_default="one file",
    ),
    Tier.VENDOR,
]
CalibImages = Annotated[o.CalibImages, Tier.VENDOR]
DeviceType = Annotated[o.DeviceType, Tier.VENDOR]
TrustRemoteCode = Annotated[o.TrustRemoteCode, Tier.VENDOR]
