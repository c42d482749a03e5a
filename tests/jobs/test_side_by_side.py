"""What verify and ask plan before they run, against what they then do."""

from pathlib import Path

import pytest

import glmq
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.progress import BlockStep, Event, PassDone, PassStarted, RunPlanned
from glmq.records import BlockDone
from glmq.verification.cases import Case
from glmq.verification.int8_model import open_model
from glmq.verification.trial import guess_forward, time_of_token, try_forward, weigh_cases


def passes(events: list[Event]) -> list[tuple[str, list[str]]]:
    """Of each pass that was run: its title and the blocks that it finished."""
    found: list[tuple[str, list[str]]] = []
    for event in events:
        if isinstance(event, PassStarted):
            found.append((event.title, []))
        elif isinstance(event, BlockDone):
            found[-1][1].append(event.name)
    return found


@pytest.mark.slow
def test_verify_plans_the_passes_that_it_runs_and_tells_the_sample_within_a_block(
    half: Path, half_seed: Path, pictures: Path
) -> None:
    events: list[Event] = []
    cases = glmq.CaseOptions(images=pictures, limit=2)
    glmq.verify(half_seed, reference=half, cases=cases, watch=events.append)
    (planned,) = (event for event in events if isinstance(event, RunPlanned))
    assert events[0] == planned
    done = passes(events)
    assert [one.title for one in planned.passes] == [title for title, _ in done] == ["files", "verify", "captions"]
    assert [step.name for step in planned.passes[1].steps] == done[1][1]
    assert done[2][1] == ["00.png", "01.png"] * 2
    assert [step.kind for step in planned.passes[2].steps] == ["float", "float", "candidate", "candidate"]
    assert all(step.seconds > 0 for one in planned.passes for step in one.steps)
    files = next(event for event in events if isinstance(event, PassStarted))
    (read,) = (event.nbytes for event in events if isinstance(event, PassDone) and event.time.title == "files")
    assert (files.unit, files.total) == ("bytes", read)
    inside = [(event.done, event.parts) for event in events if isinstance(event, BlockStep)]
    assert inside == [(0, 2), (1, 2)] * (len(done[1][1]) - 1)  # the merger has no samples of its own


@pytest.mark.slow
def test_ask_plans_the_question_and_the_longest_answer(half: Path, pictures: Path) -> None:
    events: list[Event] = []
    glmq.ask(half, image=pictures / "00.png", max_new_tokens=3, watch=events.append)
    (planned,) = (event for event in events if isinstance(event, RunPlanned))
    question, answer = planned.passes
    (first, blocks), (second, tokens) = passes(events)
    assert (question.title, answer.title) == (first, second) == ("read the question", "answer")
    assert [step.name for step in question.steps] == blocks
    assert (len(answer.steps), len(tokens)) == (1, 3)
    assert all(step.seconds > 0 for one in planned.passes for step in one.steps)


def test_a_trial_has_a_step_for_each_block_as_a_guess_has(small: Path) -> None:
    with Checkpoint.open(small) as source:
        config = read_config(small)
        preprocessor = Preprocessor(small, config, max_pixels=None, trust_remote_code=False)
        short, long = (
            preprocessor.encode(None, prompt, None) for prompt in ("What?", "What is it, and where, and why?")
        )
        cases = [Case("a", False, lambda: short), Case("b", False, lambda: long)]
        load = weigh_cases(cases)
        assert (load.tokens, load.patches, load.largest) == (short.tokens + long.tokens, 0, long)
        model = open_model(source, config)
        tried, guessed = try_forward(model, load), guess_forward(config, load)
        assert [step.name for step in tried] == [block.name for block in config.family.text_blocks(config)]
        assert [(step.name, step.kind) for step in tried] == [(step.name, step.kind) for step in guessed]
        assert min(step.seconds for step in (*tried, *guessed)) > 0
        with model.placed(tried[0].name):
            assert time_of_token(model, tried[0].name) > 0
