"""What a calibration may be told: its samples, the device, the dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmq.jobs.settings import COMPUTE_DTYPES
from glmq.model.inputs import DEFAULT_PROMPT
from glmq.values import LEAST_PIXELS, check_least, check_word, take_paths


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Where calibration samples come from and how the float model runs them."""

    images: Path | None = None
    """Folder of pictures, one sample each; None: the 30 pictures that come with glmq, unless there is a `samples_file`."""
    recursive: bool = False
    """Enter the sub-folders of `images`."""
    samples_file: Path | None = None
    """JSON lines of samples with image, prompt and text (answer), each optional."""
    texts: bool = True
    """Add the texts that come with glmq."""
    prompt: str = DEFAULT_PROMPT
    """What is asked about each picture."""
    limit: int | None = None
    """Use only the first pictures and lines, this many of each."""
    generate: int | None = None
    """Let the model itself answer samples that have no answer, in at most this many tokens."""
    max_pixels: int | None = None
    """Shrink larger pictures to this many pixels."""
    skip_bad: bool = False
    """Leave out files that do not decode as pictures, instead of stopping."""
    wide_moments: bool = False
    """Collect second moments of the vision tower and of down_proj too."""
    text_inputs: bool = False
    """Keep what enters the text layers, too: for quantizing with propagation."""
    device_type: str = "cpu"
    """`cpu` or `npu`."""
    compute_dtype: str = "auto"
    """Of the float model: `fp32`, `bf16`, `fp16`, or `auto`, the fastest that the device has."""
    trust_remote_code: bool = False
    """Let the tokenizer run code that lies in the model folder."""
    work_dir: Path | None = None
    """Where the output grows until it is whole; None: beside the output folder, on the same disk."""
    dequantize: bool = False
    """Take FP8 weights with scales as the float numbers that they stand for."""
    chat_template: Path | None = None
    """File of the chat template to use; None: the model folder's own."""

    def __post_init__(self) -> None:
        take_paths(self, "images", "samples_file", "work_dir", "chat_template")
        check_least("--limit", self.limit, 1)
        check_least("--generate", self.generate, 1)
        check_least("--max-pixels", self.max_pixels, LEAST_PIXELS)
        check_word("--device-type", self.device_type, ("cpu", "npu"))
        check_word("--compute-dtype", self.compute_dtype, ("auto", *COMPUTE_DTYPES))

    def chosen(self) -> dict[str, str]:
        """Where the samples come from, by option; empty text for what is not given."""
        return {
            "--calib_images": "" if self.images is None else str(self.images),
            "--recursive": str(self.recursive),
            "--calib-samples": "" if self.samples_file is None else str(self.samples_file),
            "--prompt": self.prompt,
            "--texts": str(self.texts),
            "--limit": "" if self.limit is None else str(self.limit),
            "--generate": "" if self.generate is None else str(self.generate),
        }
