import os
import socket
import subprocess
import sys

import pytest
from helpers import PACKAGES

from glmq.errors import UsageError
from glmq.ranks import Place, Ranks, read_place


def test_a_process_alone_is_rank_0_of_1_and_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert read_place() == Place(0, 1)
    with Ranks(Place(0, 1)) as ranks:
        assert ranks.gather("text") == ["text"]


def test_rank_and_world_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "10")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert read_place() == Place(10, 16, 2)


@pytest.mark.parametrize(("rank", "world"), [("4", "4"), ("-1", "4"), ("one", "4"), ("0", "")])
def test_an_environment_that_torchrun_does_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, world: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError) as caught:
        read_place()
    assert str(caught.value) == (
        f"RANK={rank}, WORLD_SIZE={world} and LOCAL_RANK=0: are not what torchrun sets; unset them or use torchrun"
    )


PROGRAM = """
import os, sys, time
from datetime import timedelta
import torch
from glmq.ranks import Ranks, LostRanksError, OtherRankError, read_place

place = read_place()

def meet_again(ranks):
    try:
        ranks.all_gather("again")
    except LostRanksError as error:
        print(str(error).partition("(")[0], flush=True)

os.environ["MASTER_PORT"] = sys.argv[1]
with Ranks(place, timedelta(seconds=1)) as ranks:
    print(ranks.all_gather("word %d" % place.rank), flush=True)
    given = [torch.arange(place.rank + 2.0, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(place.rank)][place.rank:]
    print(ranks.all_gather_tensors(given), flush=True)
    print(ranks.gather(given), flush=True)
    try:
        ranks.all_gather("", ValueError("bad") if place.rank == 1 else None)
    except (OtherRankError, ValueError) as error:
        print(error, flush=True)
    if place.rank == 1:
        time.sleep(2)
    else:
        meet_again(ranks)
os.environ["MASTER_PORT"] = sys.argv[2]
with Ranks(place, timedelta(hours=1)) as ranks:
    print(ranks.all_gather("word %d" % place.rank), flush=True)
    if place.rank == 1:
        os._exit(0)
    meet_again(ranks)
"""


def test_ranks_hear_each_other_and_notice_who_hangs_and_who_dies() -> None:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank)},
            cwd=PACKAGES,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    words, lost = "['word 0', 'word 1']\n", "rank 0 of 2: lost the other ranks \n"
    first = "[tensor([0., 1.], dtype=torch.bfloat16), tensor([]), tensor(0)]"
    second = "[tensor([]), tensor(1)]"
    shared = f"[{first}, {second}]\n"
    told = "stopped because rank 1 failed: bad\n"
    assert [out for out, _ in said] == [
        words + shared + shared + told + lost + words + lost,
        words + shared + f"[[], {second}]\n" + "bad\n" + words,
    ], said
