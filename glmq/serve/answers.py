"""`python -m glmq.serve.answers`: a process of its own in which vLLM loads one checkpoint, answers, and ends.

Reads a request (JSON) from the file that is its first argument and writes what was answered into its second; what vLLM
prints goes to the standard streams. `glmq.serve.agreement` starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import vllm
from PIL import Image


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer every question greedily, and say how likely the given answers are.

    Args:
        request: `model`: folder; `max_tokens`: of an answer; `context`: tokens of the longest question and answer;
            `questions`: each with `ids` (image placeholder once), `image` (path or null) and `given` (ids of an answer, or
            null).

    Returns:
        `version` of vLLM, and `answers`: each with `text`, `ids`, `logprobs` of the ids, and `given`: log probability and
        rank of each token of the given answer.
    """
    engine = vllm.LLM(
        model=request["model"],
        enforce_eager=True,
        max_model_len=request["context"],
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1, "video": 0},
        enable_prefix_caching=False,
    )
    questions = request["questions"]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=0)
    made = [output.outputs[0] for output in engine.generate([_prompt(q, []) for q in questions], greedy)]
    answers = [
        {
            "text": one.text,
            "ids": list(one.token_ids),
            "logprobs": [step[token].logprob for step, token in zip(one.logprobs, one.token_ids)],
        }
        for one in made
    ]
    asked = [(own, question) for own, question in zip(answers, questions) if question["given"]]
    scoring = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = engine.generate([_prompt(question, question["given"]) for _, question in asked], scoring) if asked else []
    for (own, question), output in zip(asked, scored):
        given = question["given"]
        places = zip(output.prompt_logprobs[-len(given) :], given)
        own["given"] = [[place[token].logprob, place[token].rank] for place, token in places]
    return {"version": vllm.__version__, "answers": answers}


def _prompt(question: dict[str, Any], answer_ids: list[int]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": question["ids"] + answer_ids}
    if question["image"] is not None:
        with Image.open(question["image"]) as image:
            prompt["multi_modal_data"] = {"image": image.convert("RGB")}
    return prompt


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
