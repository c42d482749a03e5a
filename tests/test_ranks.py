import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import run_ranks

import glmq.ranks
from glmq.errors import LostRanksError, MeetingError, OtherRankError, UsageError
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


@pytest.mark.parametrize(("rank", "world"), [("4", "4"), ("-1", "4"), ("one", "4"), ("0", "two")])
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


def meet_again(ranks: Ranks, tell: Callable[[object], None]) -> None:
    try:
        ranks.all_gather("again")
    except LostRanksError as error:
        tell(str(error).partition("(")[0])


@pytest.mark.slow
def test_ranks_hear_each_other_and_notice_who_hangs_and_who_dies() -> None:
    second_port = str(helpers.free_port())
    lost, is_lost = os.pipe()

    def work(tell: Callable[[object], None]) -> None:
        place = read_place()
        with Ranks(place, timedelta(seconds=1)) as ranks:
            tell(ranks.all_gather(f"word {place.rank}"))
            mine = [torch.arange(place.rank + 2.0, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(place.rank)]
            tell(ranks.all_gather_tensors(mine[place.rank :]))
            tell(ranks.gather(mine[place.rank :]))
            try:
                ranks.all_gather("", ValueError("bad") if place.rank == 1 else None)
            except (OtherRankError, ValueError) as error:
                tell(error)
            if place.rank == 1:
                os.read(lost, 1)  # hangs, until rank 0 has given it up
            else:
                meet_again(ranks, tell)
                os.write(is_lost, b"!")
        os.environ["MASTER_PORT"] = second_port
        with Ranks(place, timedelta(hours=1)) as ranks:
            tell(ranks.all_gather(f"word {place.rank}"))
            if place.rank == 1:
                os._exit(0)
            meet_again(ranks, tell)

    words, gone = "['word 0', 'word 1']", "rank 0 of 2: lost the other ranks "
    first = "[tensor([0., 1.], dtype=torch.bfloat16), tensor([]), tensor(0)]"
    second = "[tensor([]), tensor(1)]"
    shared = f"[{first}, {second}]"
    assert helpers.fork_ranks(2, work) == [
        [words, shared, shared, "stopped because rank 1 failed: bad", gone, words, gone],
        [words, shared, f"[[], {second}]", "bad", words],
    ]
    os.close(lost)
    os.close(is_lost)


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> str:
    """A port that nobody listens on; the environment says that two ranks meet there."""
    port = str(helpers.free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return port


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of who waits for others pass in one."""
    monkeypatch.setattr(glmq.ranks, "time", SimpleNamespace(monotonic=lambda: 10 * time.monotonic(), sleep=time.sleep))


ADVICE = "start all 2 with torchrun, or for one process alone: unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"


@pytest.mark.usefixtures("hurried")
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
    assert (caught.value.exit_code, caught.value.code) == (5, "GLMQ-E541")


@pytest.mark.usefixtures("hurried")
def test_the_others_have_five_minutes_to_come(free_port: str) -> None:
    notes: list[str] = []

    def stop(text: str) -> None:
        notes.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Ranks(Place(1, 2), note=stop):
        pass
    assert f"waits for rank 0 at 127.0.0.1:{free_port}, for at most 5 minutes; " in notes[0]


class Ended(BaseException):
    """Raised by the signal of this test."""


def wait_for_the_others(tell: Callable[[object], None]) -> None:
    def end(*_: object) -> None:
        raise Ended

    signal.signal(signal.SIGTERM, end)
    with Ranks(read_place(), note=lambda text: tell("waiting")):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("sent", "said"), [(signal.SIGTERM, "Ended: "), (signal.SIGINT, "KeyboardInterrupt: ")])
def test_a_rank_that_waits_hears_signals(rank: int, sent: signal.Signals, said: str) -> None:
    process, reading = helpers.fork_rank(rank, 2, helpers.free_port(), wait_for_the_others)
    with open(reading, encoding="utf-8") as lines:
        assert lines.readline() == "waiting\n"
        os.kill(process, sent)
        assert lines.read() == f"{said}\n"
    os.waitpid(process, 0)


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


@pytest.mark.parametrize("host", ["no-such-host.invalid", "two..dots", "a" * 70, "127.0.0.1:29500", "two words"])
def test_a_name_that_does_not_resolve_is_said_in_one_sentence(
    host: str, free_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    with pytest.raises(MeetingError) as caught, Ranks(Place(1, 2)):
        pass
    found = str(caught.value)
    assert found.startswith(f"MASTER_ADDR={host} MASTER_PORT={free_port}, where the 2 ranks of WORLD_SIZE ")
    assert "meet, cannot be resolved (" in found
    assert found.endswith(f"); {ADVICE}")


@pytest.mark.parametrize("port", ["0", "65536", "99999", "tcp", "-1"])
def test_a_port_that_is_none_is_wrong_usage(port: str, free_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UsageError) as caught, Ranks(Place(0, 2)):
        pass
    assert str(caught.value) == (
        f"WORLD_SIZE=2 and RANK=0 are set, but MASTER_ADDR=127.0.0.1 and MASTER_PORT={port} are not what torchrun sets; "
        f"{ADVICE}"
    )


def test_empty_variables_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert read_place() == Place(0, 1)


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

    sentence = "LaunchError: rank 2 has limit '2', rank 0 has '1'; start all ranks alike"
    assert run_ranks(3, rank_main) == [sentence] * 3
    Ranks(Place(0, 1)).check_same({"limit": "1"})
