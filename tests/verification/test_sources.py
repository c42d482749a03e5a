"""Nothing that `quantize` accepts fails its own `verify`: a checkpoint with every oddity at once, in every form."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import calibrate, edit_json, edit_tensors, quantize, with_all_texts
from safetensors.torch import load_file, save_file
from torch import Tensor

import glmq
from glmq.engines import Engine
from glmq.progress import Event, Note

EXTRA = {
    "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.5]),
    "model.visual.position_ids": torch.arange(3),
    "score.weight": torch.ones(2, 64),
    "scalar": torch.tensor(0.25),
}
"""Tensors that checkpoints of trainers have and the model has not."""


@pytest.fixture(scope="session")
def odd(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4.6V-Flash as a trainer of transformers 5 might leave it: other names, a tied head, FP8 in one layer, extra
    tensors, `rope_parameters`, newer classes, settings in other files, leftovers."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(small, folder)
    (folder / "model.safetensors.index.json").unlink()

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        name = "model.language_model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
        tensors.update(EXTRA)
        for own in list(tensors):
            theirs = own.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[f"module.{theirs}"] = tensors.pop(own)

    edit_tensors(folder, spoil)
    save_file({"x.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    for name in ("zero_to_fp32.py", "trainer_state.json", "training_args.bin"):
        (folder / name).write_text("{}")

    def configure(config: dict) -> None:
        text = config["text_config"]
        rope = {"rope_theta": 500000, "partial_rotary_factor": text.pop("partial_rotary_factor")}
        del text["rope_theta"]
        text["rope_parameters"] = text.pop("rope_scaling") | rope
        text["tie_word_embeddings"] = True
        config["dtype"] = config["text_config"]["dtype"] = "auto"
        del config["torch_dtype"]
        config["quantization_config"] = {"quant_method": "fp8"}

    edit_json(folder / "config.json", configure)
    names = ("preprocessor_config", "video_preprocessor_config")
    image, video = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    image["image_processor_type"], video["video_processor_type"] = "Glm46VImageProcessor", "Glm46VVideoProcessor"
    parts = {"image_processor": image, "video_processor": video, "processor_class": "Glm46VProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(parts))
    for name in names:
        (folder / f"{name}.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chat_template.jinja").unlink()
    edit_json(
        folder / "tokenizer_config.json",
        lambda c: c.update(
            extra_special_tokens=c.pop("additional_special_tokens"), tokenizer_class="TokenizersBackend"
        ),
    )
    return folder


@pytest.fixture(scope="session")
def odd_stats(odd: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Fewer samples leave a made-up model outside verify's limits on others, whichever torch sums.
    with with_all_texts():
        return calibrate(odd, tmp_path_factory.mktemp("odd") / "stats", pictures, limit=4, dequantize=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ascendv1", "mindie", "compressed-tensors"])
def test_an_odd_checkpoint_is_quantized_into_one_that_verify_and_the_engine_accept(
    form: str, odd: Path, odd_stats: Path, pictures: Path, tmp_path: Path
) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    options = glmq.CalibrationOptions(dequantize=True)
    out = quantize(odd, odd_stats, tmp_path / "out", calibration=options, watch=watch, format=form)
    engines = [] if form == "compressed-tensors" else [Engine.MINDIE]
    for reference in (None, odd):
        cases = glmq.CaseOptions(images=pictures, limit=4) if reference and form == "ascendv1" else glmq.CaseOptions()
        report = glmq.verify(out, reference=reference, engines=engines, cases=cases)
        assert [f for f in report.findings if f.severity == "error"] == []
    found = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert "lm_head.weight" in found
    assert not found & set(EXTRA)
    assert not {"zero_to_fp32.py", "trainer_state.json", "training_args.bin"} & {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500000
    assert text["tie_word_embeddings"] is False
    assert text["dtype"] == config["torch_dtype"] == "bfloat16"
    said = "\n".join(notes)
    for wanted in ("adapter_model.safetensors lies beside", "named as trainers leave them", "is tied to the embeddings",
                   "1 weights are FP8", "4 tensors are no part of the model"):  # fmt: skip
        assert wanted in said


def test_what_keep_extra_keeps_is_a_warning_of_verify(odd: Path, odd_stats: Path, tmp_path: Path) -> None:
    options = glmq.CalibrationOptions(dequantize=True)
    out = quantize(odd, odd_stats, tmp_path / "out", calibration=options, keep_extra=True)
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(found["score.weight"], EXTRA["score.weight"].bfloat16())
    assert torch.equal(found["model.visual.position_ids"], torch.arange(3))
    for reference in (None, odd):
        report = glmq.verify(out, reference=reference)
        assert report.passed, report.findings
        assert {f.tensor for f in report.findings} == set(EXTRA)


def test_a_given_chat_template_is_no_fault_but_an_altered_one_is(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    options = glmq.CalibrationOptions(chat_template=tmp_path / "own.jinja")
    out = quantize(small, small_stats, tmp_path / "out", calibration=options)
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    report = glmq.verify(out, reference=small)
    assert [(f.severity, f.message) for f in report.findings] == [
        ("warning", "chat_template.jinja is not the source's: `glmq quantize` was given another")
    ]
    (out / "chat_template.jinja").write_text("{{ messages }}")
    assert not glmq.verify(out, reference=small).passed
