"""Runs inside a virtual environment that has the vendor's published package: its quantization of a GLM-4.1V, stage by stage.

    python -m venv vendor && vendor/bin/pip install torch==2.13.0 transformers==4.53.0 accelerate msmodelslim==26.1.0 pillow

A peer to measure against, never a dependency of glmq. Prints one JSON line: seconds per stage, peak resident memory.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from PIL import Image
from transformers import AutoTokenizer, Glm4vForConditionalGeneration, Glm4vImageProcessor

PROMPT = "Please describe this picture in detail."
NO_ARGUMENTS = [None] * 8
"""The positional arguments of transformers 4.53.0's forward between attention_mask and pixel_values."""


def read_samples(model_path, images, limit):
    """The inputs of each image as the positional list that the package replays."""
    config = json.loads((model_path / "config.json").read_text())
    vision = config["vision_config"]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    processor = Glm4vImageProcessor(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
    )
    placeholder = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for path in paths[:limit]:
        made = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
        count = int(made["image_grid_thw"].prod()) // vision["spatial_merge_size"] ** 2
        ids = tokenizer(text.replace(placeholder, placeholder * count), add_special_tokens=False).input_ids
        ids = torch.tensor([ids])
        yield [ids, torch.ones_like(ids), *NO_ARGUMENTS, made["pixel_values"], None, made["image_grid_thw"], None]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_path", type=Path)
    parser.add_argument("save_directory", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--config", type=json.loads, default={}, help="keyword arguments of the package's QuantConfig")
    parser.add_argument("--torch_dtype", choices=("fp16", "bf16"), default="fp16")
    a = parser.parse_args()
    dtype = torch.float16 if a.torch_dtype == "fp16" else torch.bfloat16
    seconds, started = {}, time.perf_counter()

    def stage(name):
        nonlocal started
        seconds[name] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    model = Glm4vForConditionalGeneration.from_pretrained(a.model_path, torch_dtype=dtype, device_map="cpu").eval()
    samples = list(read_samples(a.model_path, a.images, a.limit))
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    floats = [n for n in linears if "visual" in n or n.endswith("down_proj")]
    settings = {"w_bit": 8, "a_bit": 8, "act_method": 2, "mm_tensor": False, "open_outlier": True} | a.config
    stage("load")
    with torch.autocast("cpu", dtype=dtype):
        anti = AntiOutlierConfig(w_bit=settings["w_bit"], a_bit=8, anti_method="m2", dev_type="cpu")
        AntiOutlier(model, calib_data=samples, cfg=anti).process()
        stage("outlier suppression")
        config = QuantConfig(disable_names=floats, dev_type="cpu", **settings)
        calibrator = Calibrator(model, config, calib_data=samples, disable_level="L0")
        calibrator.run()
        stage("quantize")
    calibrator.save(str(a.save_directory), save_type=["ascendV1"])
    stage("save")
    print(json.dumps({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


if __name__ == "__main__":
    main()
