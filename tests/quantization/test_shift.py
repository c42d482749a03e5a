"""--channel-shift: the norm's bias centres each channel, and quant_bias gives it back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import calibrate, edit_tensors, quantize
from safetensors.torch import load_file
from torch import Tensor

import glmq
from glmq.calibration.stats import Statistics
from glmq.model.config import read_config

NORMS = ("input_layernorm", "post_attention_layernorm")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def shifted(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(
        small, small_stats, tmp_path_factory.mktemp("shifted") / "q", torch_dtype="fp16", channel_shift=True
    )


def biases(small: Path) -> list[str]:
    layers = read_config(small).layers
    return sorted(f"model.language_model.layers.{i}.{norm}.bias" for i in range(layers) for norm in NORMS)


def test_each_channels_middle_becomes_zero(shifted: Path, small: Path, small_stats: Path) -> None:
    found, source = weights(shifted), weights(small)
    statistics = Statistics.open(small_stats)
    for name in biases(small):
        norm = name.removesuffix(".bias")
        linear = "self_attn.q_proj" if norm.endswith("input_layernorm") else "mlp.gate_up_proj"
        stats = statistics.input(f"{norm.rpartition('.')[0]}.{linear}")
        scales = source[f"{norm}.weight"].float() / found[f"{norm}.weight"].float()
        middle = (stats.minimum + stats.maximum) / 2 / scales
        assert torch.equal(found[name], -middle.half().float())
    config = read_config(small)
    others = [f"{norm}.bias" for norm in config.family.rms_norms(config) if f"{norm}.bias" not in biases(small)]
    assert others
    assert not any(found[n].any() for n in others)


@pytest.mark.slow
def test_error_falls_and_ranges_narrow(half: Path, half_stats: Path, tmp_path: Path) -> None:
    shifted = quantize(half, half_stats, tmp_path / "shifted", torch_dtype="fp16", channel_shift=True)
    plain = quantize(half, half_stats, tmp_path / "plain", torch_dtype="fp16")
    rows = [json.loads((folder / "glmq_report.json").read_text())["linears"] for folder in (shifted, plain)]
    own, other = ({row["name"]: row for row in side} for side in rows)
    normed = [name for name in own if not name.endswith("o_proj")]
    assert all(own[n]["smoothing"].endswith(", shifted") for n in normed)
    error = [sum(side[n]["output_error"] for n in normed) for side in (own, other)]
    assert error[0] < 0.97 * error[1]
    span = [sum(side[n]["input_high"] - side[n]["input_low"] for n in normed) for side in (own, other)]
    assert span[0] < span[1]


def test_verify_passes_it_and_says_what_it_relies_on(shifted: Path, small: Path) -> None:
    found = glmq.verify(shifted, reference=small)
    assert found.passed, found.findings
    warned = [f for f in found.findings if "--channel-shift" in f.message]
    assert sorted(f.tensor for f in warned) == biases(small)
    assert {(f.severity, f.message) for f in warned} == {
        (
            "warning",
            "is not zero (--channel-shift): answers are right only where the engine adds it; not yet run on hardware",
        )
    }


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_inputs_that_are_nearly_constant_are_given_back_exactly(tmp_path: Path, half: Path, dtype: str) -> None:
    samples = tmp_path / "one.jsonl"
    samples.write_text('{"text": "a"}\n')
    stats = calibrate(half, tmp_path / "stats", None, samples_file=samples, texts=False)
    out = quantize(half, stats, tmp_path / "q", torch_dtype=dtype, channel_shift=True)
    found = glmq.verify(out, reference=half)
    assert found.passed, found.findings


@pytest.mark.parametrize("mode", ["lost", "moved"])
def test_a_bias_that_does_not_fit_is_found_without_checksums(
    mode: str, shifted: Path, small: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "q"
    shutil.copytree(shifted, broken)

    def spoil(tensors: dict[str, Tensor]) -> None:
        if mode == "lost":
            tensors[biases(small)[0]].zero_()
        else:
            tensors[biases(small)[0]] += 0.1 * tensors[biases(small)[0]].abs().max()

    edit_tensors(broken, spoil)
    (broken / "glmq_checksums.json").unlink()
    (broken / "glmq_report.json").unlink()
    errors = {f.tensor for f in glmq.verify(broken).findings if f.severity == "error"}
    layer = "model.language_model.layers.0.self_attn"
    assert {f"{layer}.{n}_proj.quant_bias" for n in "qkv"} <= errors
