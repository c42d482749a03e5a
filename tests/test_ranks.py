import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from helpers import PACKAGES, run_ranks

from glmq.errors import MeetingError, UsageError
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
from glmq.errors import LostRanksError, OtherRankError
from glmq.ranks import Ranks, read_place

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


@pytest.mark.slow
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


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> str:
    """A port that nobody listens on; the environment says that two ranks meet there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return port


ADVICE = "start all 2 with torchrun, or for one process alone: unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_alone_with_the_variables_of_another_job_says_what_it_waits_for_and_gives_up(
    free_port: str, rank: int
) -> None:
    notes: list[str] = []
    with (
        pytest.raises(MeetingError) as caught,
        Ranks(Place(rank, 2), meeting_limit=timedelta(seconds=3), note=notes.append),
    ):
        pass
    assert notes == [
        f"rank {rank} of 2 waits for rank {1 - rank} at 127.0.0.1:{free_port}, for at most 3 seconds; {ADVICE}"
    ]
    assert str(caught.value) == (
        f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port}, where the 2 ranks of WORLD_SIZE meet, "
        f"was not reached by rank {1 - rank} within 3 seconds; {ADVICE}"
    )
    assert (caught.value.exit_code, caught.value.code) == (5, "no-ranks")


def test_the_others_have_five_minutes_to_come(free_port: str) -> None:
    notes: list[str] = []

    def stop(text: str) -> None:
        notes.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Ranks(Place(1, 2), note=stop):
        pass
    assert f"waits for rank 0 at 127.0.0.1:{free_port}, for at most 5 minutes; " in notes[0]


WAITING = """
import signal, sys
from glmq.ranks import Ranks, read_place

class Ended(BaseException):
    pass

def end(*_):
    raise Ended

signal.signal(signal.SIGTERM, end)
try:
    with Ranks(read_place(), note=lambda text: print("waiting", flush=True)):
        pass
except (Ended, KeyboardInterrupt) as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("sent", "said"), [(signal.SIGTERM, "Ended"), (signal.SIGINT, "KeyboardInterrupt")])
def test_a_rank_that_waits_hears_signals(free_port: str, rank: int, sent: signal.Signals, said: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)},
        cwd=PACKAGES,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent)
    assert process.communicate(timeout=30)[0] == f"{said}\n"
    assert process.returncode == 0


def test_a_taken_port_is_said_in_one_sentence(free_port: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(free_port)))
        other.listen()
        with pytest.raises(MeetingError) as caught, Ranks(Place(0, 2)):
            pass
    assert str(caught.value) == (
        f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port}, where the 2 ranks of WORLD_SIZE meet, "
        f"is taken by another program; {ADVICE}"
    )


def test_a_name_that_does_not_resolve_is_said_in_one_sentence(free_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(MeetingError) as caught, Ranks(Place(1, 2)):
        pass
    found = str(caught.value)
    assert found.startswith(
        f"MASTER_ADDR=no-such-host.invalid MASTER_PORT={free_port}, where the 2 ranks of WORLD_SIZE "
    )
    assert "meet, cannot be resolved (" in found
    assert found.endswith(f"); {ADVICE}")


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_of_the_variables_are_told_apart(free_port: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(missing)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with pytest.raises(UsageError) as caught, Ranks(Place(0, 2)):
        pass
    assert str(caught.value) == (
        f"WORLD_SIZE=2 and RANK=0 are set, but MASTER_ADDR={address} and MASTER_PORT={port} "
        f"are not what torchrun sets; {ADVICE}"
    )


def test_a_rank_that_differs_is_refused_on_every_rank_with_both_values() -> None:
    def rank_main(ranks: Ranks) -> None:
        ranks.check_same({"threads": "1"})
        ranks.check_same({"limit": "2" if ranks.place.rank == 2 else "1", "threads": "1"})

    sentence = "UsageError: rank 2 has limit '2', rank 0 has '1'; start all ranks alike"
    assert run_ranks(3, rank_main) == [sentence] * 3
    Ranks(Place(0, 1)).check_same({"limit": "1"})
