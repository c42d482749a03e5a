import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import StandInNpu, edit_tensors, full_model_kwargs, load_full, run_ranks, slow_histogram, tree
from PIL import Image
from torch import Tensor, nn

from glmq.calibration.resume import CalibrationJournal
from glmq.calibration.samples import Sample, list_images, open_image, read_samples
from glmq.calibration.stats import Settings, Statistics
from glmq.calibration.stats_writer import SAMPLE_ROWS, StatsWriter
from glmq.calibration.stream import _check_finite, _Run, calibrate_checkpoint
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, NonFiniteError, SampleError, StatisticsError
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.model.streamed import StreamedModel
from glmq.numerics.sensitivity import Heads, LayerOutputs, LayerWeights, SensitivityAccumulator
from glmq.ranks import Place, Ranks
from glmq.records import BlockDone

ALONE = Ranks(Place(0, 1))
BUILDING = threading.Lock()
"""Models are built by patching torch, which threads must not do at once."""
LAYER = "model.language_model.layers.0"
U = 2.0**-24
"""Unit roundoff of float32."""
WIDE = Settings("float32", None, True, text_inputs=True)


def preprocessor(model: Path, max_pixels: int | None = None) -> Preprocessor:
    return Preprocessor(model, read_config(model), max_pixels=max_pixels, trust_remote_code=False)


def calibrate(
    model: Path,
    samples: tuple[Sample, ...],
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[BlockDone, StreamedModel]]:
    """Run the engine; yields its records with the model at that moment."""
    out.mkdir(exist_ok=True)
    with Checkpoint.open(model) as source:
        with BUILDING:
            streamed = StreamedModel(source, read_config(model), device=torch.device("cpu"), dtype=dtype)
            inputs = preprocessor(model)
        ranks.barrier()  # nobody is building any more
        sink = StatsWriter(out, source.fingerprint(), samples, WIDE)
        journal = CalibrationJournal(out, out, {}, source, streamed.config.family, ranks)
        for done in calibrate_checkpoint(streamed, samples, inputs, sink, WIDE, journal, ranks):
            yield done, streamed
        if ranks.place.is_first:
            (out / "journal.jsonl").unlink()


@pytest.fixture(scope="module")
def samples(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    """An image with prompt and answer, a plain text, and a wide image with a prompt."""
    folder = tmp_path_factory.mktemp("samples")
    shutil.copy(pictures / "03.png", folder)
    Image.open(pictures / "05.png").resize((168, 84)).save(folder / "wide.png")
    lines = [
        {"image": "03.png", "prompt": "Please describe this picture in detail.", "text": "One red circle."},
        {"text": "Permission is hereby granted, free of charge, to any person."},
        {"image": "wide.png", "prompt": "What is it?"},
    ]
    (folder / "s.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return read_samples(folder / "s.jsonl", limit=None).samples


@pytest.fixture(scope="module")
def statistics(small: Path, samples: tuple[Sample, ...], tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    out = tmp_path_factory.mktemp("calibrated") / "stats"
    for _ in calibrate(small, samples, out):
        pass
    return Statistics.open(out)


@pytest.fixture(scope="module")
def hooked(small: Path, samples: tuple[Sample, ...]) -> dict[str, list[Tensor]]:
    """What plain hooks on the whole model see: the input [tokens, K] of every linear for each sample that reaches it."""
    model = load_full(small, torch.float32)
    seen: dict[str, list[Tensor]] = {}

    def remember(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(remember(name))
    make = preprocessor(small)
    with torch.no_grad():
        for sample in samples:
            inputs = make.encode(open_image(sample), sample.prompt, sample.answer)
            model(**full_model_kwargs(inputs, model))
    return seen


def test_linears_of_one_group_see_the_same_input(small: Path, hooked: dict[str, list[Tensor]]) -> None:
    for block in read_config(small).family.blocks(read_config(small)):
        for group in block.groups:
            for linear in group.linears[1:]:
                for x, y in zip(hooked[group.site], hooked[linear.name], strict=True):
                    assert torch.equal(x, y)


def test_every_linears_input_has_statistics(
    small: Path, statistics: Statistics, hooked: dict[str, list[Tensor]]
) -> None:
    sites = [group.site for block in read_config(small).family.blocks(read_config(small)) for group in block.groups]
    assert all(site in statistics for site in sites)
    linears = {
        linear.name
        for block in read_config(small).family.blocks(read_config(small))
        for g in block.groups
        for linear in g.linears
    }
    assert linears == set(hooked)


def test_statistics_equal_those_of_hooks_on_the_whole_model(
    small: Path, statistics: Statistics, hooked: dict[str, list[Tensor]]
) -> None:
    for site in (
        group.site for block in read_config(small).family.blocks(read_config(small)) for group in block.groups
    ):
        found, x = statistics.input(site), torch.cat(hooked[site])
        tokens, wide = x.shape[0], x.double()
        assert found.tokens == tokens
        assert torch.equal(found.minimum, x.amin(0))
        assert torch.equal(found.maximum, x.amax(0))
        # Sums run in float64, whose rounding is far below the one of the result to float32: one unit of it.
        assert ((found.mean - wide.mean(0)).abs() <= U * wide.abs().mean(0)).all()
        assert ((found.square_mean - wide.square().mean(0)).abs() <= 2 * U * wide.square().mean(0)).all()
        # A float32 sum of n products in any order is off by at most n units of the sum of magnitudes, plus the division.
        bound = (tokens + 2) * U * (wide.abs().T @ wide.abs()) / tokens
        assert ((found.second_moment - wide.T @ wide / tokens).abs() <= bound).all()


def test_sensitivities_equal_those_of_hooks_on_the_whole_model(
    small: Path, statistics: Statistics, samples: tuple[Sample, ...]
) -> None:
    model, config = load_full(small, torch.float32), read_config(small)
    layers = [block for block in config.family.blocks(config) if block.layer is not None]
    sums = [SensitivityAccumulator(Heads(config.heads, config.kv_heads)) for _ in layers]
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    make = preprocessor(small)
    for sample in (samples[0], samples[2], samples[1]):  # the order of sums: every other one, then the rest
        inputs = make.encode(open_image(sample), sample.prompt, sample.answer)
        with torch.no_grad():
            model(**full_model_kwargs(inputs, model))
        for block, own in zip(layers, sums, strict=True):
            names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
            stream = seen[block.name][0] if isinstance(seen[block.name], tuple) else seen[block.name]
            outputs = [seen[f"{block.name}.{name}"] for name in names] + [stream]
            own.accumulate(own.observe(LayerOutputs(*(x.reshape(-1, x.shape[-1]) for x in outputs))))
    for block, own in zip(layers, sums, strict=True):
        names = ("post_self_attn_layernorm", "post_mlp_layernorm", "self_attn.o_proj", "mlp.down_proj")
        rows = own.finish(
            LayerWeights(*(model.get_submodule(f"{block.name}.{name}").weight.detach() for name in names))
        )
        wanted = [torch.cat([rows.query, rows.key, rows.value]), rows.output, rows.gate_up, rows.down]
        for group, expected in zip(block.groups, wanted, strict=True):
            found = statistics.input(group.site).sensitivity
            assert found is not None
            assert torch.equal(found, expected)
    others = [g.site for block in config.family.blocks(config) if block.layer is None for g in block.groups]
    assert not any(statistics.has_sensitivity(site) for site in others)


@pytest.mark.parametrize(
    "site",
    ["model.visual.blocks.0.attn.qkv", "model.visual.merger.proj", "model.language_model.layers.1.mlp.down_proj"],
)
def test_histograms_equal_those_of_hooks_on_the_whole_model(
    site: str, statistics: Statistics, hooked: dict[str, list[Tensor]]
) -> None:
    found, x = statistics.input(site), torch.cat(hooked[site])
    for channel in range(x.shape[1]):
        exponent, counts = slow_histogram(x[:, channel].tolist())
        assert int(found.exponent[channel]) == exponent
        assert found.histogram[channel].tolist() == counts


def test_each_sample_gives_evenly_spaced_tokens(
    statistics: Statistics, hooked: dict[str, list[Tensor]], samples: tuple[Sample, ...]
) -> None:
    # The third sample comes before the second, see `convergence_order`.
    site, keep = "model.language_model.layers.0.self_attn.o_proj", SAMPLE_ROWS // len(samples)
    wanted = []
    for x in hooked[site][0::2] + hooked[site][1::2]:
        count = min(keep, x.shape[0])
        # torch.linspace and round, as documented: from the first token to the last.
        wanted += [x[round(i * (x.shape[0] - 1) / (count - 1))] for i in range(count)]
    assert torch.equal(statistics.input(site).sample, torch.stack(wanted))


def test_a_text_without_an_image_adds_nothing_to_the_vision_towers_statistics(
    statistics: Statistics, samples: tuple[Sample, ...]
) -> None:
    patches = 8 * 8 + 6 * 12
    assert statistics.input("model.visual.blocks.0.attn.qkv").tokens == patches
    assert statistics.input("model.visual.merger.down_proj").tokens == patches // 4
    tokens = [sample.tokens for sample in statistics.samples()]
    assert statistics.input("lm_head").tokens == sum(tokens)
    assert [sample.name for sample in statistics.samples()] == ["s.jsonl:1", "s.jsonl:2", "s.jsonl:3"]
    assert [sample.has_answer for sample in statistics.samples()] == [True, True, False]


def test_texts_alone_leave_the_vision_tower_out(small: Path, samples: tuple[Sample, ...], tmp_path: Path) -> None:
    for _ in calibrate(small, samples[1:2], tmp_path / "stats"):
        pass
    statistics = Statistics.open(tmp_path / "stats")
    assert "model.visual.blocks.0.attn.qkv" not in statistics
    assert "model.visual.merger.proj" not in statistics
    assert "model.language_model.layers.0.self_attn.q_proj" in statistics
    assert not list((tmp_path / "stats").glob("model.visual*"))


def test_one_record_comes_after_each_block_and_nothing_stays_in_memory(
    small: Path, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    found = []
    for done, model in calibrate(small, samples, tmp_path / "stats"):
        found.append((done.name, done.index, done.total))
        assert done.seconds > 0
        assert done.resident_bytes > 0
        assert all(parameter.device.type == "meta" for parameter in model.model.parameters())
    assert found == [
        ("model.visual.blocks.0", 0, 5),
        ("model.visual.merger", 1, 5),
        ("model.language_model.layers.0", 2, 5),
        ("model.language_model.layers.1", 3, 5),
        ("lm_head", 4, 5),
    ]


def test_two_runs_write_the_same_bytes(
    small: Path, samples: tuple[Sample, ...], statistics: Statistics, tmp_path: Path
) -> None:
    for _ in calibrate(small, samples, tmp_path / "stats"):
        pass
    assert tree(tmp_path / "stats") == tree(statistics.directory)


def test_extremes_and_histograms_do_not_depend_on_the_order_of_the_samples(
    small: Path, samples: tuple[Sample, ...], statistics: Statistics, tmp_path: Path
) -> None:
    for _ in calibrate(small, samples[::-1], tmp_path / "stats"):
        pass
    turned = Statistics.open(tmp_path / "stats")
    for site in (
        group.site for block in read_config(small).family.blocks(read_config(small)) for group in block.groups
    ):
        one, other = statistics.input(site), turned.input(site)
        for field in ("minimum", "maximum", "histogram", "exponent"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_a_run_that_stops_midway_leaves_no_manifest(small: Path, samples: tuple[Sample, ...], tmp_path: Path) -> None:
    run = calibrate(small, samples, tmp_path / "stats")
    next(run)
    run.close()
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [
        ".states-000-0", "journal.jsonl", "model.visual.blocks.0.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("blocks", [0, 1, 2, 4, 5])
def test_a_run_that_was_stopped_after_any_block_continues_to_the_same_bytes(
    blocks: int, small: Path, samples: tuple[Sample, ...], statistics: Statistics, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    run = calibrate(small, samples, out)
    for _ in range(blocks):
        next(run)
    run.close()
    done = [done.index for done, _ in calibrate(small, samples, out)]
    assert done == list(range(blocks, 5))
    assert tree(out) == tree(statistics.directory)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_write_the_bytes_of_one(
    world: int,
    small: Path,
    samples: tuple[Sample, ...],
    statistics: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glmq.numerics.moments.BAND_ROWS", 16)  # the widths are 32 to 192: every rank gets bands
    raised = run_ranks(world, lambda ranks: list(calibrate(small, samples, tmp_path / "stats", ranks=ranks)))
    assert raised == [""] * world
    assert tree(tmp_path / "stats") == tree(statistics.directory)


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "before", "after"), [(1, 3, 1), (2, 1, 2), (4, 2, 3), (5, 1, 2)])
def test_any_number_of_ranks_continues_what_another_number_began(
    blocks: int,
    before: int,
    after: int,
    small: Path,
    samples: tuple[Sample, ...],
    statistics: Statistics,
    tmp_path: Path,
) -> None:
    out = tmp_path / "stats"

    def stop_early(ranks: Ranks) -> None:
        run = calibrate(small, samples, out, ranks=ranks)
        for _ in range(blocks):
            next(run)
        ranks.barrier()  # rank 0 has journalled
        run.close()

    assert run_ranks(before, stop_early) == [""] * before
    assert run_ranks(after, lambda ranks: list(calibrate(small, samples, out, ranks=ranks))) == [""] * after
    assert tree(out) == tree(statistics.directory)


def test_all_ranks_stop_when_the_sample_of_one_overflows(
    small_copy: Path, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    edit_tensors(small_copy, lambda tensors: tensors["model.visual.post_conv_layernorm.weight"].fill_(3e38))

    def work(ranks: Ranks) -> None:
        try:
            list(calibrate(small_copy, samples[1:], tmp_path / "stats", ranks=ranks))
        except SampleError as error:  # of the image; the text does not pass the vision tower
            ranks.all_gather("", error)

    sentence = (
        "s.jsonl:3: the input of model.visual.blocks.0.attn.qkv holds NaN or infinity in torch.float32; "
        "leave this sample out"
    )
    assert run_ranks(2, work) == [
        f"OtherRankError: stopped because rank 1 failed: {sentence}", f"NonFiniteError: {sentence}",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_stops_the_run_by_its_name(
    bad: float, small_copy: Path, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    name = "model.language_model.layers.1.mlp.gate_up_proj.weight"
    edit_tensors(small_copy, lambda tensors: tensors[name][0, 0].fill_(bad))
    with pytest.raises(CheckpointError) as caught:
        list(calibrate(small_copy, samples, tmp_path / "stats"))
    assert str(caught.value) == (
        f"model-00001-of-00001.safetensors: tensor '{name}' holds 1 NaN or infinite values of 12288; "
        "download the file again or repair the checkpoint"
    )


@pytest.mark.parametrize(
    ("norm", "what"),
    [
        ("model.visual.post_conv_layernorm", "the input of model.visual.blocks.0.attn.qkv holds"),
        ("model.visual.post_layernorm", "the input of model.visual.merger.proj holds"),
        ("model.language_model.layers.0.post_mlp_layernorm", "the hidden states after model.language_model.layers.0 hold"),
        ("model.language_model.norm", "the input of lm_head holds"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "leave this sample out"),
        (torch.bfloat16, "use --compute-dtype fp32, or leave this sample out"),
    ],
)
def test_hidden_states_that_overflow_stop_the_run_by_place_and_sample(
    norm: str,
    what: str,
    dtype: torch.dtype,
    advice: str,
    small_copy: Path,
    samples: tuple[Sample, ...],
    tmp_path: Path,
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[f"{norm}.weight"].fill_(3e38)  # finite; where the normalised value exceeds 1.2 the product is not

    edit_tensors(small_copy, enlarge)
    with pytest.raises(SampleError) as caught:
        list(calibrate(small_copy, samples, tmp_path / "stats", dtype=dtype))
    assert str(caught.value) == f"s.jsonl:1: {what} NaN or infinity in {dtype}; {advice}"


@pytest.mark.parametrize(
    ("device", "bf16", "advice"),  # meta stands for an NPU
    [
        ("cpu", False, "--compute-dtype fp32"),
        ("meta", True, "--compute-dtype fp32"),
        ("meta", False, "--device-type cpu"),
    ],
)
def test_what_an_npu_cuts_off_at_the_end_of_float16_is_an_overflow(
    device: str, bf16: bool, advice: str, samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.device._load_npu", lambda: StandInNpu(bf16=bf16))
    model = SimpleNamespace(dtype=torch.float16, device=torch.device(device))
    with pytest.raises(NonFiniteError) as caught, _Run._blaming(SimpleNamespace(model=model), samples[0]):
        _check_finite(torch.tensor([1.0, -65504.0]).half(), "layers.0")
    assert str(caught.value) == (
        f"{samples[0].name}: the hidden states after layers.0 reach 65504, where float16 ends, in torch.float16; "
        f"use {advice}, or leave this sample out"
    )
    _check_finite(torch.tensor([65504.0]), "layers.0")


def test_an_image_that_the_model_cannot_take_stops_the_run_by_its_name(small: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 40)).save(tmp_path / "images" / "narrow.png")
    found = list_images(tmp_path / "images", "What?", skip_bad=False, limit=None).samples
    with pytest.raises(SampleError) as caught:
        list(calibrate(small, found, tmp_path / "stats"))
    assert str(caught.value) == (
        "narrow.png: its image has 20 x 40 pixels; the model needs sides of at least 28 pixels "
        "and an aspect ratio of at most 200"
    )


def test_more_samples_than_kept_tokens_keep_one_token_each(
    small: Path, samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.calibration.stream.SAMPLE_ROWS", 2)
    for _ in calibrate(small, samples, tmp_path / "stats"):
        pass
    assert Statistics.open(tmp_path / "stats").input("lm_head").sample.shape == (3, 64)


def test_the_forward_runs_in_the_asked_dtype(small: Path, samples: tuple[Sample, ...], tmp_path: Path) -> None:
    for _ in calibrate(small, samples[:1], tmp_path / "stats", dtype=torch.bfloat16):
        pass
    sample = Statistics.open(tmp_path / "stats").input("model.language_model.layers.0.mlp.down_proj").sample
    assert sample.dtype is torch.float32
    assert torch.equal(sample.bfloat16().float(), sample)


def test_weights_whose_statistics_leave_float32_are_refused(
    small_copy: Path, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    """Squares of 1e30 end at infinity, which no later run could use."""
    name = f"{LAYER}.self_attn.v_proj.weight"
    edit_tensors(small_copy, lambda tensors: tensors[name].view(-1)[5:6].fill_(1e30))
    with pytest.raises(StatisticsError) as caught:
        list(calibrate(small_copy, samples, tmp_path / "stats"))
    assert str(caught.value) == (
        f"{LAYER}.self_attn.q_proj: its sensitivity is beyond float32; weights near it are far too large, look for them with "
        "`glmq inspect --values` and repair the checkpoint"
    )
