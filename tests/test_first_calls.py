import subprocess
import sys
from importlib import import_module

import pytest
import torch
from programs import forget, start
from torch.utils._python_dispatch import TorchDispatchMode

from glmq.first_calls import VECTOR_FUNCTIONS

STORM = """
import os
import sys

import torch

torch.set_num_threads(1)  # a thread of the parent's would not survive the fork
import glmq.device

numbers = torch.linspace(0.01, 0.99, 31_104)  # two chunks, as torch cuts them
for child in range(60):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(2)
        os._exit(not torch.equal(numbers.log10(), numbers.log10()))
    if os.waitpid(pid, 0)[1]:
        sys.exit("the first call had other results than the second")
"""
"""Without the calls that the import makes, one child in 40 to 600 sees two results, by how busy the machine is. What surely
fails without them is the test of the import."""


@pytest.mark.parametrize("module", ["glmq.device", "glmq.numerics"])
def test_the_import_calls_every_function_on_one_number_of_either_precision(module: str) -> None:
    def program() -> None:
        forget("glmq")
        with _Calls() as calls:
            import_module(module)
        wanted = {(name, dtype) for name in VECTOR_FUNCTIONS for dtype in (torch.float32, torch.float64)}
        print(wanted <= calls.found, calls.sizes)

    done = start(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True {1}\n", "")


class _Calls(TorchDispatchMode):
    """Which operations run, on which dtypes and how many numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, torch.dtype]] = set()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.found.add((name.removeprefix("special_"), result.dtype))
        self.sizes.add(result.numel())
        return result


@pytest.mark.slow
def test_a_function_first_gives_what_it_always_gives() -> None:
    run = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
