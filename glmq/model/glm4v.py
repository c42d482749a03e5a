"""GLM-4.1V and its like as data: the names of tensors, the blocks and their input groups, what stays float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from glmq.model.family import (
    Alias,
    Area,
    Block,
    Family,
    ImageProcessor,
    InputGroup,
    LinearShape,
    Member,
    RowSource,
    Sizes,
    TextLayer,
)

TEXT: Final = "model.language_model"
VISION: Final = "model.visual"
LM_HEAD: Final = "lm_head"


def text_block(sizes: Sizes, index: int) -> Block:
    """The groups of text layer `index`, in the order in which the layer computes them."""
    base = f"{TEXT}.layers.{index}"
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    heads, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
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
                RowSource(f"{base}.self_attn.v_proj", 0, sizes.head_dim, sizes.heads // sizes.kv_heads),
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
        TextLayer(
            query=f"{base}.self_attn.q_proj",
            key=f"{base}.self_attn.k_proj",
            value=f"{base}.self_attn.v_proj",
            output=f"{base}.self_attn.o_proj",
            gate_up=f"{base}.mlp.gate_up_proj",
            down=f"{base}.mlp.down_proj",
            attention_norm=f"{base}.post_self_attn_layernorm",
            middle_norm=f"{base}.post_attention_layernorm",
            mlp_norm=f"{base}.post_mlp_layernorm",
        ),
    )


def vision_block(sizes: Sizes, index: int) -> Block:
    """The groups of vision block `index`."""
    base = f"{VISION}.blocks.{index}"
    width, inner = sizes.vision_hidden, sizes.vision_out
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


def merger_block(sizes: Sizes) -> Block:
    """The vision tower's merger; a GELU lies between its LayerNorm and gate/up, so nothing folds."""
    base = f"{VISION}.merger"
    out, inner = sizes.vision_out, sizes.vision_intermediate
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


def head_block(sizes: Sizes) -> Block:
    """`lm_head`; its norm feeds nothing else, but it stays a linear of its own."""
    return Block(LM_HEAD, (InputGroup((LinearShape(LM_HEAD, sizes.vocab_size, sizes.hidden_size, False),), None),))


def rms_norms(sizes: Sizes) -> Iterator[str]:
    """Module names of every RMSNorm, text and vision, sorted as the model runs them."""
    for i in range(sizes.vision_depth):
        yield f"{VISION}.blocks.{i}.norm1"
        yield f"{VISION}.blocks.{i}.norm2"
    yield f"{VISION}.post_conv_layernorm"
    yield f"{VISION}.post_layernorm"
    for i in range(sizes.layers):
        for norm in ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"):
            yield f"{TEXT}.layers.{i}.{norm}"
    yield f"{TEXT}.norm"


def other_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The convolutions, the embeddings and the merger's LayerNorm."""
    width, out, patch = sizes.vision_hidden, sizes.vision_out, sizes.patch_size
    positions = (sizes.image_size // patch) ** 2
    return {
        f"{VISION}.patch_embed.proj.weight": (width, sizes.in_channels, sizes.temporal_patch_size, patch, patch),
        f"{VISION}.patch_embed.proj.bias": (width,),
        f"{VISION}.embeddings.position_embedding.weight": (positions, width),
        f"{VISION}.downsample.weight": (out, width, sizes.merge_size, sizes.merge_size),
        f"{VISION}.downsample.bias": (out,),
        f"{VISION}.merger.post_projection_norm.weight": (out,),
        f"{VISION}.merger.post_projection_norm.bias": (out,),
        f"{TEXT}.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size),
    }


def area(name: str) -> Area:
    """The area of the model that a tensor belongs to, in float and quantized checkpoints alike."""
    if name.startswith(VISION):
        return Area.VISION
    if name.startswith((LM_HEAD, f"{TEXT}.embed_tokens")):
        return Area.EMBEDDINGS
    if ".mlp.down_proj." in name:
        return Area.DOWN_PROJ
    if ".self_attn." in name or ".mlp." in name:
        return Area.TEXT_LINEARS
    return Area.NORMS


GLM4V: Final = Family(
    title="GLM-4.1V or GLM-4.6V-Flash",
    model_type="glm4v",
    members="GLM-4.1V-9B, GLM-4.6V-Flash, AutoGLM-Phone-9B, Glyph",
    relatives={
        "glm4v_moe": "GLM-4.5V and GLM-4.6V are mixtures of experts",
        "chatglm": "glm-4v-9b is the older ChatGLM architecture",
        "glm46v": "this is transformers' own class for GLM-4.6V around any text model; GLM-4.6V-Flash is released as glm4v",
        "glm_ocr": "GLM-OCR has another text model",
        "glm4": "GLM-4 has no vision tower",
        "glm4v_text": "this is the text part alone",
    },
    config_class="Glm4vConfig",
    model_class="Glm4vForConditionalGeneration",
    # transformers 4.53 resizes to at most this many pixels for the two frames of a still image, whatever the processor's
    # file says; newer ones read the file. The smaller of both gives the same pixels everywhere.
    image_processor=ImageProcessor(
        "Glm4vImageProcessor",
        min_pixels=112 * 112,
        max_pixels=14 * 14 * 2 * 2 * 2 * 6144,
        smallest_side=28,
        largest_aspect=200,
    ),
    older_classes={
        "Glm46VProcessor": "Glm4vProcessor",
        "Glm46VImageProcessor": "Glm4vImageProcessor",
        "Glm46VImageProcessorFast": "Glm4vImageProcessorFast",
        "Glm46VImageProcessorPil": "Glm4vImageProcessor",
        "Glm4vImageProcessorPil": "Glm4vImageProcessor",
        "Glm46VVideoProcessor": "Glm4vVideoProcessor",
    },
    released=(
        Member("GLM-4.6V-Flash", processor="Glm46VProcessor"),
        Member("GLM-4.6V-Flash", image_token_id=151363),
        Member("Glyph", rope_theta=500000),
        Member("GLM-4.1V-9B-Base", has_template=False),
        Member("GLM-4.1V-9B-Thinking"),
    ),
    made_from=("AutoGLM-Phone-9B", "Glyph", "GLM-4.1V-9B-Base", "GLM-4.1V-9B-Thinking", "GLM-4.6V-Flash"),
    text=TEXT,
    vision=VISION,
    lm_head=LM_HEAD,
    cpu_modules=(f"{VISION}.embeddings", f"{TEXT}.rotary_emb"),
    vision_stem=tuple(f"{VISION}.{part}" for part in ("patch_embed", "post_conv_layernorm", "embeddings")),
    vision_tail=tuple(f"{VISION}.{part}" for part in ("post_layernorm", "downsample", "merger")),
    row_parallel=(".o_proj", ".down_proj", ".attn.proj"),
    float_by_default=(f"{VISION}.*", "*.mlp.down_proj", LM_HEAD),
    wrappers=("base_model.model.", "module.", "pretrained_model.", "model."),
    inner_wrappers=frozenset({"_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."}),
    foreign_names={
        "visual.": "model.visual.",
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "language_model.": "model.language_model.",
        "model.lm_head.": "lm_head.",
        "model.visual.": "model.visual.",
        "model.language_model.": "model.language_model.",
        "model.": "model.language_model.",
    },
    engine_prefixes={
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "language_model.": "model.language_model.",
        "visual.": "model.visual.",
    },
    # vLLM fuses gate and up and splits q, k, v in the vision tower; in the text layers it splits gate and up.
    aliases=(
        Alias(r"model\.visual\.(?:blocks\.[0-9]+\.mlp|merger)", "gate_proj", ("gate_up_proj",)),
        Alias(r"model\.visual\.blocks\.[0-9]+\.attn", "qkv", ("q_proj", "k_proj", "v_proj")),
        Alias(r"model\.language_model\.layers\.[0-9]+\.mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ),
    short_keys={f"{TEXT}.layers.": "model.layers."},
    vision_block=vision_block,
    merger_block=merger_block,
    text_block=text_block,
    head_block=head_block,
    rms_norms=rms_norms,
    other_shapes=other_shapes,
    area=area,
)
"""The family of the dense GLM-4.xV models."""
