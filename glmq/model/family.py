"""What a family of vision-language models is: how its blocks, linears and norms follow from the sizes in config.json.

Nothing here knows one family from another; `glm4v.py` describes the one that glmq handles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class Area(Enum):
    """The areas of a model that size tables speak of."""

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
        """Channels of the shared input."""
        return self.linears[0].cols


@dataclass(frozen=True, slots=True)
class TextLayer:
    """The modules of a text layer that normalises what attention and MLP give before it adds that to the residual stream."""

    query: str
    """Module name of a linear, like the next five."""
    key: str
    value: str
    output: str
    gate_up: str
    """Gate and up in one, gate first."""
    down: str
    attention_norm: str
    """Behind `output`."""
    middle_norm: str
    """In front of `gate_up`: it reads the residual stream between attention and MLP."""
    mlp_norm: str
    """Behind `down`."""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of the model that is in memory at one time."""

    name: str
    """Module name, e.g. `model.language_model.layers.3`."""
    groups: tuple[InputGroup, ...]
    attention_width: int = 0
    """Channels of all heads' queries; 0 in a block without attention."""
    layer: TextLayer | None = None
    """None in a block of another kind."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a config.json that decide the shape of every tensor."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    vision_hidden: int
    vision_depth: int
    vision_out: int
    vision_intermediate: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_size: int
    in_channels: int


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """The image processor of transformers that a family uses, and the pictures that it takes."""

    class_name: str
    min_pixels: int
    """Of all frames together; smaller pictures are enlarged."""
    max_pixels: int
    """Of all frames together; larger pictures are shrunk."""
    smallest_side: int
    """Pixels."""
    largest_aspect: int
    """Longer side divided by the shorter one."""


@dataclass(frozen=True, slots=True)
class Member:
    """How the files of a released model differ from those of the others; None: not at all."""

    title: str
    processor: str | None = None
    """Class in preprocessor_config.json."""
    image_token_id: int | None = None
    rope_theta: float | None = None
    has_template: bool | None = None
    """Whether it comes with a chat template."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A linear that vLLM-Ascend fuses with others, or splits, and so looks up in the description under other names."""

    module: str
    """Regular expression for the name of the module that holds the linear."""
    linear: str
    """The linear's own last name, e.g. `gate_proj`."""
    asked: tuple[str, ...]
    """The last names that are looked up."""


def renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """`name` with another beginning: theirs -> own, the first that fits; unchanged where none does."""
    for theirs, own in beginnings.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models with a vision tower and a text tower: names as data, blocks as functions of the sizes."""

    title: str
    """As messages call it."""
    model_type: str
    """As config.json calls it."""
    members: str
    """Released models, for messages."""
    relatives: Mapping[str, str]
    """Other values of `model_type` that users confuse with this one, and why each is not it."""
    config_class: str
    """In transformers, like the next."""
    model_class: str
    image_processor: ImageProcessor
    older_classes: Mapping[str, str]
    """Classes of processors that transformers 4.53.0 lacks -> those that do the same to pictures there."""
    released: tuple[Member, ...]
    """The released models, told apart by their files; the first that fits counts."""
    made_from: tuple[str, ...]
    """Released models whose files are like those of another one, so that only a folder's name tells them."""
    text: str
    """Module name of the text tower."""
    vision: str
    """Module name of the vision tower."""
    lm_head: str
    """Module name of the linear that gives the logits."""
    cpu_modules: tuple[str, ...]
    """Those that are computed on the CPU beside any device (cpu_modules.py)."""
    vision_stem: tuple[str, ...]
    """Modules that run before the first vision block."""
    vision_tail: tuple[str, ...]
    """Modules that run after the last vision block."""
    row_parallel: tuple[str, ...]
    """Endings of linears that engines split along their input columns."""
    float_by_default: tuple[str, ...]
    """Patterns of linears that stay float unless they are asked for."""
    wrappers: tuple[str, ...]
    """What modules of trainers that wrap the model put before every name."""
    inner_wrappers: frozenset[str]
    """The same, around modules within the model."""
    foreign_names: Mapping[str, str]
    """How names begin in checkpoints of trainers -> how they begin here; the first that fits holds."""
    engine_prefixes: Mapping[str, str]
    """How names begin in the parts that engines load -> how they begin in the float checkpoint; the first that fits holds."""
    aliases: tuple[Alias, ...]
    """Keys that a description has beside those of its tensors."""
    short_keys: Mapping[str, str]
    """How names of text linears begin -> how SGLang asks for them in a description."""
    vision_block: Callable[[Sizes, int], Block]
    """Vision block `index`."""
    merger_block: Callable[[Sizes], Block]
    """What joins the vision tower to the text tower."""
    text_block: Callable[[Sizes, int], Block]
    """Text layer `index`; its groups in the order in which the layer computes them."""
    head_block: Callable[[Sizes], Block]
    """`lm_head`."""
    rms_norms: Callable[[Sizes], Iterator[str]]
    """Module names of every RMSNorm of both towers, in the order in which the model runs them."""
    other_shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]]
    """The tensors that belong to no linear of a block and to no RMSNorm, with their shapes."""
    area: Callable[[str], Area]
    """The area that a tensor belongs to, by its name in a float or quantized checkpoint."""

    def in_text_layers(self, linear: str) -> bool:
        """Whether a linear is one of a text layer, not of the vision tower, nor lm_head."""
        return self.area(f"{linear}.weight") in (Area.TEXT_LINEARS, Area.DOWN_PROJ)

    def picture_defect(self, width: int, height: int) -> str | None:
        """Why the image processor takes no picture of that many pixels, or None."""
        smallest, aspect = self.image_processor.smallest_side, self.image_processor.largest_aspect
        if min(width, height) >= smallest and max(width, height) <= aspect * min(width, height):
            return None
        return (
            f"has {width} x {height} pixels; the model needs sides of at least {smallest} pixels "
            f"and an aspect ratio of at most {aspect}"
        )

    def vision_blocks(self, sizes: Sizes) -> tuple[Block, ...]:
        """The vision tower's blocks, then its merger."""
        return (*(self.vision_block(sizes, i) for i in range(sizes.vision_depth)), self.merger_block(sizes))

    def text_blocks(self, sizes: Sizes) -> tuple[Block, ...]:
        """The text tower's layers."""
        return tuple(self.text_block(sizes, i) for i in range(sizes.layers))

    def blocks(self, sizes: Sizes) -> tuple[Block, ...]:
        """Every block in the order of the forward pass: vision tower, text layers, lm_head."""
        return (*self.vision_blocks(sizes), *self.text_blocks(sizes), self.head_block(sizes))

    def kind_of(self, block: str) -> str:
        """What kind of block that is, by its name: `vision`, `merger`, `text` or `head`."""
        if block == self.lm_head:
            return "head"
        if block.startswith(f"{self.text}."):
            return "text"
        return "vision" if block.startswith(f"{self.vision}.blocks.") else "merger"

    def groups(self, sizes: Sizes) -> list[InputGroup]:
        """The input groups of all blocks, in the same order."""
        return [group for block in self.blocks(sizes) for group in block.groups]

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Every tensor of the float checkpoint with its shape."""
        shapes = dict(self.other_shapes(sizes))
        for norm in self.rms_norms(sizes):
            shapes[f"{norm}.weight"] = (sizes.vision_hidden if norm.startswith(self.vision) else sizes.hidden_size,)
        for group in self.groups(sizes):
            for linear in group.linears:
                shapes[f"{linear.name}.weight"] = (linear.rows, linear.cols)
                if linear.has_bias:
                    shapes[f"{linear.name}.bias"] = (linear.rows,)
        return shapes

    def vllm_aliases(self, types: Mapping[str, str]) -> dict[str, str]:
        """Keys without a tensor that vLLM-Ascend looks up, each with the type of the tensor it stands for.

        MindIE ignores these keys. They do not belong into a description that lies beside W8A8SC parts.

        Args:
            types: the description's entry of each tensor.
        """
        found: dict[str, str] = {}
        for name, kind in types.items():
            for alias in self.aliases:
                if match := re.fullmatch(rf"({alias.module})\.{alias.linear}\.weight", name):
                    found.update({f"{match[1]}.{asked}.weight": kind for asked in alias.asked})
        return {name: kind for name, kind in found.items() if name not in types}

    def engine_aliases(self, types: Mapping[str, str]) -> dict[str, str]:
        """Keys without a tensor that some engine looks up in an ascendV1 description: vLLM-Ascend's, and SGLang's.

        Args:
            types: the description's entry of each tensor.
        """
        found = self.vllm_aliases(types)
        short = {
            own + name.removeprefix(begins): kind
            for name, kind in {**types, **found}.items()
            for begins, own in self.short_keys.items()
            if name.startswith(begins) and name.endswith("proj.weight")
        }
        return found | {name: kind for name, kind in short.items() if name not in types}

    def checkpoint_name(self, name: str) -> str:
        """What the float checkpoint calls a tensor of an engine's part; other names stay as they are."""
        return renamed(name, self.engine_prefixes)

    def short_name(self, name: str) -> str:
        """A name for tables, without what all names share: `layers.3.mlp.down_proj`, `visual.merger.proj`, `lm_head`."""
        return self.checkpoint_name(name).removeprefix(f"{self.text}.").removeprefix("model.")
