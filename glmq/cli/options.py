"""Option aliases that several verbs share, each declared once, grouped in the panels of --help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from glmq.cli.help import Tier
from glmq.errors import UsageError
from glmq.values import LEAST_PIXELS

MODEL: Final = "Model"
CALIBRATION: Final = "Calibration"
SAMPLES: Final = "Samples"
QUANTIZATION: Final = "Quantization"
OUTPUT: Final = "Output"
RUN: Final = "Run"

ModelPath = Annotated[
    Path,
    typer.Option("--model-path", help="Folder of the float GLM-4.1V or GLM-4.6V-Flash weights.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Let the tokenizer run code of the model folder. GLM-4.1V and GLM-4.6V-Flash need none.",
        rich_help_panel=MODEL,
    ),
]
CalibImages = Annotated[
    Path | None,
    typer.Option(
        "--calib-images",
        help="Folder of calibration images, 30 are wanted. Each is one sample.",
        rich_help_panel=SAMPLES,
        show_default="the 30 pictures that come with glmq",
    ),
    Tier.USUAL,
]
Recursive = Annotated[
    bool,
    typer.Option(
        "--recursive/--no-recursive",
        help="Also take the images of the sub-folders of --calib-images.",
        rich_help_panel=SAMPLES,
    ),
]
CalibSamples = Annotated[
    Path | None,
    typer.Option(
        "--calib-samples",
        help="JSON-lines file of samples: image, prompt, text. Each is optional, text is the answer; messages (OpenAI) and "
        "conversations (ShareGPT, LLaVA) are read too. Alone, or beside --calib-images.",
        rich_help_panel=SAMPLES,
    ),
    Tier.USUAL,
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        help="File of the chat template, for a base model that comes without one; quantize writes it beside the weights.",
        rich_help_panel=MODEL,
        show_default="the model folder's own",
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize/--no-dequantize",
        help="Take FP8 weights with scales as the float numbers that they stand for.",
        rich_help_panel=MODEL,
    ),
]
Texts = Annotated[
    bool,
    typer.Option(
        "--texts/--no-texts",
        help="Also calibrate on the short texts that come with glmq (lists, code, reasoning, English and Chinese): "
        "most of an answer is text that no picture contains.",
        rich_help_panel=SAMPLES,
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", help="What is asked about each image.", rich_help_panel=SAMPLES)]
FIRST: Final = "Use only the first N pictures and the first N lines of a file"
LimitImages = Annotated[
    int | None,
    typer.Option("--limit", min=1, help=f"{FIRST}; the texts of --texts come on top.", rich_help_panel=SAMPLES),
]
LimitCases = Annotated[int | None, typer.Option("--limit", min=1, help=f"{FIRST}.", rich_help_panel=SAMPLES)]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=LEAST_PIXELS,
        help="Shrink larger images to this many pixels, which saves memory and time.",
        rich_help_panel=SAMPLES,
    ),
]
SkipBadImages = Annotated[
    bool,
    typer.Option(
        "--skip-bad-images/--no-skip-bad-images",
        help="Leave out images that do not decode or that the model does not take, instead of stopping.",
        rich_help_panel=SAMPLES,
    ),
]
WideMoments = Annotated[
    bool,
    typer.Option(
        "--wide-moments/--no-wide-moments",
        help="Also collect second moments of the vision tower and of down_proj, for compensated rounding there.",
        rich_help_panel=CALIBRATION,
    ),
]
TextInputs = Annotated[
    bool,
    typer.Option(
        "--text-inputs/--no-text-inputs",
        help="Also keep what enters the text layers, for `glmq quantize --propagation`.",
        rich_help_panel=CALIBRATION,
    ),
]
Generate = Annotated[
    int | None,
    typer.Option(
        "--generate",
        min=1,
        help="Let the float model first answer each sample that has no answer, in up to N tokens, and calibrate on that too.",
        rich_help_panel=CALIBRATION,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Continue an interrupted run after its last block. The output has the same bytes as that of an unbroken one.",
        rich_help_panel=RUN,
    ),
    Tier.USUAL,
]
DeviceType = Annotated[
    Literal["cpu", "npu"], typer.Option("--device-type", help="Where the model runs.", rich_help_panel=RUN)
]
ComputeDtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(
        "--compute-dtype",
        help="Dtype of the calibration forward. auto: bf16 on a CPU with bf16 products (AVX512-BF16, AMX), else fp32; "
        "on an NPU bf16, or fp16 where it has no bf16.",
        rich_help_panel=CALIBRATION,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite/--no-overwrite",
        help="Replace the output folder once the new one is whole.",
        rich_help_panel=OUTPUT,
    ),
    Tier.USUAL,
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of option values, e.g. w_bit = 4; what the command line says counts more.",
        rich_help_panel=RUN,
        is_eager=True,
    ),
]
DumpConfig = Annotated[
    bool,
    typer.Option(
        "--dump-config", help="Print the options in effect as TOML for --config, and stop.", rich_help_panel=RUN
    ),
]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout.", rich_help_panel=RUN)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the final path only.", rich_help_panel=RUN)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every row of every table.", rich_help_panel=RUN), Tier.USUAL
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        help="Folder in which the output grows until it is whole.",
        rich_help_panel=OUTPUT,
        show_default="beside the output folder",
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        help="Also write a log to this file: versions, machine, every block, tracebacks. Something to send with a bug report.",
        rich_help_panel=RUN,
    ),
]
Events = Annotated[
    Path | None,
    typer.Option(
        "--events",
        help="Append what happens to this file as JSON lines, for programs that watch the run.",
        rich_help_panel=RUN,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks.", rich_help_panel=RUN)]

_SIZE = re.compile(r"([0-9]{1,15})\s*(GB|MB|GiB|MiB)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `4`, `4GB` or `500MB`; a bare number is GB, as in the vendor's tool, and GB are 2^30 bytes.

    Raises:
        UsageError: not such a size, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise UsageError(
            f"--part_file_size {text}: a whole number of GB, at least 1, is needed, or a size like 4GB or 500MB"
        )
    unit = (match[2] or "GB").upper()[0]
    return int(match[1]) * (2**30 if unit == "G" else 2**20)
