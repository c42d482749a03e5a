import subprocess
import sys

import pytest

STORM = """
import os
import sys

import torch

torch.set_num_threads(1)  # a thread of the parent's would not survive the fork
import {module}

numbers = torch.linspace(0.01, 0.99, 31_104)  # two chunks, as torch cuts them
for child in range(60):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(2)
        os._exit(not torch.equal(numbers.log10(), numbers.log10()))
    if os.waitpid(pid, 0)[1]:
        sys.exit("the first call had other results than the second")
"""
"""Without the calls that the import makes, one child in forty sees two results, and nearly always one of both tests fails."""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["glmq.device", "glmq.numerics"])
def test_a_function_first_gives_what_it_always_gives(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", STORM.format(module=module)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
