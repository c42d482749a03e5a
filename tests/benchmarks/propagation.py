"""Whether rounding should undo what the linears rounded before it have done to its input, as QEP and GPTAQ do.

    python tests/benchmarks/propagation.py FOLDER --text exllamav3-*.whl [--modes W8A8 ...] [--sets 0 1 2] [--windows 4]
        [--forms quantized:0.5 ...]

A chain quantizes group after group: X are a group's inputs in the float model and X^ those in the model whose groups before
it are quantized, activations too, token by token over the calibration windows. In place of W it rounds
W* = W (I + a (X - X^)^T X^ (X^^T X^ + damping)^-1), with QEP's damping, a hundredth of the mean diagonal (Arai & Ichikawa
2025; Li et al. 2025 for GPTAQ); where the type has biases, they take the mean error that is left. A form names the second
moment that errors are weighed by, of the `float` model's inputs as in glmq or of the `quantized` model's, and the strength a;
`quantized:0` are sequential statistics alone. Channel scales, ranges, order and bits are those of plain rounding, which is
glmq's own and stands in the first row. FOLDER and the text are those of real_llm.py. KL in nats per token against the float
model, on held-out text.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from input_noise import OPTIONS, USUAL_MODES, calibration_sets
from real_llm import BiasedNorm, Model, Quantized, Quantizer, calibrate, judge
from torch import Tensor

from glmq.checkpoint.linears import encode_linear
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import RateCurve
from glmq.quantization.group import FloatLinear, GroupScheme, PreparedGroup, RowFold, prepare_group
from glmq.quantization.layer import GroupResult, quantize_group, rate_curves
from glmq.spec import FloatDtype, Form

DAMPING: Final = 0.01
FORMS: Final = ("quantized:0", "quantized:0.25", "quantized:0.5", "quantized:1", "float:0.5")


@torch.no_grad()
def float_inputs(model: Model) -> dict[str, Tensor]:
    """The float model's inputs of every quantized group, by its first linear: float32 [windows, tokens, K]."""
    seen: dict[str, list[Tensor]] = {group.linears[0]: [] for group in model.groups()}
    handles = [
        model.model.get_submodule(site).register_forward_pre_hook(lambda _, args, own=own: own.append(args[0][0]))
        for site, own in seen.items()
    ]
    for ids in model.calibration:
        model.model.model(ids[None])
    for handle in handles:
        handle.remove()
    return {site: torch.stack(own) for site, own in seen.items()}


class Chain:
    """A `quantize_group` that has to be called in model order: it keeps the model as it is quantized so far.

    Args:
        model: the float model, with the calibration windows.
        inputs: of `float_inputs`.
        strength: a.
        sequential: whether errors are weighed by the second moment of the quantized model's inputs.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Tensor], strength: float, sequential: bool) -> None:
        self._inputs, self._strength, self._sequential = inputs, strength, sequential
        self._made = copy.deepcopy(model.model)
        self._stream: Tensor = self._made.model.embed_tokens(model.calibration)
        positions = torch.arange(model.calibration.shape[1])[None]
        self._rotations = self._made.model.rotary_emb(self._stream, positions)
        self._attended = torch.zeros(0)
        """The input of o_proj, between the q/k/v group and its own."""

    @torch.no_grad()
    def __call__(
        self,
        linears: Sequence[FloatLinear],
        stats: InputStats,
        scheme: GroupScheme,
        *,
        norm_weight: Tensor | None,
        dtype: FloatDtype,
        fold: RowFold,
        bits: Sequence[float] | None,
    ) -> GroupResult:
        site = linears[0].name
        x = self._reached(site, fold).flatten(0, 1)
        away = self._inputs[site].flatten(0, 1) - x
        moment = (x.T @ x / len(x)).double()
        damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
        pull = self._strength * torch.linalg.solve(damped, (x.T @ away / len(x)).double()).T
        mean = x.mean(0)
        target = mean + self._strength * away.mean(0)
        moved = []
        for linear in linears:
            weight = (linear.weight.double() + linear.weight.double() @ pull).float()
            bias = linear.weight @ target - weight @ mean if scheme.bias_correction else None
            moved.append(replace(linear, weight=weight, bias=bias))
        seen = replace(stats, mean=mean)
        if self._sequential:
            seen = replace(seen, second_moment=moment.float(), square_mean=moment.diagonal().float())
        known = prepare_group(linears, stats, scheme, norm_weight, dtype, fold)
        result = quantize_group(
            moved, seen, scheme, norm_weight=norm_weight, dtype=dtype, fold=fold, bits=bits, known=known
        )
        self._install(linears, result, dtype)
        return result

    def _layer(self, site: str) -> Any:
        return self._made.get_submodule(".".join(site.split(".")[:3]))

    def _reached(self, site: str, fold: RowFold) -> Tensor:
        """A group's inputs in the model as it is now, before channel scales: float32 [windows, tokens, K]."""
        layer = self._layer(site)
        if site.endswith("q_proj"):
            return layer.input_layernorm(self._stream)
        if site.endswith("gate_proj"):
            return layer.post_attention_layernorm(self._stream)
        return self._attended if fold.scales is None else self._attended * fold.scales

    def _install(self, linears: Sequence[FloatLinear], result: GroupResult, dtype: FloatDtype) -> None:
        """Put the quantized group into the model, and let the windows go on to the next group."""
        site = linears[0].name
        layer = self._layer(site)
        for linear, made in zip(linears, result.linears, strict=True):
            tensors = encode_linear("", made, dtype=dtype, form=Form.ASCEND_V1, row_parallel=site.endswith("o_proj"))
            parent, _, leaf = linear.name.rpartition(".")
            module = Quantized({name.removeprefix("."): tensor for name, tensor in tensors.items()})
            setattr(self._made.get_submodule(parent), leaf, module)
        if result.norm_weight is None:
            self._stream = self._stream + layer.self_attn.o_proj(self._attended)
            return
        old = layer.input_layernorm if site.endswith("q_proj") else layer.post_attention_layernorm
        read = BiasedNorm(old, result.norm_weight, torch.zeros(len(result.norm_weight)))(self._stream)
        if site.endswith("q_proj"):
            self._attended = self._attend(layer.self_attn, read)
        else:
            self._stream = self._stream + layer.mlp(read)

    def _attend(self, attention: Any, read: Tensor) -> Tensor:
        """What attention hands to o_proj."""
        handed: list[Tensor] = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, args: handed.append(args[0]))
        attention(hidden_states=read, position_embeddings=self._rotations, attention_mask=None)
        handle.remove()
        return handed[0]


@dataclass(frozen=True)
class Bench:
    """One calibration set: its statistics, its inputs in the float model, and what they come to."""

    model: Model
    stats: Mapping[str, InputStats]
    rows: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    curves: dict[tuple[str, GroupScheme], tuple[list[RateCurve], PreparedGroup]] = field(default_factory=dict)
    """Those found so far: they do not depend on the form."""

    def known_curves(
        self, linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, **rest: Any
    ) -> tuple[list[RateCurve], PreparedGroup]:
        """As `rate_curves`, once."""
        key = linears[0].name, scheme
        if key not in self.curves:
            self.curves[key] = rate_curves(linears, stats, scheme, **rest)
        return self.curves[key]

    def kl(self, options: Mapping[str, object], how: Callable[..., GroupResult]) -> float:
        """Of the model that `how` quantizes."""
        with (
            tempfile.TemporaryDirectory() as out,
            patch.multiple("real_llm", quantize_group=how, rate_curves=self.known_curves, ERROR_WINDOWS=1),
        ):
            Quantizer(self.model, self.stats, self.rows, options)(Path(out), "answer")
            return judge(self.model, Path(out)).kl

    def chain(self, form: str) -> Chain:
        """The chain that a form names."""
        moment, strength = form.split(":")
        assert moment in ("float", "quantized")
        return Chain(self.model, self.inputs, float(strength), moment == "quantized")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="wheel of exllamav3")
    parser.add_argument("--modes", nargs="+", default=USUAL_MODES)
    parser.add_argument("--sets", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--windows", type=int, default=4)
    a = parser.parse_args()
    model = Model(a.folder, a.text, a.windows)
    print(
        "| mode | calibration set | second moment | strength | KL | of plain |\n|---|---|---|---|---|---|", flush=True
    )
    for number, windows in enumerate(calibration_sets(model, a.text, max(a.sets) + 1)):
        if number not in a.sets:
            continue
        model.calibration = windows
        bench = Bench(model, *calibrate(model), float_inputs(model))
        for mode in a.modes:
            plain = bench.kl(OPTIONS[mode], quantize_group)
            print(f"| {mode} | {number} | float | plain | {plain:.4f} | 1 |", flush=True)
            for form in a.forms:
                kl = bench.kl(OPTIONS[mode], bench.chain(form))
                moment, strength = form.split(":")
                print(f"| {mode} | {number} | {moment} | {strength} | {kl:.4f} | {kl / plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
