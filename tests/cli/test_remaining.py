"""How long a run still takes, from its plan and from what its blocks have taken."""

import math

import pytest

from glmq.cli.remaining import Remaining
from glmq.progress import BlockStep, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan
from glmq.records import BlockDone, PassTime


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plan(*passes: tuple[str, list[tuple[str, float]]]) -> RunPlanned:
    return RunPlanned(tuple(PassPlan(title, tuple(StepPlan(k, k, s) for k, s in steps)) for title, steps in passes))


def done(index: int, seconds: float, total: int = 4) -> BlockDone:
    return BlockDone(f"block {index}", index, total, seconds, 0)


PLAN = plan(("calibrate", [("vision", 10.0), ("text", 40.0), ("text", 40.0)]), ("quantize", [("text", 100.0)]))


def test_before_the_first_block_the_plan_counts(clock: Clock) -> None:
    found = Remaining(clock)
    assert (found.left(), found.place) == (None, None)
    found.see(PLAN)
    clock.now += 30.0  # getting ready is none of the work
    assert (found.left(), found.share()) == (190.0, 0.0)
    found.see(PassStarted("calibrate", "blocks", 3))
    assert found.place == (1, 2)
    clock.now += 4.0
    assert (found.left(), found.elapsed()) == (186.0, 34.0)
    assert found.share() == 4.0 / 190.0
    clock.now += 16.0
    assert found.left() == 180.0  # a block that takes longer than expected is about to end


def test_a_twentieth_of_the_tokens_tells_how_fast_they_come(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(plan(("answer", [("other", 10.0)])))
    found.see(PassStarted("answer", "tokens", 100))
    clock.now += 1.0
    found.see(done(4, 0.2, 100))
    assert found.left() == 0.95 * 20.0  # a twentieth of the tokens took 1 s


def test_a_kind_that_was_measured_corrects_itself_wholly_and_others_by_half(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(PLAN)
    found.see(PassStarted("calibrate", "blocks", 3))
    clock.now += 40.0
    found.see(done(0, 40.0))
    assert found.left() == 2.0 * (40.0 + 40.0 + 100.0)  # vision took 4 times as long
    clock.now += 20.0
    found.see(done(1, 20.0))
    pooled = math.sqrt((40.0 + 20.0) / (10.0 + 40.0))
    assert found.left() == pytest.approx(0.5 * 40.0 + pooled * 100.0)


def test_within_a_block_of_an_unknown_kind_its_own_speed_counts_by_its_share_once_a_fifth_is_done(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(plan(("calibrate", [("text", 40.0), ("text", 40.0)])))
    found.see(PassStarted("calibrate", "blocks", 2))
    found.see(BlockStep("a", 0, 0, 4, "samples", 0.0))
    clock.now += 20.0
    found.see(BlockStep("a", 0, 1, 4, "samples", 0.25))
    assert found.left() == pytest.approx(1.75 * 40.0 * 2.0**0.25)
    found.see(BlockStep("a", 0, 3, 4, "samples", 0.75))
    clock.now += 40.0
    assert found.left() == pytest.approx(1.25 * 40.0 * 2.0**0.75)
    clock.now += 20.0
    found.see(done(0, 80.0))
    found.see(BlockStep("b", 1, 0, 4, "samples", 0.0))
    clock.now += 20.0
    assert found.left() == 60.0


def test_a_recipe_of_a_sweep_takes_as_long_as_the_one_before_it(clock: Clock) -> None:
    found = Remaining(clock)
    one = [("quantize", [("text", 10.0)]), ("KL", [("vision", 1.0), ("text", 10.0)])]
    found.see(plan(*((f"{recipe}: {title}", steps) for recipe in ("a", "b: c") for title, steps in one)))
    found.see(PassStarted("a: quantize", "blocks", 1))
    found.see(done(0, 30.0, 1))
    assert found.left() == pytest.approx(math.sqrt(3.0) * 22.0 + 30.0)
    found.see(PassStarted("a: KL", "blocks", 2))
    found.see(done(0, 0.5, 2))
    found.see(done(1, 5.0, 2))
    assert found.left() == 30.0 + 0.5 + 5.0


def test_what_an_interrupted_run_has_finished_neither_counts_nor_teaches(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(plan(("quantize", [("text", 10.0)] * 4)))
    found.see(PassStarted("quantize", "blocks", 4, 2))
    assert found.left() == 20.0
    found.see(done(0, 0.0))
    found.see(done(1, 0.0))
    assert found.left() == 20.0


def test_a_pass_that_was_not_planned_changes_nothing(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(plan(("rate", [("text", 10.0)]), ("quantize", [("text", 30.0)])))
    found.see(PassStarted("rate", "blocks", 1))
    found.see(done(0, 10.0))
    found.see(PassDone(PassTime("rate", 10.0, 0, ()), 0))
    found.see(PassStarted("rate", "blocks", 1, 1))
    found.see(done(0, 0.0))
    assert (found.left(), found.place) == (30.0, (1, 2))
    found.see(PassStarted("quantize", "blocks", 1))
    assert (found.left(), found.place) == (30.0, (2, 2))


def test_without_a_plan_the_mean_of_the_blocks_counts(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(PassStarted("verify", "blocks", 4))
    assert (found.left(), found.place) == (None, None)
    found.see(done(0, 10.0))
    found.see(done(1, 20.0))
    assert found.left() == 30.0


def test_tokens_are_shares_of_one_step(clock: Clock) -> None:
    found = Remaining(clock)
    found.see(plan(("generate", [("other", 50.0)]), ("calibrate", [("text", 100.0)])))
    found.see(PassStarted("generate", "tokens", 10))
    clock.now += 40.0
    found.see(done(4, 8.0, total=10))
    assert found.left() == pytest.approx(0.5 * 80.0 + 100.0)
