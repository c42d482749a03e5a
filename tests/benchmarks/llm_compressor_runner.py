"""Runs inside a virtual environment that has llm-compressor: its SmoothQuant and GPTQ on a Llama model.

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

A peer to measure against, never a dependency of glmq; real_llm.py calls it. The model computes in float32. What GPTQ leaves
in the module, steps times integers, is written as those integers and under the names that real_llm.py reads.
"""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from runner_arguments import parse_arguments
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FLOATS = ["lm_head", "re:.*down_proj"]


def read_linear(module):
    """The tensors of a quantized linear, [N, K]: static, by group, or with inputs rounded per token."""
    steps = module.weight_scale.float()  # [N, groups]
    ratio = module.weight.reshape(*steps.shape, -1) / steps[..., None]
    q = ratio.round()
    assert float((ratio - q).abs().max()) < 1e-2, "the module's weights are no multiples of its steps"
    q = q.reshape(module.weight.shape)
    found = {"weight": q.to(torch.int8)}
    if steps.shape[1] > 1:
        return found | {"weight_scale": torch.ones(len(q), 1), "weight_scale_second": steps}
    if not hasattr(module, "input_scale"):
        return found | {"weight_scale": steps}
    scale, offset = module.input_scale.float(), module.input_zero_point.float()
    return found | {
        "input_scale": scale,
        "input_offset": offset,
        "deq_scale": steps[:, 0] * scale,
        "quant_bias": -offset * q.sum(1),
    }


def main():
    a = parse_arguments("QuantizationScheme")
    windows = torch.load(a.windows)
    model = AutoModelForCausalLM.from_pretrained(a.model_path, dtype=torch.float32).eval()
    samples = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8, ignore=FLOATS),
        GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], **a.config}}, ignore=FLOATS),
    ]
    oneshot(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=len(windows[0]),
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            tensors |= {f"{name}.{key}": tensor for key, tensor in read_linear(module).items()}
        elif name.endswith("layernorm"):
            tensors[f"{name}.weight"] = module.weight
    a.save_directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(tensors, a.save_directory / "model.safetensors")


if __name__ == "__main__":
    main()
