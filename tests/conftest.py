"""Fixtures that many rooms share: the tiny trained model, a smaller random one, their statistics, a quantized checkpoint.

Libraries are imported where they are used: pytest-xdist's first process reads this file too and needs none of them.
"""

from __future__ import annotations

import copy
import ctypes
import fcntl
import gc
import json
import os
import pickle
import platform
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from glmq.model.config import ModelConfig

# A shell's background job ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if platform.libc_ver()[0] == "glibc":  # keep what small models free for the next one, as glmq/cli/malloc.py does
    for option, value in ((-1, 2**30), (-2, 2**26), (-3, 2**30)):
        ctypes.CDLL(None).mallopt(option, value)
for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(name, None)  # they change how typer and rich draw
os.environ["OMP_NUM_THREADS"] = "1"  # the suite shares small machines, and idle threads of a pool spin
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers looks at it when it is imported
# Containers like to forbid it, but each process would compile glmq and the tests again, which takes it five seconds.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


gc.disable()


def pytest_collection_finish() -> None:
    """Imported modules and collected tests stay: the garbage collector need not look at them again and again; nor, as in the
    program, at what is new every 700 objects."""
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _quick_files_and_words() -> Iterator[None]:
    """Leave out what costs a third of the suite's time and shows nothing after its first time: waiting for the disk, a child
    process for each prompt that a chat template has rendered before, building the same model or tokenizer again, most of
    the words of a caption, and the six longest of the eight texts that follow the pictures of a calibration, where a test does
    not ask for `all_texts`."""
    from glmq.calibration.samples import builtin_texts
    from glmq.model import inputs, streamed
    from glmq.model.inputs import Preprocessor

    rendered: dict[tuple[object, bool, str], str] = {}
    render_once = Preprocessor._render_once

    def render(self: Preprocessor, has_image: bool, prompt: str) -> str:
        key = (str(self._tokenizer.chat_template), has_image, prompt)
        if key not in rendered:
            rendered[key] = render_once(self, has_image, prompt)
        return rendered[key]

    models: dict[str, bytes] = {}  # a third of the time of a deep copy
    build_on_meta = streamed._build_on_meta

    def build(config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
        key = f"{dtype} {config.family.model_class} {json.dumps(config.nested)}"
        if key not in models:
            models[key] = pickle.dumps(build_on_meta(config, dtype))
        model: torch.nn.Module = pickle.loads(models[key])
        return model

    tokenizers: dict[tuple[tuple[str, bytes], ...], PreTrainedTokenizerBase] = {}
    load_tokenizer = inputs._load_tokenizer

    def load(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix != ".safetensors")
        if trust_remote_code or not str(directory).isascii() or sum(path.stat().st_size for path in files) > 2**20:
            return load_tokenizer(directory, trust_remote_code=trust_remote_code)
        key = tuple((path.name, path.read_bytes()) for path in files)
        if key not in tokenizers:
            tokenizers[key] = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        return copy.copy(tokenizers[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(streamed, "_build_on_meta", build)
        patch.setattr(inputs, "_load_tokenizer", load)
        patch.setattr(Preprocessor, "_render_once", render)
        patch.setattr("glmq.jobs.side_by_side.CAPTION_TOKENS", 8)
        patch.setattr("glmq.jobs.calibrate.builtin_texts", lambda: builtin_texts()[-2:])
        yield


@pytest.fixture(autouse=True)
def _heeded_signals() -> Iterator[None]:
    """A command that was stopped ignores signals until its process ends; that of the tests goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def all_texts() -> Iterator[None]:
    """Every text that comes with glmq follows the pictures, as for its users."""
    from helpers import with_all_texts

    with with_all_texts():
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded trained model: 6 text layers, 3 vision blocks, bf16. Do not write into it."""
    from glmq.model.tiny import TINY_CHECKPOINT

    return TINY_CHECKPOINT


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The 16 pictures that the tiny model is calibrated on."""
    from glmq.model.tiny import TINY_PICTURES

    return TINY_PICTURES


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, made by the first test process that asks for it and read by all. Do not write into it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stats(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's statistics folder over all 16 pictures."""
    from helpers import calibrate, with_all_texts

    with with_all_texts():
        return once(tmp_path_factory, "tiny-stats", lambda out: calibrate(tiny, out, pictures))


@pytest.fixture(scope="session")
def tiny_seed(tiny: Path, tiny_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized: W8A8S by sigma, fp16."""
    from helpers import W8A8S, quantize

    return once(tmp_path_factory, "tiny-w8a8s", lambda out: quantize(tiny, tiny_stats, out, **W8A8S))


@pytest.fixture(scope="session")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three text layers of the tiny model, in one file: trained weights in half the time. Do not write into it."""
    from helpers import edit_json
    from safetensors.torch import load_file, save_file

    def make(folder: Path) -> None:
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*", "cases", "pictures"))
        edit_json(folder / "config.json", lambda config: config["text_config"].update(num_hidden_layers=3))
        tensors = {name: tensor for path in tiny.glob("*.safetensors") for name, tensor in load_file(path).items()}
        kept = {
            name: tensor for name, tensor in tensors.items() if not re.search(r"language_model\.layers\.[345]\.", name)
        }
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return once(tmp_path_factory, "half", make)


@pytest.fixture(scope="session")
def half_stats(half: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those three layers' statistics over three pictures, with the second moments of wide inputs."""
    from helpers import calibrate, with_all_texts

    def make(folder: Path) -> None:
        with with_all_texts():
            calibrate(half, folder, pictures, limit=3, wide_moments=True)

    return once(tmp_path_factory, "half-stats", make)


@pytest.fixture(scope="session")
def half_seed(half: Path, half_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those three layers quantized: W8A8S by sigma, fp16."""
    from helpers import W8A8S, quantize

    return once(tmp_path_factory, "half-w8a8s", lambda out: quantize(half, half_stats, out, **W8A8S))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights: 2 text layers of width 64, 1 vision block of width 32, bf16. Do not write into it."""
    from make_checkpoint import Size, make_checkpoint

    return once(tmp_path_factory, "small", lambda folder: make_checkpoint(folder, Size()))


@pytest.fixture(scope="session")
def small_stats(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's statistics over two pictures."""
    from helpers import calibrate

    return once(tmp_path_factory, "small-stats", lambda out: calibrate(small, out, pictures, limit=2))


@pytest.fixture(scope="session")
def small_seed(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model quantized: W8A8S by sigma, fp16. Do not write into it."""
    from helpers import W8A8S, quantize

    return once(tmp_path_factory, "small-w8a8s", lambda out: quantize(small, small_stats, out, **W8A8S))


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """The small model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    return folder


@pytest.fixture(scope="session")
def packing_library() -> ModuleType:
    """compressed_tensors, without torch's compiler, which takes longer to import than the tests that use the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", lambda function=None, **_: function or (lambda decorated: decorated))
        library: ModuleType = pytest.importorskip("compressed_tensors")
        import_module("compressed_tensors.compressors")
        return library


@pytest.fixture(scope="session")
def full_model(tiny: Path) -> torch.nn.Module:
    """The tiny model as transformers itself loads it, in float32."""
    import torch
    from helpers import load_full

    return load_full(tiny, torch.float32)
