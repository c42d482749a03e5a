"""Nothing that a documented option of quantize and compress writes, nor what quantize makes of an odd source, fails verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from cli.command_line import commands
from cli.command_line import glmq as cli
from helpers import calibrate, edit_json, edit_tensors, findings_as_of_another_tool
from make_checkpoint import Size, make_checkpoint
from random_w8a8s import write_stand_in
from safetensors.torch import load_file, save_file
from torch import Tensor

import glmq
from glmq.engines import Engine

pytestmark = pytest.mark.slow  # some hundred checkpoints of one layer, 15 s

Options: TypeAlias = Mapping[str, object]
"""Of the command line, as they are documented; True and False stand for a flag that is on or off."""

DYNAMIC: Options = {"is_dynamic": True}
SPARSE: Options = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
W4A8: Options = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
W8A16: Options = {"a_bit": 16}
PACKED: Options = {"format": "compressed-tensors"}
W4A16: Options = {**PACKED, "w_bit": 4, "a_bit": 16}
TYPES: Mapping[str, Options] = {
    "W8A8": {},
    "W8A8S": SPARSE,
    "W8A8_DYNAMIC": DYNAMIC,
    "W4A8_DYNAMIC": W4A8,
    "W8A16": W8A16,
    "W8A8, mindie": {"format": "mindie"},
    "W8A8S, mindie": {**SPARSE, "mindie_format": True},
    "W8A8_DYNAMIC, mindie": {**DYNAMIC, "format": "mindie"},
    "W4A8_DYNAMIC, mindie": {**W4A8, "mindie_format": True, "torch_dtype": "fp16"},
    "W8A8, packed": PACKED,
    "W8A8_DYNAMIC, packed": {**PACKED, **DYNAMIC},
    "W8A16, packed": {**PACKED, **W8A16},
    "W4A16, packed": W4A16,
}
"""Every type in every form that it has."""
FOUR = ("W8A8", "W8A8S", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
"""In ascendV1, what the vendor's tool makes too."""

ROWS: Mapping[str, Options] = {
    **TYPES,
    "W4A16, packed, plain": {**W4A16, "method": "plain"},
    "W8A8_DYNAMIC, packed, reference": {**PACKED, **DYNAMIC, "method": "reference"},
    **{
        f"{name}, {what}": {**TYPES[name], **options}
        for name in FOUR
        for what, options in {
            "plain": {"method": "plain"} | ({"anti_method": "none"} if name in ("W8A8", "W4A8_DYNAMIC") else {}),
            "reference": {"method": "reference"} | ({"use_sigma": True} if name == "W8A8S" else {}),
        }.items()
    },
    "no smoothing, float16": {**DYNAMIC, "anti_method": "none", "torch_dtype": "fp16"},
    "SmoothQuant, float16": {"do_smooth": True, "torch_dtype": "fp16"},
    "the better range, sparse, corrected": {**SPARSE, "act_method": 3, "bias_correction": True},
    "SmoothQuant, shifted": {"do_smooth": True, "channel_shift": True},
    "SmoothQuant, the better range, packed": {**PACKED, "do_smooth": True, "act_method": 3},
    "shifted, min-max, corrected": {"channel_shift": True, "act_method": 1, "bias_correction": True},
    "shifted, corrected, the older form": {
        "channel_shift": True,
        "bias_correction": True,
        "mindie_format": True,
        "torch_dtype": "fp16",
    },
    "shifted, sparse, the older form": {**SPARSE, "channel_shift": True, "mindie_format": True},
    "corrected, plain": {"bias_correction": True, "method": "plain"},
    "one sigma, min-max": {**SPARSE, "use_sigma": True, "sigma_factor": 1.0, "act_method": 1},
    "over the whole tensor": {"co_sparse": True, "torch_dtype": "fp16"},
    "no outliers, reference": {**SPARSE, "open_outlier": False, "method": "reference"},
    "two bits of dense": {"target_bits": 2.0},
    "two bits of W4A8, float16": {**W4A8, "target_bits": 2.0, "torch_dtype": "fp16"},
    "one bit": {**SPARSE, "use_sigma": True, "target_bits": 1.0},
    "two bits, plain": {**SPARSE, "use_sigma": True, "target_bits": 2.0, "method": "plain"},
    "two bits by error": {**SPARSE, "target_bits": 2.0, "allocate": "error"},
    "two bits, shifted": {**SPARSE, "target_bits": 2.0, "channel_shift": True, "do_smooth": True},
    "two bits, shifted, propagated": {**SPARSE, "target_bits": 2.0, "channel_shift": True, "propagation": 1.0},
    "W4A8, propagated, smoothed": {**W4A8, "propagation": 0.25, "do_smooth": True},
    "W4A16, propagated": {**W4A16, "propagation": 1.0},
    "a ratio": {**SPARSE, "target_ratio": 0.3},
    "three bits, packed": {**PACKED, **DYNAMIC, "target_bits": 3.0},
    "groups of 32 of 8 bits, float16": {**PACKED, **W8A16, "group_size": 32, "torch_dtype": "fp16"},
    "float o_proj, packed": {**PACKED, "keep_float": "*.o_proj"},
    "all linears": {**DYNAMIC, "layer": "*=W8A8_DYNAMIC"},
    "a static layer of a dynamic model": {
        **DYNAMIC,
        "layer": "*.self_attn.*=W8A8",
        "act_method": 3,
        "bias_correction": True,
        "channel_shift": True,
    },
    "a layer of four bits, propagated": {"layer": "*.o_proj=W4A8_DYNAMIC", "propagation": 1.0},
    "down_proj too": {"layer": "*.mlp.down_proj=W8A8", "channel_shift": True},
    "all linears, packed": {**PACKED, **DYNAMIC, "layer": "*=W8A8_DYNAMIC"},
    "no outliers, mixed with floats": {**SPARSE, "open_outlier": False, "layer": "*.o_proj=FLOAT"},
    "the largest fraction, the worst float": {**SPARSE, "fraction": 0.1, "fallback_topk": 1},
    "groups of 32, the worst float": {**W4A16, "group_size": 32, "fallback_topk": 1},
    "large errors float, no report": {**SPARSE, "max_error": 0.05, "report": False},
    "the 300I Duo's preset": {"preset": "300i-duo", "target": "mindie-300i-duo"},
    "a preset, packed": {"preset": "800i-a2-w8a16", "format": "compressed-tensors"},
    "vLLM-Ascend": {**W4A8, "target": "vllm-ascend", "layer": "*.self_attn.[qkv]_proj=W8A8_DYNAMIC"},
    "800I A2, numbered files": {"target": "mindie-800i-a2", "part_file_size": "1MB"},
    "numbered files, the older form": {"mindie_format": True, "part_file_size": "1MB", "torch_dtype": "fp16"},
}
"""Every value of every option, and what of them touches the same numbers together; forms, float types and what chooses the
bits of a linear do not depend on each other."""

OF_MIXTURES = {
    "a layer of four bits, propagated": "is described as W4A8_DYNAMIC, 1 linear of this W8A8 model so",
    "vLLM-Ascend": "is described as W8A8_DYNAMIC, 3 linears of this W4A8_DYNAMIC model so",
}
"""What verify warns of where types are mixed."""

WRITES_NOTHING_ELSE = (
    *("model_path", "save_directory", "overwrite", "work_dir", "stats", "resume", "dry_run", "config", "dump_config"),
    *(
        "device_type",
        "json",
        "quiet",
        "verbose",
        "log_file",
        "debug",
        "trust_remote_code",
        "events",
        "html",
        "list_presets",
    ),
    *("calib_images", "recursive", "calib_samples", "prompt", "texts", "limit", "generate", "max_pixels"),
    *("skip_bad_images", "compute_dtype"),
)
"""Options on which the bytes of a checkpoint depend through the statistics alone, or not at all."""
OF_SOURCES = frozenset({"keep_extra", "dequantize", "chat_template"})
"""Options of the sources below."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model that has every kind of linear, in one file."""
    folder = tmp_path_factory.mktemp("one") / "model"
    make_checkpoint(folder, Size(layers=1))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


EVERYTHING = {"wide_moments": True, "text_inputs": True}
"""That statistics may hold."""


@pytest.fixture(scope="module")
def stats(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(model, tmp_path_factory.mktemp("one") / "stats", pictures, limit=1, texts=False, **EVERYTHING)


@pytest.fixture(scope="module")
def large(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of more than a megabyte, which is written as several files, and its statistics."""
    folder = tmp_path_factory.mktemp("large")
    make_checkpoint(folder / "model", Size(layers=1, vocab=4096))
    return folder / "model", calibrate(folder / "model", folder / "stats", pictures, limit=1, texts=False)


def words(options: Options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def assert_passes(folder: Path, reference: Path, engines: list[Engine] | None = None) -> None:
    for against in (None, reference):
        found = glmq.verify(folder, reference=against, engines=engines or [] if against is None else [])
        assert found.passed, found.findings


def test_every_option_that_changes_an_output_has_a_row() -> None:
    defaults = {p.opts[0][2:].replace("-", "_"): p.default for p in commands().commands["quantize"].params}
    tried = {name for row in ROWS.values() for name, value in row.items() if value != defaults[name]}
    assert set(defaults) - set(WRITES_NOTHING_ELSE) - OF_SOURCES == tried
    of_sources = {name for _, options in SOURCES.values() for name in options}
    assert of_sources & OF_SOURCES == OF_SOURCES


@pytest.mark.parametrize("row", ROWS)
def test_what_an_option_writes_passes(
    row: str, model: Path, stats: Path, large: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ROWS[row]
    if "part_file_size" in options:
        model, stats = large
    out = tmp_path / "out"
    cli("quantize", "--model_path", model, "--stats", stats, "--save_directory", out, *words(options), "-q")
    place = str(options.get("target", ""))
    # Below, what the others wrote is looked at without checksums, which hide.
    if place or row in TYPES or options.get("bias_correction"):
        engines = [engine for engine in Engine if place.startswith(engine.value)]
        found = glmq.verify(out, reference=model, engines=engines)
        assert found.passed, found.findings
    if row in TYPES:
        found = glmq.verify(out)
        assert found.passed, found.findings
    if not options.get("bias_correction"):  # of that only the report tells
        warned = [found.message.partition(":")[0] for found in findings_as_of_another_tool(out, model)]
        assert warned == [said for name, said in OF_MIXTURES.items() if name == row]


COMPRESSIONS: Mapping[str, Options] = {
    "portable": {"codec": "portable"},
    "portable, two parts": {"codec": "portable", "tp": 2, "jobs": 1},
    "the engine's form": {"tp": 2, "multiprocess_num": 2},
    "the engine's form, with what it is made from": {"tp": 2, "save_split_w8a8s_dir": "split"},
    "the engine's form, for vLLM-Ascend": {"tp": 2, "layout": "vllm-ascend"},
}


@pytest.mark.parametrize(
    ("row", "made"),
    [
        *((row, "W8A8S") for row in COMPRESSIONS),
        ("portable, two parts", "two bits, shifted"),
        ("the engine's form", "two bits, shifted"),
        ("portable", "numbered"),
    ],
)
def test_what_compress_writes_passes(
    row: str, made: str, sparse: Mapping[str, Path], model: Path, large: tuple[Path, Path], tmp_path: Path
) -> None:
    options = dict(COMPRESSIONS[row])
    if "save_split_w8a8s_dir" in options:
        options["save_split_w8a8s_dir"] = tmp_path / "split"
    if "codec" not in options:
        options["executor"] = write_stand_in(tmp_path)
    out = tmp_path / "out"
    cli("compress", "--model_path", sparse[made], "--save_directory", out, *words(options), "-q")
    is_for_engine = "codec" not in options
    engine = Engine.VLLM_ASCEND if "layout" in options else Engine.MINDIE
    assert_passes(out, sparse[made], [engine] if is_for_engine else [])
    if "save_split_w8a8s_dir" in options:
        assert_passes(tmp_path / "split", sparse[made])
    if not is_for_engine:
        cli("compress", "--decompress", out, tmp_path / "back", "-q")
        assert_passes(tmp_path / "back", large[0] if made == "numbered" else model)


@pytest.fixture(scope="module")
def sparse(
    model: Path, stats: Path, large: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """W8A8S checkpoints to compress."""
    root = tmp_path_factory.mktemp("sparse")
    rows = {**ROWS, "numbered": {**SPARSE, "part_file_size": "1MB"}}
    for name in ("W8A8S", "two bits, shifted", "numbered"):
        source, its_stats = large if name == "numbered" else (model, stats)
        paths = ["--model_path", source, "--stats", its_stats, "--save_directory", root / name]
        cli("quantize", *paths, *words(rows[name]), "-q")
    return {path.name: path for path in root.iterdir()}


LAYER = "model.language_model.layers.0"


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, edit)  # type: ignore[arg-type,return-value]


def config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def text(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda c: edit(c["text_config"]))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], object]:
    return tensors(lambda t: [t.update({rename(name): t.pop(name)}) for name in list(t)])


def cast(dtype_of: Callable[[str], torch.dtype]) -> Callable[[Path], object]:
    return tensors(lambda t: t.update({name: tensor.to(dtype_of(name)) for name, tensor in t.items()}))


def tie(folder: Path) -> None:
    text(lambda c: c.update(tie_word_embeddings=True))(folder)
    tensors(lambda t: t.pop("lm_head.weight"))(folder)


def to_fp8(folder: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        name = f"{LAYER}.mlp.gate_up_proj.weight"
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.full((2, 1), 0.5)

    tensors(edit)(folder)
    config(quantization_config={"quant_method": "fp8"})(folder)


def of_transformers_5(folder: Path) -> None:
    def edit(section: dict) -> None:
        rope = {"rope_theta": section.pop("rope_theta"), "partial_rotary_factor": section.pop("partial_rotary_factor")}
        section["rope_parameters"] = section.pop("rope_scaling") | rope

    text(edit)(folder)
    edit_json(folder / "config.json", lambda c: c.update(dtype=c.pop("torch_dtype")))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend"))
    parts = {}
    for key in ("image", "video"):
        name = "preprocessor_config.json" if key == "image" else "video_preprocessor_config.json"
        parts[f"{key}_processor"] = json.loads((folder / name).read_text())
        (folder / name).unlink()
    (folder / "processor_config.json").write_text(json.dumps({**parts, "processor_class": "Glm46VProcessor"}))


def move_template(name: str, key: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        path = folder / name
        document = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(document | {key: template}))

    return move


def leave_beside(folder: Path) -> None:
    save_file({"x.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    for name in ("zero_to_fp32.py", "trainer_state.json", "pytorch_model.bin", "README.md", "tokenizer.model"):
        (folder / name).write_text("{}")


def with_other_files(folder: Path) -> None:
    leave_beside(folder)
    config(quantization_config={"quant_method": "bitsandbytes"}, torch_dtype="auto")(folder)
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "generation_config.json").unlink()


def split(folder: Path) -> None:
    """Two files without an index."""
    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)
    path.unlink()
    for number, names in enumerate((sorted(stored)[:20], sorted(stored)[20:]), 1):
        save_file({name: stored[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")


def both(first: Callable[[Path], object], second: Callable[[Path], object]) -> Callable[[Path], object]:
    """Two changes that have nothing to do with each other."""
    return lambda folder: (first(folder), second(folder))


EXTRA = {"score.weight": torch.ones(2, 64), "position_ids": torch.arange(3), "rotary_emb.inv_freq": torch.ones(2)}
SOURCES: Mapping[str, tuple[Callable[[Path], object], Options]] = {
    "older names": (
        renamed(lambda n: n.replace("model.visual.", "visual.").replace("model.language_model.", "model.")), {},
    ),
    "one wrapped process": (renamed("module.{}".format), {}),
    "a tied head": (tie, {}),
    "a head beside the flag": (text(lambda c: c.update(tie_word_embeddings=True)), {}),
    "extra tensors": (tensors(lambda t: t.update(EXTRA)), {}),
    "extra tensors kept": (tensors(lambda t: t.update(EXTRA)), {"keep_extra": True}),
    "extra tensors kept, packed": (tensors(lambda t: t.update(EXTRA)), {**PACKED, "keep_extra": True}),
    "float16": (cast(lambda name: torch.float16), SPARSE),
    "float64, with a template in tokenizer_config": (
        both(cast(lambda name: torch.float64), move_template("tokenizer_config.json", "chat_template")), {},
    ),
    "mixed, with a template in JSON": (
        both(cast(lambda name: torch.float32 if "norm" in name or name.endswith("bias") else torch.float16),
             move_template("chat_template.json", "chat_template")), {},
    ),
    "FP8": (to_fp8, {"dequantize": True}),
    "FP8, shifted": (to_fp8, {**SPARSE, "dequantize": True, "channel_shift": True}),
    "transformers 5, two files without an index": (both(of_transformers_5, split), {}),
    "a given template": (lambda folder: shutil.move(folder / "chat_template.jinja", folder.parent / "own.jinja"),
                         {"chat_template": "own.jinja"}),
    "other files and settings": (with_other_files, {}),
    "rows as good as dead": (tensors(lambda t: t[f"{LAYER}.self_attn.q_proj.weight"].mul_(1e-30)), {}),
    "rows as good as dead, sparse": (tensors(lambda t: t[f"{LAYER}.self_attn.q_proj.weight"].mul_(1e-30)), SPARSE),
    "rows as good as dead, float16": (tensors(lambda t: t[f"{LAYER}.self_attn.q_proj.weight"].mul_(1e-30)),
                                      {**DYNAMIC, "torch_dtype": "fp16"}),
    "rows as good as dead, packed": (tensors(lambda t: t[f"{LAYER}.self_attn.q_proj.weight"].mul_(1e-38)), W8A16 | PACKED),
    "a norm of zeros and negative numbers": (tensors(lambda t: t[f"{LAYER}.input_layernorm.weight"].neg_()[:8].zero_()), {}),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_made_of_an_odd_source_passes(source: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    change, options = SOURCES[source]
    odd = tmp_path / "model"
    shutil.copytree(model, odd)
    change(odd)
    options = {name: tmp_path / "own.jinja" if name == "chat_template" else value for name, value in options.items()}
    out = tmp_path / "out"
    cli("quantize", "--model_path", odd, "--calib_images", pictures, "--limit", 1, "--no-texts", "--save_directory", out,
        *words(options), "-q")  # fmt: skip
    is_packed = options.get("format") == "compressed-tensors"
    assert_passes(out, odd, [] if is_packed else [Engine.MINDIE])
