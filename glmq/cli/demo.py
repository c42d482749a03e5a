"""`glmq demo`: the whole pipeline on the embedded tiny model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier

HELD_OUT_PICTURE = "000.png"
MAX_TOKENS = 64
VERIFIED_CASES = 4


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to keep the results in.",
            rich_help_panel=o.OUTPUT,
            show_default="a temporary one, removed at the end",
        ),
        Tier.USUAL,
    ] = None,
    overwrite: o.Overwrite = False,
    log_file: o.LogFile = None,
    debug: o.Debug = False,
) -> None:
    """Run everything on the embedded tiny GLM-4.1V: calibrate, quantize, compress, verify, two captions."""
    from glmq.checkpoint.workplace import check_output
    from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT, TINY_PICTURES

    if out is not None:
        check_output(out, overwrite=overwrite)
    with TemporaryDirectory(prefix="glmq-demo-") if out is None else nullcontext(str(out)) as folder:
        _run(Path(folder), TINY_CHECKPOINT, TINY_PICTURES, TINY_CASES / "images.jsonl", overwrite=overwrite)
    if out is None:
        from glmq.cli.console import stdout

        stdout.say("These folders are removed again; to keep them: glmq demo --out FOLDER")


def _run(folder: Path, model: Path, pictures: Path, cases: Path, *, overwrite: bool) -> None:
    unseen = cases.parent / "images" / HELD_OUT_PICTURE
    import torch

    import glmq
    from glmq.cli.compress_view import size_table
    from glmq.cli.console import stdout
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import captions_table, show_quantization
    from glmq.cli.verify_view import show_verification

    torch.set_num_threads(1)  # the tiny model's matrices are too small to share between threads
    stats, quantized, packed = folder / "statistics", folder / "w8a8s", folder / "w8a8s-compressed"
    _say(f"glmq calibrate --model-path {model} --calib-images {pictures} --generate {MAX_TOKENS} --stats {stats}")
    options = glmq.CalibrationOptions(images=pictures, generate=MAX_TOKENS)
    with ProgressView(quiet=False) as view:
        glmq.calibrate(model, out=stats, options=options, overwrite=overwrite, watch=view)
    _say(
        f"glmq quantize --model_path {model} --stats {stats} --save_directory {quantized} "
        "--w_bit 4 --is_lowbit True --use_sigma True --torch_dtype fp16"
    )
    recipe = glmq.Recipe.w8a8s(sigma=3.0, dtype="fp16")
    with ProgressView(quiet=False) as view:
        result = glmq.quantize(model, stats, out=quantized, recipe=recipe, overwrite=overwrite, watch=view)
    show_quantization(result, model, verbose=False)
    _say(f"glmq compress --model_path {quantized} --save_directory {packed} --codec portable")
    with ProgressView(quiet=False) as view:
        compression = glmq.compress(quantized, out=packed, tp=1, codec="portable", overwrite=overwrite, watch=view)
    stdout.print(size_table(compression.sizes, compression.codec, compression.world))
    _say(f"glmq verify {quantized} --reference {model} --cases {cases} --limit {VERIFIED_CASES}")
    asked = glmq.CaseOptions(cases=cases, limit=VERIFIED_CASES)
    with ProgressView(quiet=False) as view:
        verification = glmq.verify(quantized, reference=model, cases=asked, watch=view)
    show_verification(verification, quiet=True, verbose=False)
    stdout.print()
    stdout.print(captions_table(unseen.name, {"float": _caption(model, unseen), "W8A8S": _caption(quantized, unseen)}))


def _caption(folder: Path, picture: Path) -> str:
    """What the checkpoint in `folder`, float or quantized, says about a picture."""
    from PIL import Image

    from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
    from glmq.verification.behaviour import generate, whole_model

    with whole_model(folder) as model, Image.open(picture) as image:
        preprocessor = Preprocessor(folder, model.config, max_pixels=None, trust_remote_code=False)
        return preprocessor.decode(generate(model, preprocessor.encode(image, DEFAULT_PROMPT, None), MAX_TOKENS))


def _say(command: str) -> None:
    from glmq.cli.console import stderr

    stderr.print()
    stderr.print(f"$ {command}", style="bold", soft_wrap=True)
