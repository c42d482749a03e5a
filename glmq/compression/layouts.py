"""Which tensors each serving engine wants from each rank of a GLM-4.1V, and from which slices they are made.

MindIE: one folder per rank, its own names, embedding whole with one zero row more, quant_bias of row-parallel linears zero
on ranks above 0 (its kernel adds it before the ranks' results are summed), norm biases only where it reads them.

vLLM-Ascend (best effort: from reading its source, not run): one file per rank, embedding split over rows padded to a
multiple of 64, quant_bias whole on every rank, a bias for every RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final, TypeAlias

from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint
from glmq.compression.shard import RankSplit, RankTensor, Slice, zeros
from glmq.engines import Engine
from glmq.model.config import ModelConfig
from glmq.spec import PACKED_SUFFIXES, QuantType

VLLM_VOCAB_MULTIPLE: Final = 64


class Unsharded(Enum):
    """The layout of a portable folder of one rank, which is no engine's: names and cuts of the checkpoint it was made from."""

    SOURCE = "source"


Layout: TypeAlias = Engine | Unsharded
"""How the tensors of a rank are named and cut."""


def parse_layout(text: str) -> Layout:
    """The layout that is spelled so in a manifest. Raises ValueError if none is."""
    if text == Unsharded.SOURCE.value:
        return Unsharded.SOURCE
    engine = Engine(text)
    if engine not in _STYLES:
        raise ValueError(f"{text} has no layout of parts")
    return engine


@dataclass(frozen=True, slots=True)
class _Style:
    """What differs between the engines."""

    text: str
    """Prefix of the text model."""
    qkv: str
    """Name of the packed q, k, v."""
    all_norm_biases: bool
    """Every RMSNorm has a bias; else only those that smoothing can touch."""
    zero_other_ranks: bool
    """quant_bias of row-parallel linears is zero on ranks above 0."""
    split_vocabulary: bool
    """The embedding is split and padded like lm_head; else it is whole with one zero row more, and lm_head is not padded."""
    flat_convolutions: bool
    """Convolution kernels are stored as matrices."""
    split_merger: bool
    """The merger's first linear is split over its rows; else it is whole on every rank."""


_STYLES: Final[Mapping[Engine, _Style]] = {
    Engine.MINDIE: _Style(
        text="language_model",
        qkv="query_key_value",
        all_norm_biases=False,
        zero_other_ranks=True,
        split_vocabulary=False,
        flat_convolutions=True,
        split_merger=False,
    ),
    Engine.VLLM_ASCEND: _Style(
        text="language_model.model",
        qkv="qkv_proj",
        all_norm_biases=True,
        zero_other_ranks=False,
        split_vocabulary=True,
        flat_convolutions=False,
        split_merger=True,
    ),
}


def rank_tensors(source: Checkpoint, config: ModelConfig, layout: Layout, rank: int, world: int) -> list[RankTensor]:
    """Every tensor of one rank, before compression.

    Args:
        source: an un-sharded W8A8S checkpoint that `check_source` accepts.
        config: its config.json.
        layout: an engine's; un-sharded only with one rank.
        rank: 0 to world - 1.
        world: a number of ranks that `check_world` accepts.

    Raises:
        CheckpointError: a tensor is missing, has a dtype that the engine does not take, or has no place in the layout.
    """
    split = RankSplit(source, rank, world)
    if isinstance(layout, Unsharded):
        for name in source:
            info = source[name]
            split.tensors.append(RankTensor(TensorSpec(name, info.dtype, info.shape), (split.whole(name),)))
        return split.tensors
    style = _STYLES[layout]
    _embeddings(split, config, style)
    for index in range(config.layers):
        _text_layer(split, config, style, index)
    _norm(split, style, f"{config.family.text}.norm", f"{style.text}.norm", needs_bias=False)
    _vision(split, config, style)
    return split.finish()


def _embeddings(split: RankSplit, config: ModelConfig, style: _Style) -> None:
    embedding, head = f"{config.family.text}.embed_tokens.weight", f"{config.family.lm_head}.weight"
    if style.split_vocabulary:
        padded = -(-config.vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
        step = padded // split.world
        for name, target in ((embedding, f"{style.text}.embed_tokens.weight"), (head, "language_model.lm_head.weight")):
            rows = split.row_range(name, split.rank * step, (split.rank + 1) * step)
            padding = (zeros(step - rows.rows, rows.cols),) if rows.rows < step else ()
            split.put(target, rows, *padding)
    else:
        split.put(f"{style.text}.embed_tokens.weight", split.whole(embedding), zeros(1, config.hidden_size))
        split.put(f"{style.text}.lm_head.weight", split.rows(head))


def _text_layer(split: RankSplit, config: ModelConfig, style: _Style, index: int) -> None:
    name, target = f"{config.family.text}.layers.{index}", f"{style.text}.layers.{index}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _norm(split, style, f"{name}.{norm}", f"{target}.{norm}", needs_bias=True)
    for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
        _norm(split, style, f"{name}.{norm}", f"{target}.{norm}", needs_bias=False)

    def heads(linear: str, suffix: str) -> Slice:
        return split.heads(f"{linear}.{suffix}", config.head_dim)

    qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
    _stacked_linear(split, f"{target}.self_attn.{style.qkv}", [partial(heads, linear) for linear in qkv], qkv)
    split.put(f"{target}.self_attn.{style.qkv}.bias", *(heads(linear, "bias") for linear in qkv))
    _row_parallel(split, style, f"{name}.self_attn.o_proj", f"{target}.self_attn.o_proj")

    gate_up = f"{name}.mlp.gate_up_proj"

    def half(part: int, suffix: str) -> Slice:
        return split.rows(f"{gate_up}.{suffix}", part, 2)

    _stacked_linear(split, f"{target}.mlp.gate_up_proj", [partial(half, 0), partial(half, 1)], [gate_up])
    _row_parallel(split, style, f"{name}.mlp.down_proj", f"{target}.mlp.down_proj")


def _stacked_linear(
    split: RankSplit, target: str, cuts: Sequence[Callable[[str], Slice]], linears: Sequence[str]
) -> None:
    """A linear split along its rows: the cuts of its weight (and of its scales) one below the other."""
    split.put(f"{target}.weight", *(cut("weight") for cut in cuts))
    if split.source.info(f"{linears[0]}.weight").dtype == "I8":
        for suffix in ("deq_scale", "quant_bias"):
            split.put(f"{target}.{suffix}", *(cut(suffix) for cut in cuts))
        for suffix in ("input_scale", "input_offset"):
            split.put(f"{target}.{suffix}", split.whole(f"{linears[0]}.{suffix}"))
            for other in linears[1:]:
                split.drop_equal(f"{other}.{suffix}", f"{linears[0]}.{suffix}")


def _row_parallel(split: RankSplit, style: _Style, linear: str, target: str) -> None:
    """A linear split along its columns; the ranks' results are summed."""
    split.put(f"{target}.weight", split.cols(f"{linear}.weight"))
    if split.source.info(f"{linear}.weight").dtype == "I8":
        quant_bias = split.whole(f"{linear}.quant_bias")
        if split.rank > 0 and style.zero_other_ranks:
            split.put(f"{target}.quant_bias", zeros(quant_bias.rows))
            split.drop(f"{linear}.quant_bias")
        else:
            split.put(f"{target}.quant_bias", quant_bias)
        for suffix in ("deq_scale", "input_scale", "input_offset"):
            split.put(f"{target}.{suffix}", split.whole(f"{linear}.{suffix}"))


def _norm(split: RankSplit, style: _Style, norm: str, target: str, *, needs_bias: bool) -> None:
    """An RMSNorm; `needs_bias` in every layout, where smoothing may have put one."""
    split.put(f"{target}.weight", split.whole(f"{norm}.weight"))
    bias = f"{norm}.bias"
    if not needs_bias and not style.all_norm_biases:
        split.drop_zeros(bias)
    elif bias in split.source:
        split.put(f"{target}.bias", split.whole(bias))
    else:
        split.put(f"{target}.bias", zeros(split.whole(f"{norm}.weight").rows))


def _vision(split: RankSplit, config: ModelConfig, style: _Style) -> None:
    vision = config.family.vision
    for convolution in ("patch_embed.proj", "downsample"):
        name = f"{vision}.{convolution}"
        shape = None if style.flat_convolutions else split.source.info(f"{name}.weight").shape
        split.put(f"visual.{convolution}.weight", split.whole(f"{name}.weight"), shape=shape)
        split.put(f"visual.{convolution}.bias", split.whole(f"{name}.bias"))
    for index in range(config.vision_depth):
        name, target = f"{vision}.blocks.{index}", f"visual.blocks.{index}"
        for norm in ("norm1", "norm2"):
            _norm(split, style, f"{name}.{norm}", f"{target}.{norm}", needs_bias=False)
        qkv = f"{name}.attn.qkv.weight"
        split.put(f"{target}.attn.qkv.weight", *(split.rows(qkv, third, 3) for third in range(3)))
        split.put(f"{target}.attn.proj.weight", split.cols(f"{name}.attn.proj.weight"))
        _vision_mlp(split, f"{name}.mlp", f"{target}.mlp")
    for norm in ("post_conv_layernorm", "post_layernorm"):
        _norm(split, style, f"{vision}.{norm}", f"visual.{norm}", needs_bias=False)
    _vision_mlp(split, f"{vision}.merger", "visual.merger")
    proj = f"{vision}.merger.proj.weight"
    split.put("visual.merger.proj.weight", split.rows(proj) if style.split_merger else split.whole(proj))
    for name in ("merger.post_projection_norm.weight", "merger.post_projection_norm.bias",
                 "embeddings.position_embedding.weight"):  # fmt: skip
        split.put(f"visual.{name}", split.whole(f"{vision}.{name}"))


def _vision_mlp(split: RankSplit, name: str, target: str) -> None:
    gate, up = split.rows(f"{name}.gate_proj.weight"), split.rows(f"{name}.up_proj.weight")
    split.put(f"{target}.gate_up_proj.weight", gate, up)
    split.put(f"{target}.down_proj.weight", split.cols(f"{name}.down_proj.weight"))


def rank_file_types(names: Sequence[str], linears: Sequence[str], *, compressed: bool) -> dict[str, str]:
    """The description of a part in MindIE's layout, in natural order of the given names.

    Args:
        names: every tensor of the part.
        linears: targets (without `.weight`) of the quantized linears.
        compressed: their weights are compressed by the engine's codec (W8A8SC); else W8A8S.
    """
    quantized = set(linears)
    weight = QuantType.W8A8SC if compressed else QuantType.W8A8S
    types: dict[str, str] = {}
    for name in names:
        base, _, suffix = name.rpartition(".")
        if base not in quantized or suffix == "bias":
            types[name] = QuantType.FLOAT.value
        else:
            types[name] = (weight if suffix in PACKED_SUFFIXES else QuantType.W8A8S).value
    return types


def vllm_types(types: Mapping[str, str]) -> dict[str, str]:
    """The description of a vLLM-Ascend folder: that of the W8A8S checkpoint with compressed weights, aliases included."""
    return {
        name: QuantType.W8A8SC.value if quant_type == QuantType.W8A8S.value and name.endswith(".weight") else quant_type
        for name, quant_type in types.items()
    }
