"""What several test rooms do with folders and checkpoints."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from programs import forget, start
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glmq
from glmq.calibration.samples import builtin_texts
from glmq.checkpoint.checksums import CHECKSUMS, document_digest
from glmq.errors import GlmqError, LostRanksError
from glmq.ranks import Place, Ranks

if TYPE_CHECKING:
    from glmq.jobs.calibration_options import CalibrationOptions
    from glmq.model.config import ModelConfig
    from glmq.model.inputs import ModelInputs
    from glmq.progress import Watch
    from glmq.verification.findings import Finding


PACKAGES = Path(glmq.__file__).parents[1]
"""The folder that glmq is imported from: as the working directory of a new Python process, it has that one import the same
glmq. In a checkout it would find the sources, which may lack the compiled rounding; its ties differ, a resume refuses it."""


def loaded_after(module: str, names: Sequence[str]) -> list[str]:
    """Which of these modules a process has loaded that imports `module`: a new one, or a fork where torch may be loaded."""
    code = f"import sys, {module}; print(*(name for name in {names!r} if name in sys.modules))"
    if "torch" in names:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGES)
    else:
        done = start(lambda: (forget("glmq", *names), exec(code, {})))
        done.check_returncode()
    return done.stdout.split()


W8A8S = {"w_bit": 4, "is_lowbit": True, "use_sigma": True, "torch_dtype": "fp16"}
"""Options of the sparse type with outliers by sigma, in float16."""


@contextmanager
def with_all_texts() -> Iterator[None]:
    """Calibrate inside on every text that comes with glmq, of which tests else take two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmq.jobs.calibrate.builtin_texts", builtin_texts)
        yield


def calibrate(
    model: Path,
    out: Path,
    pictures: Path | None,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    **options: object,
) -> Path:
    """Calibrate into `out`, which is returned; the options are fields of CalibrationOptions."""
    chosen = glmq.CalibrationOptions(images=pictures, **options)
    return glmq.calibrate(model, out=out, options=chosen, resume=resume, watch=watch).folder


def quantize(
    model: Path,
    stats: Path | None,
    out: Path,
    *,
    calibration: CalibrationOptions | None = None,
    shard_bytes: int | None = None,
    fallback_topk: int = 0,
    max_error: float | None = None,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
    keep_extra: bool = False,
    reports: bool = True,
    **options: object,
) -> Path:
    """Quantize into `out`, which is returned; the options are fields of `glmq.quantization.recipe.Options`."""
    from glmq.jobs.quantization_job import QuantizationJob
    from glmq.jobs.quantize import run_quantization
    from glmq.quantization.options import Options
    from glmq.quantization.recipe import make_recipe

    chosen = calibration or glmq.CalibrationOptions()
    job = QuantizationJob(
        model,
        out,
        make_recipe(Options(**options)),
        chosen,
        stats,
        shard_bytes,
        fallback_topk,
        max_error,
        keep_extra=keep_extra,
        reports=reports,
    )
    return run_quantization(job, overwrite=overwrite, resume=resume, watch=watch).folder


def refused(work: Callable[[], object]) -> tuple[int, str]:
    """Exit code and sentence of the error that ends `work`, which prints nothing."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(GlmqError) as caught:
        work()
    assert (out.getvalue(), err.getvalue()) == ("", "")
    return caught.value.exit_code, str(caught.value)


def findings_as_of_another_tool(folder: Path, reference: Path) -> list[Finding]:
    """What verify finds once the report and the checksums, which excuse and hide, are taken away; of what a checkpoint relies
    on (--channel-shift) nothing."""
    from glmq.verification.checks import verify_files
    from glmq.verification.findings import Finding

    (folder / "glmq_checksums.json").unlink()
    for own in folder.glob("glmq_report.*"):
        own.unlink()
    findings = [found for found in verify_files(folder, reference, []) if isinstance(found, Finding)]
    return [found for found in findings if "--channel-shift" not in found.message]


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint with one weight file in place; its index, if any, stays as it is."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def without_checksums(stats: Path, out: Path) -> Path:
    """A copy of a statistics folder as glmq wrote it before there were checksums: it says nothing of the weights' values."""

    def drop(manifest: dict) -> None:
        manifest["schema"] = "glmq.statistics/1"
        del manifest["digest"], manifest["weights"]
        for entry in manifest["inputs"].values():
            del entry["xxh3"]

    shutil.copytree(stats, out)
    edit_json(out / "statistics.json", drop)
    return out


def without_sensitivity(stats: Path, out: Path) -> Path:
    """A copy of a statistics folder as an older glmq wrote it, which did not say what rows count for the answer."""

    def drop(manifest: dict) -> None:
        for entry in manifest["inputs"].values():
            del entry["sensitivity_rows"]
            entry["xxh3"].pop("sensitivity", None)
        del manifest["digest"]
        manifest["digest"] = document_digest(manifest)

    shutil.copytree(stats, out)
    edit_json(out / "statistics.json", drop)
    for path in out.glob("*.safetensors"):
        save_file({k: t for k, t in load_file(path).items() if not k.endswith(".sensitivity")}, path)
    return out


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder with its sha256, hidden ones included; folders with an empty string.

    What a quantization says of its own run, which no two share, is left out.
    """
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(_shared(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def _shared(path: Path) -> bytes:
    """The bytes of a file that equal runs share: of the report all but `run`, nothing of its page, no checksums of either."""
    if path.name == "glmq_report.html":
        return b""
    content = path.read_bytes()
    if path.name == "glmq_report.json":
        document = json.loads(content)
        return json.dumps({key: value for key, value in document.items() if key != "run"}).encode()
    if path.name == CHECKSUMS:
        document = json.loads(content)
        for name in ("glmq_report.json", "glmq_report.html"):
            document.get("files", {}).pop(name, None)
        return json.dumps({key: value for key, value in document.items() if key != "digest"}).encode()
    return content


def streamed_logits(folder: Path, config: ModelConfig, inputs: ModelInputs, dtype: torch.dtype) -> Tensor:
    """The logits [tokens, vocabulary] of one sample, with one block placed at a time."""
    from glmq.checkpoint.reader import Checkpoint
    from glmq.model.streamed import StreamedModel

    family, has_image = config.family, inputs.pixel_values is not None
    with Checkpoint.open(folder) as source:
        model = StreamedModel(source, config, device=torch.device("cpu"), dtype=dtype)
        vision = None
        if has_image:
            with model.placed(*family.vision_stem):
                vision = model.vision_call(inputs)
            for index in range(config.vision_depth):
                with model.placed(f"{family.vision}.blocks.{index}"):
                    vision.hidden = model.replay(f"{family.vision}.blocks.{index}", vision)
        with model.placed(*(family.vision_tail if has_image else ())), model.embedding_rows(inputs.ids):
            call = model.text_call(inputs, vision)
        for index in range(config.layers):
            with model.placed(f"{family.text}.layers.{index}"):
                call.hidden = model.replay(f"{family.text}.layers.{index}", call)
        with model.placed(f"{family.text}.norm", family.lm_head):
            return model.logits(call.hidden)


def load_full(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A float checkpoint as transformers itself loads it, whole; its vision tower computes as glmq has it."""
    from transformers import Glm4vForConditionalGeneration

    from glmq.model.vision_tower import quicken_vision

    model = Glm4vForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype).eval()
    quicken_vision(model)
    return model


def full_model_kwargs(inputs: ModelInputs, model: nn.Module) -> dict[str, object]:
    """What a user of transformers would call a whole model with."""
    kwargs: dict[str, object] = {
        "input_ids": inputs.ids,
        "attention_mask": torch.ones_like(inputs.ids),
        "use_cache": False,
    }
    if "mm_token_type_ids" in inspect.signature(model.model.forward).parameters:  # transformers 5
        kwargs["mm_token_type_ids"] = (inputs.ids == model.config.image_token_id).int()
    if inputs.pixel_values is not None:
        kwargs |= {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.grid}
    return kwargs


def slow_histogram(values: list[float]) -> tuple[int, list[int]]:
    """Exponent and counts of one channel, value by value: 256 bins of width 2^(exponent - 7) from -2^exponent on."""
    exponent = -40
    while not max(abs(value) for value in values) < 2.0**exponent:
        exponent += 1
    counts = [0] * 256
    for value in values:
        counts[math.floor(value / 2.0 ** (exponent - 7)) + 128] += 1
    return exponent, counts


class ThreadRanks(Ranks):
    """A rank in a thread; a broken barrier is what a dead process is to gloo."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list) -> None:
        super().__init__(Place(rank, barrier.parties))
        self._barrier, self._said = barrier, said

    def _all_gather_text(self, text: str) -> list[str]:
        return self._swap(text)

    def _carry(self, every: Sequence[Sequence[Tensor]], *, to_first: bool) -> None:
        for theirs, row in zip(self._swap(every[self.place.rank]), every, strict=True):
            for tensor, own in zip(theirs, row):  # with `to_first` the row is empty on the others
                if tensor is not own:
                    own.copy_(tensor)
        self._swap("")  # nobody changes what others still copy

    def _swap(self, thing: object) -> list:
        try:
            self._said[self.place.rank] = thing
            self._barrier.wait(10)
            things = list(self._said)
            self._barrier.wait(10)
        except threading.BrokenBarrierError as error:
            raise LostRanksError("gone") from error
        return things


def run_ranks(world: int, work: Callable[[Ranks], object]) -> list[str]:
    """Do `work` on every rank, each a thread; returns what each rank raised (empty: nothing).

    A rank that is interrupted (raises what is no Exception) is lost to the others.
    """
    barrier, said, raised = threading.Barrier(world), [""] * world, [""] * world

    def rank_main(rank: int) -> None:
        ranks = ThreadRanks(rank, barrier, said)
        try:
            work(ranks)
        except BaseException as error:
            raised[rank] = f"{type(error).__name__}: {error}"
            if not isinstance(error, Exception):
                barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def fork_rank(rank: int, world: int, port: int, work: Callable[[Callable[[object], None]], object]) -> tuple[int, int]:
    """Do `work` in a process as torchrun starts it, forked: imports cost it nothing.

    Args:
        work: gets a function that tells this process something, a line.

    Returns:
        the process's id, and the end of a pipe to read what it tells from.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none of them is at work
        child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(lambda text: os.write(writing, f"{text}\n".encode()) and None)
        code = 0
    except BaseException as error:
        os.write(writing, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def fork_ranks(world: int, work: Callable[[Callable[[object], None]], object]) -> list[list[str]]:
    """Do `work` on every rank, each a forked process; returns the lines that each rank told, its error the last."""
    port = free_port()
    children = [fork_rank(rank, world, port, work) for rank in range(world)]
    told = []
    for child, reading in children:
        with open(reading, encoding="utf-8") as file:
            told.append(file.read().splitlines())
        os.waitpid(child, 0)
    return told


class StandInNpu:
    """What glmq uses of torch.npu, with a record of the calls."""

    def __init__(self, *, available: bool = True, bf16: bool = True, count: int = 1, name: str = "Ascend910B3") -> None:
        self.calls: list[str] = []
        self._available, self._bf16, self._count, self._name = available, bf16, count, name
        self._current = 0

    def is_available(self) -> bool:
        return self._available

    def is_bf16_supported(self) -> bool:
        return self._bf16

    def device_count(self) -> int:
        return self._count

    def get_device_name(self, device: int) -> str:
        assert device < self._count
        return self._name

    def set_device(self, device: int) -> None:
        self._current = device

    def set_compile_mode(self, *, jit_compile: bool) -> None:
        self.calls.append(f"jit_compile={jit_compile}")

    def current_device(self) -> int:
        return self._current

    def mem_get_info(self) -> tuple[int, int]:
        return 3 * 2**30, 2**36

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
