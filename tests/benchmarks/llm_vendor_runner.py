"""Runs inside a virtual environment that has the vendor's published package: its quantization of a Llama model.

    python -m venv vendor && vendor/bin/pip install torch==2.13.0 transformers==4.53.0 accelerate msmodelslim==26.1.0 pillow

A peer to measure against, never a dependency of glmq; real_llm.py calls it. The model computes in float32.
"""

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from runner_arguments import parse_arguments
from transformers import AutoModelForCausalLM


def main():
    a = parse_arguments("QuantConfig")
    model = AutoModelForCausalLM.from_pretrained(a.model_path, torch_dtype=torch.float32, device_map="cpu").eval()
    # The package saves with safetensors, which refuses tensors that share memory.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    samples = [[ids[None], torch.ones_like(ids)[None]] for ids in torch.load(a.windows)]
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    floats = [name for name in linears if name.endswith(("down_proj", "lm_head"))]
    settings = {"w_bit": 8, "a_bit": 8, "act_method": 2, "mm_tensor": False} | a.config
    anti = AntiOutlierConfig(w_bit=settings["w_bit"], a_bit=8, anti_method="m2", dev_type="cpu")
    AntiOutlier(model, calib_data=samples, cfg=anti).process()
    config = QuantConfig(disable_names=floats, dev_type="cpu", **settings)
    calibrator = Calibrator(model, config, calib_data=samples, disable_level="L0")
    calibrator.run()
    calibrator.save(str(a.save_directory), save_type=["ascendV1"])


if __name__ == "__main__":
    main()
