import re
from pathlib import Path

import pytest

from glmq.engines import ENGINES, Chip, Engine, Place
from glmq.spec import FloatDtype, Form, QuantType

ROOT = Path(__file__).parents[1]
WRITTEN = {t for t in QuantType if t is not QuantType.FLOAT and not t.spec.is_compressed}


@pytest.mark.parametrize("engine", Engine)
def test_every_engine_says_yes_or_why_not_to_every_type_on_every_chip(engine: Engine) -> None:
    assert set(ENGINES[engine].chips) == set(Chip)
    for support in ENGINES[engine].chips.values():
        loaded = {quant_type for quant_type in support.dtypes if quant_type in WRITTEN}
        assert loaded | set(support.refusals) == WRITTEN
        assert not loaded & set(support.refusals)


def test_sparse_types_are_float16_on_the_300i_duo_only() -> None:
    for engine in (Engine.MINDIE, Engine.VLLM_ASCEND):
        for quant_type in (QuantType.W8A8S, QuantType.W8A8SC):
            assert engine.spec.chips_for(quant_type, None) == (Chip.DUO_300I,)
            assert engine.spec.chips_for(quant_type, FloatDtype.BF16) == ()
            assert Place(engine, None).dtypes(quant_type) == (FloatDtype.FP16,)


def test_w8a8_in_bfloat16_is_not_for_the_300i_duo() -> None:
    for engine in (Engine.MINDIE, Engine.VLLM_ASCEND):
        assert engine.spec.chips_for(QuantType.W8A8, FloatDtype.FP16) == (Chip.A2_800I, Chip.DUO_300I)
        assert engine.spec.chips_for(QuantType.W8A8, FloatDtype.BF16) == (Chip.A2_800I,)


def test_a_place_loads_a_model_if_it_reads_its_form_and_every_type_in_its_dtype() -> None:
    mindie, vllm = Place(Engine.MINDIE, Chip.A2_800I), Place(Engine.VLLM_ASCEND, Chip.A2_800I)
    bf16, form = FloatDtype.BF16, Form.ASCEND_V1
    w8a8, dynamic = QuantType.W8A8, QuantType.W8A8_DYNAMIC
    assert mindie.loads(w8a8, [w8a8], bf16, form, text_only=True)
    assert mindie.loads(w8a8, [w8a8], bf16, Form.MINDIE, text_only=True)
    assert not mindie.loads(w8a8, [w8a8], bf16, form, text_only=False)
    assert not mindie.loads(w8a8, [w8a8, dynamic], bf16, form, text_only=True)
    assert not mindie.loads(w8a8, [dynamic], bf16, form, text_only=True)
    assert mindie.loads(dynamic, [w8a8, dynamic], bf16, form, text_only=True)
    assert not Place(Engine.MINDIE, Chip.DUO_300I).loads(w8a8, [w8a8], bf16, form, text_only=True)
    assert vllm.loads(w8a8, [w8a8, dynamic], bf16, form, text_only=False)
    assert not vllm.loads(w8a8, [w8a8, dynamic], FloatDtype.FP16, form, text_only=True)
    assert not vllm.loads(w8a8, [w8a8], bf16, Form.MINDIE, text_only=True)
    assert not vllm.loads(w8a8, [w8a8], bf16, Form.COMPRESSED_TENSORS, text_only=True)
    assert vllm.loads(dynamic, [dynamic], bf16, Form.COMPRESSED_TENSORS, text_only=True)
    in_vllm = Place(Engine.VLLM_ASCEND, Chip.DUO_300I)  # which has the type, but cannot run the model
    assert in_vllm.dtypes(QuantType.W8A8S) == (FloatDtype.FP16,)
    assert not in_vllm.loads(QuantType.W8A8S, [QuantType.W8A8S], FloatDtype.FP16, form, text_only=True)


def test_a_place_without_a_chip_is_any_of_them() -> None:
    anywhere = Place(Engine.MINDIE, None)
    assert anywhere.dtypes(QuantType.W8A8) == (FloatDtype.BF16, FloatDtype.FP16)
    assert Place(Engine.MINDIE, Chip.DUO_300I).dtypes(QuantType.W8A8) == (FloatDtype.FP16,)
    assert anywhere.types() == (QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8S)
    assert anywhere.dtypes(QuantType.W4A8_DYNAMIC) == ()
    assert anywhere.why_not(QuantType.W4A8_DYNAMIC) == "MindIE's GLM-4.1V has no W4A8_DYNAMIC loader"


@pytest.mark.parametrize("engine", Engine)
def test_the_page_of_engines_says_what_each_reads_on_which_chip(engine: Engine) -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    (reads,) = re.findall(rf"^\| {engine.spec.title} \| (.*?) \|", page, flags=re.M)
    said = {chip: set(types.strip().split(", ")) for types, chip in re.findall(r"([A-Z0-9_, ]+) \((.*?)\)", reads)}
    assert said == {
        chip.value: {quant_type.value for quant_type in support.dtypes}
        for chip, support in engine.spec.chips.items()
        if support.dtypes
    }


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_table_of_commands_names_the_engines_that_read_each_recipe(readme: str) -> None:
    """All types that are made on the way: W8A8S, then W8A8SC."""
    page = (ROOT / readme).read_text(encoding="utf-8")
    rows = re.findall(r"^\| Atlas (.*?) \| (.*?) \| (.*?) \|", page, flags=re.M)
    assert len(rows) == 4
    for name, engines, recipe in rows:
        types = {QuantType(word) for word in re.findall(r"W\dA[A-Z0-9_]+", recipe)}
        supports = {one.spec.title: one.spec.chips[Chip(name)] for one in Engine}
        readers = [title for title, one in supports.items() if types <= set(one.dtypes) and one.fails is None]
        assert re.split("[,、] ?", engines) == readers
