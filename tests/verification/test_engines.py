"""What MindIE, vLLM-Ascend and SGLang would look up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import edit_json, edit_tensors, quantize
from torch import Tensor

import glmq
from glmq.checkpoint.reader import Checkpoint
from glmq.engines import Chip, Engine, Place
from glmq.inspection.folder import scan_folder
from glmq.model.config import read_config
from glmq.spec import QuantType
from glmq.verification.engines.check import check_chip, check_lookups
from glmq.verification.engines.schemes import group_schemes, module_schemes
from glmq.verification.findings import Check, Finding
from glmq.verification.structure import check_structure

LAYER = "model.language_model.layers.0"
DESCRIPTION = "quant_model_description.json"
UNSUPPORTED = "vLLM-Ascend does not list GLM-4.1V as supported; that look-ups succeed does not mean that it runs"


@pytest.fixture(scope="module")
def w8a8(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(small, small_stats, tmp_path_factory.mktemp("w8a8") / "out", torch_dtype="fp16")


@pytest.fixture
def copy(w8a8: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in w8a8.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def errors(folder: Path, engine: Engine) -> list[str]:
    return [
        f"{found.tensor}: {found.message}"
        for found in check_lookups(scan_folder(folder), engine)
        if found.severity == "error"
    ]


def notes(folder: Path, engine: Engine) -> list[str]:
    return [found.message for found in check_lookups(scan_folder(folder), engine) if found.severity == "warning"]


def describe(folder: Path, **changes: str | None) -> None:
    edit_json(folder / DESCRIPTION, lambda found: found.update(changes))


def test_a_good_checkpoint_passes_both(w8a8: Path) -> None:
    assert list(check_lookups(scan_folder(w8a8), Engine.MINDIE)) == []
    assert errors(w8a8, Engine.VLLM_ASCEND) == []
    assert notes(w8a8, Engine.VLLM_ASCEND) == [UNSUPPORTED]


@pytest.fixture(scope="module")
def mixed(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rules = ("*.gate_up_proj=W4A8_DYNAMIC", "*.o_proj=W4A8_DYNAMIC")
    return quantize(small, small_stats, tmp_path_factory.mktemp("mixed") / "out", is_dynamic=True, layer=rules)


def test_groups_that_rules_give_are_described_and_loaded(mixed: Path, small: Path) -> None:
    assert json.loads((mixed / DESCRIPTION).read_text())["group_size"] == 64
    with Checkpoint.open(small) as source:
        assert [found for found in check_structure(mixed, source) if found.severity == "error"] == []
    assert errors(mixed, Engine.VLLM_ASCEND) == []
    assert notes(mixed, Engine.VLLM_ASCEND) == [
        UNSUPPORTED,
        *Engine.VLLM_ASCEND.spec.by_release(QuantType.W4A8_DYNAMIC),
    ]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (..., "wants [64, 0]: 256 columns per group, its default, as the description has no group_size"),
        (32, "wants [64, 2]: 32 columns per group, as the description says"),
    ],
)
def test_groups_of_another_size_than_the_description_says_are_found(
    mixed: Path, tmp_path: Path, size: object, said: str
) -> None:
    folder = shutil.copytree(mixed, tmp_path / "copy")
    edit_json(folder / DESCRIPTION, lambda d: d.pop("group_size") if size is ... else d.update(group_size=size))
    found = errors(folder, Engine.VLLM_ASCEND)
    for suffix in ("weight_scale_second", "weight_offset_second"):
        assert f"{LAYER}.self_attn.o_proj.{suffix}: has shape [64, 1], vLLM-Ascend {said}" in found


def test_groups_that_need_a_setting_of_vllm_ascend_are_said_once(mixed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixed, tmp_path / "copy")
    edit_json(folder / DESCRIPTION, lambda d: d.update(group_size=256))
    assert [said for said in notes(folder, Engine.VLLM_ASCEND) if "ENABLE_NZ" in said] == [
        "is 256; vLLM-Ascend takes more than 128 with VLLM_ASCEND_ENABLE_NZ=0 alone"
    ]


def test_a_missing_group_size_is_found_where_rules_give_groups(mixed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixed, tmp_path / "copy")
    edit_json(folder / DESCRIPTION, lambda d: d.pop("group_size"))
    assert [f for f in check_structure(folder, None) if f.check is Check.GROUP_SIZE] == [
        Finding(Check.GROUP_SIZE, "error", "group_size", "is missing or 0, wanted one of 64, 128, 256")
    ]
    edit_json(folder / DESCRIPTION, lambda d: d.update(group_size=0))
    sentence = f"group_size: is 0 in the description; {LAYER}.self_attn.o_proj needs input columns per group"
    assert sentence in errors(folder, Engine.VLLM_ASCEND)


def test_the_float_model_passes_both(small: Path) -> None:
    assert errors(small, Engine.MINDIE) == errors(small, Engine.VLLM_ASCEND) == []


def test_without_aliases_vllm_misses_its_packed_linears(copy: Path) -> None:
    def drop_aliases(found: dict[str, str]) -> None:
        for name in list(found):
            if name.rpartition(".")[0].endswith(
                ("attn.q_proj", "attn.k_proj", "attn.v_proj", "gate_up_proj", "up_proj")
            ):
                is_alias = ("visual" in name) == ("attn" in name or "gate_up" in name)
                if is_alias and not (".mlp.up_proj" in name and "visual" in name):
                    del found[name]

    edit_json(copy / DESCRIPTION, drop_aliases)
    found = errors(copy, Engine.VLLM_ASCEND)
    key = "model.visual.merger.gate_up_proj.weight"
    assert f"{key}: is not in the description, vLLM looks it up for model.visual.merger.gate_up_proj: KeyError" in found
    key = "model.visual.blocks.0.attn.q_proj.weight"
    assert (
        f"{key}: is not in the description, vLLM looks it up for model.visual.blocks.0.attn.qkv_proj: KeyError" in found
    )


@pytest.mark.parametrize(
    ("edit", "engine", "expected"),
    [
        (lambda f: (f / DESCRIPTION).unlink(), Engine.MINDIE,
         ": {folder}: has int8 tensors but no quant_model_description.json; engines take it for float"),
        (lambda f: (f / "tokenizer.json").unlink(), Engine.MINDIE,
         ": tokenizer.json is missing; MindIE builds its processor from it and does not start"),
        (lambda f: edit_json(f / "config.json", lambda c: c["text_config"].pop("dtype")), Engine.MINDIE,
         ": text_config.dtype is None; MindIE takes its run dtype from it: float16 or bfloat16"),
        (lambda f: edit_json(f / "config.json", lambda c: c["text_config"].pop("rope_theta")), Engine.MINDIE,
         ": text_config.rope_theta is None; MindIE needs it"),
        (lambda f: edit_json(f / "config.json", lambda c: c.update(quantize="w8a8s")), Engine.MINDIE,
         ": config.json says quantize 'w8a8s', which MindIE takes over the description's W8A8"),
        (lambda f: describe(f, group_size=512), Engine.MINDIE,
         "group_size: is 512; MindIE takes 64, 128 or 256: NotImplementedError"),
        (lambda f: describe(f, fa_quant_type=None), Engine.VLLM_ASCEND,
         "fa_quant_type: is in the description and switches another feature on, even if null"),
        (lambda f: edit_json(f / DESCRIPTION, lambda d: d.pop(f"{LAYER}.self_attn.k_proj.weight")), Engine.MINDIE,
         f"{LAYER}.self_attn.k_proj.weight: is not in the description: KeyError"),
        (lambda f: edit_json(f / DESCRIPTION, lambda d: d.pop("model.visual.blocks.0.mlp.up_proj.weight")), Engine.MINDIE,
         "model.visual.blocks.0.mlp.up_proj.weight: is None in the description; MindIE looks it up and knows "
         "FLOAT, W8A8, W8A8S, W8A8SC, W8A8_DYNAMIC, W4A8_DYNAMIC"),
        (lambda f: describe(f, **{f"{LAYER}.self_attn.q_proj.weight": "W8A8_DYNAMIC"}), Engine.MINDIE,
         f"{LAYER}.self_attn: q, k, v are W8A8_DYNAMIC, W8A8, W8A8; MindIE refuses such a mixture"),
        (lambda f: describe(f, **{f"{LAYER}.mlp.gate_up_proj.weight": "W4A8_DYNAMIC"}), Engine.MINDIE,
         f"{LAYER}.mlp.gate_up_proj.weight: is W4A8_DYNAMIC, for which MindIE has no dense kernel: AssertionError"),
        (lambda f: describe(f, **{f"{LAYER}.self_attn.o_proj.weight": "FLOAT"}), Engine.MINDIE,
         f"{LAYER}.self_attn.o_proj.weight: is stored as I8 but described as FLOAT: its integers run as float"),
        (lambda f: describe(f, **{f"{LAYER}.self_attn.q_proj.weight": "FLOAT"}), Engine.VLLM_ASCEND,
         f"{LAYER}.self_attn.qkv_proj: is packed from linears of different types (FLOAT, W8A8, W8A8): ValueError"),
        (lambda f: edit_json(f / "config.json", lambda c: c.update(quantization_config={})), Engine.VLLM_ASCEND,
         ": config.json has quantization_config, which vLLM takes for the whole description: every look-up fails"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), Engine.VLLM_ASCEND,
         ": model.safetensors.index.json is there; vLLM drops every weight file that it does not name"),
        (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="glm4v_moe")), Engine.MINDIE,
         ": {folder}/config.json: model_type is 'glm4v_moe': GLM-4.5V and GLM-4.6V are mixtures of experts, but glmq needs "
         "'glm4v' (GLM-4.1V-9B, GLM-4.6V-Flash, AutoGLM-Phone-9B, Glyph); give the folder of a GLM-4.1V or GLM-4.6V-Flash"),
    ],
)  # fmt: skip
def test_what_an_engine_would_refuse_is_said(
    copy: Path, edit: Callable[[Path], object], engine: Engine, expected: str
) -> None:
    edit(copy)
    assert expected.format(folder=copy) in errors(copy, engine)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (f"{LAYER}.self_attn.q_proj.bias", None, "does not exist; MindIE stops when it loads it"),
        ("lm_head.weight", None, "does not exist; MindIE stops when it loads it"),
        (f"{LAYER}.self_attn.o_proj.deq_scale", None, "does not exist; a W8A8 linear needs it"),
        (f"{LAYER}.self_attn.o_proj.input_scale", lambda t: t[0], "has shape [], wanted [1]: IndexError"),
        (f"{LAYER}.self_attn.o_proj.deq_scale", lambda t: t.int().view(torch.float32),
         "is F32, a model that runs in F16 wants the bits of float32 as I64: silent garbage"),
    ],
)  # fmt: skip
def test_tensors_that_an_engine_cannot_use_are_named(
    copy: Path, name: str, change: Callable[[Tensor], Tensor] | None, expected: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old).contiguous()

    edit_tensors(copy, edit)
    assert f"{name}: {expected}" in errors(copy, Engine.MINDIE)


def test_a_flat_weight_scale_is_an_index_error(small: Path, small_stats: Path, tmp_path: Path) -> None:
    folder = quantize(small, small_stats, tmp_path / "dynamic", is_dynamic=True, torch_dtype="fp16")
    assert errors(folder, Engine.MINDIE) == []
    name = f"{LAYER}.self_attn.o_proj.weight_scale"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].flatten()}))
    assert errors(folder, Engine.MINDIE) == [f"{name}: has shape [64], wanted [rows, 1]: IndexError"]


def test_the_older_form_needs_quantize_in_the_config(small: Path, small_stats: Path, tmp_path: Path) -> None:
    folder = quantize(small, small_stats, tmp_path / "mindie", mindie_format=True, torch_dtype="fp16")
    assert errors(folder, Engine.MINDIE) == []
    assert notes(folder, Engine.MINDIE) == ["MindIE calls this form deprecated; it wants quant_model_description.json"]
    assert errors(folder, Engine.VLLM_ASCEND)[-1] == (
        ": the description has the MindIE form; vLLM-Ascend knows quant_model_description.json only"
    )
    edit_json(folder / "config.json", lambda found: found.update(quantize="w8a8s"))
    assert ": config.json says quantize 'w8a8s', the description is for 'w8a8': FileNotFoundError" in errors(
        folder, Engine.MINDIE
    )
    edit_json(folder / "config.json", lambda found: found.pop("quantize"))
    assert errors(folder, Engine.MINDIE)[0] == (
        ": config.json has no quantize, so MindIE does not look for a description with a type in its name"
    )


def test_statistics_and_portable_folders_are_no_models(small_stats: Path, tiny_seed: Path, tmp_path: Path) -> None:
    assert errors(small_stats, Engine.MINDIE) == [": the folder holds calibration statistics, no model"]
    glmq.compress(tiny_seed, out=tmp_path / "sc", codec="portable")
    assert errors(tmp_path / "sc", Engine.MINDIE) == [
        ": the weights are in glmq's storage form; `glmq compress --decompress` restores them"
    ]


def test_sparse_types_in_bfloat16_are_refused(tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert errors(tmp_path, Engine.MINDIE) == []
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = errors(tmp_path, Engine.MINDIE)
    assert found[0] == ": text_config.dtype is bfloat16; W8A8S runs on the Atlas 300I Duo, in float16 only"
    assert notes(tmp_path, Engine.VLLM_ASCEND)[1] == (
        "W8A8S is known to vLLM-Ascend on the Atlas 300I Duo only; vLLM-Ascend does not run GLM-4.1V on the Atlas 300I Duo, "
        "where its rotary kernel has no interleaved mode; MindIE does"
    )


def test_mindie_reads_one_type_per_model_in_text_layers_alone(copy: Path) -> None:
    o_proj = f"{LAYER}.self_attn.o_proj.weight"
    edit_json(copy / DESCRIPTION, lambda d: d.update({o_proj: "W8A8_DYNAMIC", "lm_head.weight": "W8A8"}))
    assert errors(copy, Engine.MINDIE)[:2] == [
        f"{o_proj.removesuffix('.weight')}: is W8A8_DYNAMIC, one of 1 such linear; MindIE reads one type per model, here W8A8",
        "lm_head: is W8A8, one of 1 such linear; MindIE reads the vision tower and lm_head in float alone",
    ]
    schemes = {one.module: one.scheme for one in module_schemes(scan_folder(copy), read_config(copy), Engine.MINDIE)}
    assert schemes[f"{LAYER}.self_attn.o_proj"] == "refused: it reads one type per model, here W8A8"
    assert schemes["lm_head"] == "refused: it reads the vision tower and lm_head in float alone"
    assert schemes[f"{LAYER}.mlp.gate_up_proj"] == "W8A8"
    qkv = {f"{LAYER}.self_attn.{part}_proj.weight": "W8A8_DYNAMIC" for part in "qkv"}
    edit_json(copy / DESCRIPTION, lambda d: d.update({**qkv, "lm_head.weight": "FLOAT"}))
    assert errors(copy, Engine.MINDIE)[0] == (
        f"{LAYER}.self_attn.q_proj: is W8A8_DYNAMIC, one of 4 such linears; MindIE reads one type per model, here W8A8"
    )


def test_a_static_linear_of_a_dynamic_model_is_run_as_a_dynamic_one(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    out = quantize(small, small_stats, tmp_path / "out", is_dynamic=True, layer=("*.o_proj=W8A8",))
    assert errors(out, Engine.MINDIE) == []


def test_a_plain_linear_without_a_key_depends_on_the_release_of_vllm(copy: Path) -> None:
    key = f"{LAYER}.self_attn.o_proj.weight"
    edit_json(copy / DESCRIPTION, lambda d: d.pop(key))
    assert (
        f"{key}: is not in the description, vLLM looks it up for {LAYER}.self_attn.o_proj: "
        "0.18 to 0.26: KeyError; 0.27: KeyError; 0.28 to 0.30: it runs as float, without a word"
    ) in errors(copy, Engine.VLLM_ASCEND)


def test_sglang_finds_every_linear_of_the_text_layers_under_its_own_names(copy: Path) -> None:
    assert errors(copy, Engine.SGLANG) == []
    edit_json(copy / DESCRIPTION, lambda d: d.pop("model.layers.1.mlp.up_proj.weight"))
    assert errors(copy, Engine.SGLANG) == [
        "model.layers.1.mlp.up_proj.weight: is not in the description, where SGLang looks it up for "
        "model.layers.1.mlp.gate_up_proj: integers run as float"
    ]
    edit_json(copy / DESCRIPTION, lambda d: d.update({"model.layers.0.self_attn.o_proj.weight": "W8A8S"}))
    assert (
        "model.layers.0.self_attn.o_proj: is W8A8S, for which SGLang has no linear: it knows FLOAT, W8A8, W8A8_DYNAMIC"
        in errors(copy, Engine.SGLANG)
    )


def test_every_engine_says_which_scheme_it_takes_for_each_module(copy: Path) -> None:
    config, folder = read_config(copy), scan_folder(copy)
    of_mindie = dict(group_schemes(module_schemes(folder, config, Engine.MINDIE)))
    assert of_mindie["layers.0-1.self_attn.query_key_value"] == "W8A8"
    assert of_mindie["layers.0-1.mlp.down_proj"] == "FLOAT"
    of_vllm = dict(group_schemes(module_schemes(folder, config, Engine.VLLM_ASCEND)))
    assert of_vllm["layers.0-1.self_attn.qkv_proj"] == "W8A8"
    assert of_vllm["visual.merger.gate_up_proj"] == of_vllm["lm_head"] == "FLOAT"
    of_sglang = module_schemes(folder, config, Engine.SGLANG)
    assert [one.module for one in of_sglang[:2]] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    assert {one.scheme for one in of_sglang} == {"W8A8", "FLOAT"}
    edit_json(copy / DESCRIPTION, lambda d: d.update({f"{LAYER}.self_attn.k_proj.weight": "FLOAT"}))
    mixed = module_schemes(scan_folder(copy), config, Engine.VLLM_ASCEND)
    (scheme,) = (one.scheme for one in mixed if one.module == f"{LAYER}.self_attn.qkv_proj")
    assert scheme == "refused: mixes W8A8, FLOAT"
    edit_json(copy / DESCRIPTION, lambda d: d.pop(f"{LAYER}.self_attn.o_proj.weight"))
    (scheme,) = (one.scheme for one in module_schemes(scan_folder(copy), config, Engine.MINDIE)
                 if one.module == f"{LAYER}.self_attn.o_proj")  # fmt: skip
    assert scheme == "no key: KeyError"


def test_a_processor_that_mindies_transformers_does_not_know_is_an_error(copy: Path) -> None:
    edit_json(copy / "preprocessor_config.json", lambda c: c.update(processor_class="Glm46VProcessor"))
    (found,) = errors(copy, Engine.MINDIE)
    assert found.startswith(": preprocessor_config.json names classes or has settings that transformers 4.53.0")
    assert "a bare tokenizer" in found


def test_no_video_settings_are_no_obstacle_for_mindie(copy: Path) -> None:
    (copy / "video_preprocessor_config.json").unlink()
    assert errors(copy, Engine.MINDIE) == []


def test_a_chip_that_does_not_load_the_type_is_an_error(copy: Path) -> None:
    edit_json(copy / DESCRIPTION, lambda d: d.update(model_quant_type="W8A8_DYNAMIC"))
    found = [f.message for f in check_chip(scan_folder(copy), Place(Engine.MINDIE, Chip.DUO_300I))]
    assert found == [
        "MindIE on the Atlas 300I Duo does not load W8A8_DYNAMIC: the 300I Duo recipe is W8A8S, then W8A8SC"
    ]
    assert list(check_chip(scan_folder(copy), Place(Engine.MINDIE, None))) == []


def test_a_chip_that_does_not_load_the_type_of_a_layer_is_an_error(copy: Path) -> None:
    edit_json(copy / DESCRIPTION, lambda d: d.update({f"{LAYER}.self_attn.o_proj.weight": "W8A16"}))
    (found,) = check_chip(scan_folder(copy), Place(Engine.VLLM_ASCEND, Chip.DUO_300I))
    assert (found.tensor, found.message) == (
        f"{LAYER}.self_attn.o_proj.weight",
        "vLLM-Ascend on the Atlas 300I Duo does not load W8A16: its registry for the 300I Duo has no weight-only types",
    )
    assert list(check_chip(scan_folder(copy), Place(Engine.VLLM_ASCEND, Chip.A2_800I))) == []


def test_a_config_that_names_ascend_alone_is_read_by_the_newest_vllm_ascend(copy: Path) -> None:
    edit_json(copy / "config.json", lambda c: c.update(quantization_config={"quant_method": "ascend"}))
    assert errors(copy, Engine.VLLM_ASCEND) == []
    assert (
        "config.json has quantization_config, which releases before 0.30 take for the whole description: every look-up fails"
        in notes(copy, Engine.VLLM_ASCEND)
    )


@pytest.mark.parametrize(
    ("options", "engine", "sentence"),
    [
        (
            {"a_bit": 16},
            Engine.VLLM_ASCEND,
            ": vLLM-Ascend runs W8A16 in float16 only, not in bfloat16: its kernel takes no bfloat16 bias, which q_proj, "
            "k_proj and v_proj have (its issue 7039)",
        ),
        (
            {"is_dynamic": True, "torch_dtype": "fp16"},
            Engine.SGLANG,
            ": SGLang runs W8A8_DYNAMIC in bfloat16 only, not in float16: its kernel takes no float16 scales "
            "(vLLM-Ascend's issue 7443)",
        ),
        (
            {"w_bit": 4, "is_lowbit": True, "is_dynamic": True},
            Engine.VLLM_ASCEND,
            f"{LAYER}.self_attn.q_proj.bias: is left out of its linear's result, one of 6 such W4A8_DYNAMIC linears; "
            "give those another type: --layer '*.self_attn.[qkv]_proj=W8A8_DYNAMIC'",
        ),
        (
            {"format": "compressed-tensors"},
            Engine.VLLM_ASCEND,
            ": is W8A8 in the compressed-tensors form, of which vLLM-Ascend reads W8A8_DYNAMIC alone",
        ),
        (
            {"format": "compressed-tensors", "is_dynamic": True},
            Engine.SGLANG,
            ": is in the compressed-tensors form, which SGLang does not read; pass --format ascendv1",
        ),
    ],
)
def test_what_a_kernel_of_the_engine_does_not_run_is_an_error(
    options: dict[str, object], engine: Engine, sentence: str, small: Path, small_stats: Path, tmp_path: Path
) -> None:
    out = quantize(small, small_stats, tmp_path / "out", **options)
    assert errors(out, engine) == [sentence]


def test_a_dtype_that_the_chip_lacks_is_an_error(w8a8: Path, small: Path, small_stats: Path, tmp_path: Path) -> None:
    duo = Place(Engine.MINDIE, Chip.DUO_300I)
    assert list(check_chip(scan_folder(w8a8), duo)) == []
    bfloat = quantize(small, small_stats, tmp_path / "bfloat")
    assert [found.message for found in check_chip(scan_folder(bfloat), duo)] == [
        "MindIE on the Atlas 300I Duo runs W8A8 in float16 only, not in bfloat16"
    ]
    assert list(check_chip(scan_folder(bfloat), Place(Engine.MINDIE, Chip.A2_800I))) == []


def test_vllm_ascend_loads_w8a16_and_mindie_does_not(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = quantize(small, small_stats, tmp_path / "out", a_bit=16, torch_dtype="fp16")
    assert errors(out, Engine.VLLM_ASCEND) == []
    assert (
        f"{LAYER}.mlp.gate_up_proj.weight: is stored as I8 but described as W8A16: its integers run as float"
        in errors(out, Engine.MINDIE)
    )
    edit_tensors(out, lambda tensors: tensors.pop(f"{LAYER}.mlp.gate_up_proj.weight_offset"))
    assert errors(out, Engine.VLLM_ASCEND) == [
        f"{LAYER}.mlp.gate_up_proj.weight_offset: does not exist; a W8A16 linear needs it"
    ]
