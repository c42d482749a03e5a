"""What a command does not import, and that it is there for whoever asks."""

import subprocess
import sys

import pytest
import torch
from helpers import PACKAGES

from glmq.model import lean
from glmq.model.tiny import TINY_CHECKPOINT

PROGRAM = """
import sys
from pathlib import Path

import torch
import torch.utils.checkpoint

if "torch._inductor" in sys.modules:
    sys.exit("torch.utils.checkpoint, which transformers needs, imports the compiler")

from glmq.checkpoint.reader import Checkpoint
from glmq.model.streamed import StreamedModel
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.model.lean import no_compiler

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")

folder = Path(sys.argv[1])
config = read_config(folder)
Preprocessor(folder, config, max_pixels=None, trust_remote_code=False)  # the first to import transformers, as in a calibration
model = StreamedModel(Checkpoint.open(folder), config, device=torch.device("cpu"), dtype=torch.bfloat16)
print([name for name in HEAVY if name in sys.modules])
print("_dynamo" in vars(torch), torch.distributed.is_available())

with no_compiler():
    print(type(torch._dynamo.config).__name__)  # not in the stand-in: the real package answers
    print("torch._inductor" in sys.modules)
"""


@pytest.mark.slow
def test_a_model_is_built_without_the_compiler_which_is_real_for_whoever_asks() -> None:
    command = [sys.executable, "-c", PROGRAM, str(TINY_CHECKPOINT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGES)
    if result.stderr.startswith("torch.utils.checkpoint"):  # torch 2.4
        pytest.skip(f"torch {torch.__version__}: {result.stderr}")
    lines = result.stdout.splitlines()
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        lines[0] = lines[0].replace("'sympy'", "")  # the attention of transformers 5 takes it in
    assert lines == ["[]", "False True", "ConfigModuleInstance", "True"]


def test_the_compiler_is_left_alone_where_torchvision_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(lean, "find_spec", lambda name: object() if name == "torchvision" else None)
    with lean.no_compiler():
        assert "torch._dynamo" not in sys.modules
