"""GLM-4.1V as data: its tensors with shapes, its linears by role, its norm groups, what stays float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from glmq.model.config import ModelConfig

TEXT: Final = "model.language_model"
VISION: Final = "model.visual"
LM_HEAD: Final = "lm_head"

ROW_PARALLEL: Final = (".o_proj", ".down_proj", ".attn.proj")
"""Endings of linears that engines split along their input columns."""

DEFAULT_FLOAT: Final = (f"{VISION}.*", "*.mlp.down_proj", LM_HEAD)
"""Linears that stay float unless asked for, as in the mission."""


class Part(Enum):
    """The parts of the model that size tables speak of."""

    TEXT_LINEARS = "text linears"
    DOWN_PROJ = "down_proj"
    VISION = "vision tower"
    EMBEDDINGS = "embeddings and lm_head"
    NORMS = "text norms"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear of the model."""

    name: str
    rows: int
    """Output features N."""
    cols: int
    """Input features K."""
    has_bias: bool


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows of an earlier linear, each a factor of the channels of a later input: only products with other things and sums
    over tokens lie between, so what divides the row divides its channels.

    With grouped-query attention a run of rows, one KV head, makes several runs of channels, its query heads.
    """

    linear: str
    first_row: int
    run: int
    """Consecutive rows that stay together."""
    repeats: int
    """Runs of channels that one run of rows makes."""


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read the same input, and what makes it where scales can fold into that."""

    linears: tuple[LinearShape, ...]
    norm: str | None
    """Module name of the RMSNorm right before the linears; None where something nonlinear lies between."""
    source: RowSource | None = None
    """The rows that make an input without a norm; None where a factor would not pass."""

    @property
    def site(self) -> str:
        """The name of the shared input: the first linear that reads it."""
        return self.linears[0].name

    @property
    def width(self) -> int:
        return self.linears[0].cols


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of the model that is in memory at one time."""

    name: str
    """Module name, e.g. `model.language_model.layers.3`."""
    groups: tuple[InputGroup, ...]
    attention_width: int = 0
    """Channels of all heads' queries; 0 in a block without attention."""


def text_block(config: ModelConfig, index: int) -> Block:
    """The groups of text layer `index`, in the order in which the layer computes them."""
    base = f"{TEXT}.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return Block(
        base,
        (
            InputGroup(
                (
                    LinearShape(f"{base}.self_attn.q_proj", heads, hidden, True),
                    LinearShape(f"{base}.self_attn.k_proj", kv, hidden, True),
                    LinearShape(f"{base}.self_attn.v_proj", kv, hidden, True),
                ),
                f"{base}.input_layernorm",
            ),
            InputGroup(
                (LinearShape(f"{base}.self_attn.o_proj", hidden, heads, False),),
                None,
                RowSource(f"{base}.self_attn.v_proj", 0, config.head_dim, config.heads // config.kv_heads),
            ),
            InputGroup(
                (LinearShape(f"{base}.mlp.gate_up_proj", 2 * inner, hidden, False),),
                f"{base}.post_attention_layernorm",
            ),
            InputGroup(
                (LinearShape(f"{base}.mlp.down_proj", hidden, inner, False),),
                None,
                RowSource(f"{base}.mlp.gate_up_proj", inner, inner, 1),  # gate first, then up
            ),
        ),
        heads,
    )


def vision_block(config: ModelConfig, index: int) -> Block:
    """The groups of vision block `index`."""
    base = f"{VISION}.blocks.{index}"
    width, inner = config.vision_hidden, config.vision_out
    return Block(
        base,
        (
            InputGroup((LinearShape(f"{base}.attn.qkv", 3 * width, width, False),), f"{base}.norm1"),
            InputGroup(
                (LinearShape(f"{base}.attn.proj", width, width, False),),
                None,
                RowSource(f"{base}.attn.qkv", 2 * width, width, 1),
            ),
            InputGroup(
                (
                    LinearShape(f"{base}.mlp.gate_proj", inner, width, False),
                    LinearShape(f"{base}.mlp.up_proj", inner, width, False),
                ),
                f"{base}.norm2",
            ),
            InputGroup(
                (LinearShape(f"{base}.mlp.down_proj", width, inner, False),),
                None,
                RowSource(f"{base}.mlp.up_proj", 0, inner, 1),
            ),
        ),
        width,
    )


def merger_block(config: ModelConfig) -> Block:
    """The vision tower's merger; a GELU lies between its LayerNorm and gate/up, so nothing folds."""
    base = f"{VISION}.merger"
    out, inner = config.vision_out, config.vision_intermediate
    return Block(
        base,
        (
            InputGroup((LinearShape(f"{base}.proj", out, out, False),), None),
            InputGroup(
                (
                    LinearShape(f"{base}.gate_proj", inner, out, False),
                    LinearShape(f"{base}.up_proj", inner, out, False),
                ),
                None,
            ),
            InputGroup(
                (LinearShape(f"{base}.down_proj", out, inner, False),),
                None,
                RowSource(f"{base}.up_proj", 0, inner, 1),
            ),
        ),
    )


def head_block(config: ModelConfig) -> Block:
    """`lm_head`; its norm feeds nothing else, but it stays a linear of its own."""
    return Block(LM_HEAD, (InputGroup((LinearShape(LM_HEAD, config.vocab_size, config.hidden_size, False),), None),))


def vision_blocks(config: ModelConfig) -> tuple[Block, ...]:
    return (*(vision_block(config, i) for i in range(config.vision_depth)), merger_block(config))


def text_blocks(config: ModelConfig) -> tuple[Block, ...]:
    return tuple(text_block(config, i) for i in range(config.layers))


def all_blocks(config: ModelConfig) -> tuple[Block, ...]:
    """Every block in the order of the forward pass: vision tower, text layers, lm_head."""
    return (*vision_blocks(config), *text_blocks(config), head_block(config))


def rms_norms(config: ModelConfig) -> Iterator[str]:
    """Module names of every RMSNorm, text and vision, sorted as the model runs them."""
    for i in range(config.vision_depth):
        yield f"{VISION}.blocks.{i}.norm1"
        yield f"{VISION}.blocks.{i}.norm2"
    yield f"{VISION}.post_conv_layernorm"
    yield f"{VISION}.post_layernorm"
    for i in range(config.layers):
        for norm in ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"):
            yield f"{TEXT}.layers.{i}.{norm}"
    yield f"{TEXT}.norm"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the float checkpoint with its shape, in model order."""
    shapes: dict[str, tuple[int, ...]] = {}
    width, out, patch = config.vision_hidden, config.vision_out, config.patch_size
    positions = (config.image_size // patch) ** 2
    kernel = (width, config.in_channels, config.temporal_patch_size, patch, patch)
    shapes[f"{VISION}.patch_embed.proj.weight"] = kernel
    shapes[f"{VISION}.patch_embed.proj.bias"] = (width,)
    shapes[f"{VISION}.embeddings.position_embedding.weight"] = (positions, width)
    shapes[f"{VISION}.downsample.weight"] = (out, width, config.merge_size, config.merge_size)
    shapes[f"{VISION}.downsample.bias"] = (out,)
    shapes[f"{VISION}.merger.post_projection_norm.weight"] = (out,)
    shapes[f"{VISION}.merger.post_projection_norm.bias"] = (out,)
    shapes[f"{TEXT}.embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
    for norm in rms_norms(config):
        shapes[f"{norm}.weight"] = (width if norm.startswith(VISION) else config.hidden_size,)
    for block in all_blocks(config):
        for group in block.groups:
            for linear in group.linears:
                shapes[f"{linear.name}.weight"] = (linear.rows, linear.cols)
                if linear.has_bias:
                    shapes[f"{linear.name}.bias"] = (linear.rows,)
    return shapes


def part_of(name: str) -> Part:
    """The part of the model that a tensor belongs to, in float and quantized checkpoints alike."""
    if name.startswith(VISION):
        return Part.VISION
    if name.startswith((LM_HEAD, f"{TEXT}.embed_tokens")):
        return Part.EMBEDDINGS
    if ".mlp.down_proj." in name:
        return Part.DOWN_PROJ
    if ".self_attn." in name or ".mlp." in name:
        return Part.TEXT_LINEARS
    return Part.NORMS
