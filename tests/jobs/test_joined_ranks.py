"""Two real processes: what differs between machines differs between processes too."""

import os
import socket
import subprocess
import sys

import pytest
from helpers import PACKAGES

from glmq.numerics import gptq

PROGRAM = """
import os, sys
from pathlib import Path
import torch
from glmq.errors import UsageError
from glmq.jobs.calibrate import CalibrationOptions
from glmq.jobs.joined_ranks import join_ranks
from glmq.numerics import gptq
from glmq.ranks import read_place

place, kernels = read_place(), gptq.KERNELS
for port, what in zip(sys.argv[1:], ["nothing", "threads", "limit", "rounding"]):
    os.environ["MASTER_PORT"] = port
    is_odd = place.rank == 1
    torch.set_num_threads(2 if is_odd and what == "threads" else 1)
    gptq.KERNELS = ("another",) if is_odd and what == "rounding" else kernels
    options = CalibrationOptions(limit=7 if is_odd and what == "limit" else 8)
    try:
        with join_ranks(place, {"out": Path("out"), "options": options}) as ranks:
            print("joined", ranks.all_gather("here"))
    except UsageError as error:
        print(error)
"""


@pytest.mark.slow
def test_ranks_that_differ_are_refused_before_any_work() -> None:
    ports = []
    for _ in range(4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *ports],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": str(rank)},
            cwd=PACKAGES,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert (
        said[0]
        == said[1]
        == [
            "joined ['here', 'here']",
            "rank 1 has threads '2', rank 0 has '1'; start all ranks alike",
            "rank 1 has limit '7', rank 0 has '8'; start all ranks alike",
            f"rank 1 has rounding 'another', rank 0 has '{gptq.rounding_kernel()}'; start all ranks alike",
        ]
    )
