"""Two real processes: what differs between machines differs between processes too."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import fork_ranks, free_port

from glmq.errors import UsageError
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.joined_ranks import join_ranks
from glmq.numerics import gptq
from glmq.ranks import read_place


@pytest.mark.slow
def test_ranks_that_differ_are_refused_before_any_work() -> None:
    differences = {what: str(free_port()) for what in ("nothing", "threads", "limit", "rounding")}
    assert len(set(differences.values())) == 4

    def work(tell: Callable[[object], None]) -> None:
        place, kernels = read_place(), gptq.KERNELS
        is_odd = place.rank == 1
        for what, port in differences.items():
            os.environ["MASTER_PORT"] = port
            torch.set_num_threads(2 if is_odd and what == "threads" else 1)
            gptq.KERNELS = ("another",) if is_odd and what == "rounding" else kernels
            options = CalibrationOptions(limit=7 if is_odd and what == "limit" else 8)
            try:
                with join_ranks(place, {"out": Path("out"), "options": options}) as ranks:
                    tell(f"joined {ranks.all_gather('here')}")
            except UsageError as error:
                tell(error)

    wanted = [
        "joined ['here', 'here']",
        "rank 1 has threads '2', rank 0 has '1'; start all ranks alike",
        "rank 1 has limit '7', rank 0 has '8'; start all ranks alike",
        f"rank 1 has rounding 'another', rank 0 has '{gptq.rounding_kernel()}'; start all ranks alike",
    ]
    assert fork_ranks(2, work) == [wanted, wanted]
