"""A small float model, and a good quantized checkpoint of every kind made from it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from handmade import CONFIG, KINDS, SIDE_FILES, Make, build, make_tensor, small_config
from safetensors.torch import save_file

from glmq.checkpoint.reader import Checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    directory = tmp_path_factory.mktemp("float")
    generator = torch.Generator().manual_seed(3)
    tensors = {name: make_tensor(shape, generator) for name, shape in CONFIG.family.shapes(CONFIG).items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(small_config()))
    for name in SIDE_FILES:
        (directory / name).write_text(json.dumps({"name": name}))
    with Checkpoint.open(directory) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="session")
def good(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good checkpoint of every kind."""
    root = tmp_path_factory.mktemp("good")
    for label, (quant_type, dtype, form, shard_bytes) in KINDS.items():
        build(source, root / label, quant_type, dtype, form=form, shard_bytes=shard_bytes)
    return {label: root / label for label in KINDS}


@pytest.fixture
def make(good: dict[str, Path], tmp_path: Path) -> Make:
    """A fresh copy of a good checkpoint."""

    def copy(label: str) -> Path:
        return Path(shutil.copytree(good[label], tmp_path / label))

    return copy
