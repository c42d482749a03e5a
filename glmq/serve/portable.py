"""`--load-format glmq`: what `glmq compress --codec portable` wrote of one rank, decoded while vLLM loads it."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from glmq.checkpoint.description import ASCEND_V1
from glmq.compression.origin import SOURCE_FOLDER
from glmq.compression.restore import read_portable_manifest, restored_tensors

LOAD_FORMAT: Final = "glmq"


def portable_description(folder: Path) -> Path:
    """Where a portable folder of one rank keeps the description of the checkpoint that it was made from."""
    return folder / SOURCE_FOLDER / ASCEND_V1


class PortableLoader(DefaultModelLoader):
    """vLLM's own loader, with decoded tensors in place of those of safetensors files."""

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: a portable folder is local."""

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Raises CheckpointError or CodecError where the folder is none of one rank, or is damaged."""
        folder = Path(source.model_or_path)
        self.counter_before_loading_weights = time.perf_counter()
        for name, tensor in restored_tensors(folder, read_portable_manifest(folder), torch.get_num_threads()):
            yield source.prefix + name, tensor
