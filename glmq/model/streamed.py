"""The model one block at a time: built on meta, then a block is placed, run over all samples, and dropped.

The model class of transformers is used as it is. Everything before the first block of a tower is opaque: a hook on that
block captures its call, and the same call is replayed on the block after it. So one path serves transformers 4.53 to 5.x.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, ModelError, SideFileError
from glmq.machine import is_out_of_memory
from glmq.model.cache import PromptCache, TokenCache
from glmq.model.config import ModelConfig
from glmq.model.cpu_modules import CPU, keep_on_cpu
from glmq.model.inputs import ModelInputs
from glmq.model.lean import ALONE, lean_transformers
from glmq.model.vision_tower import quicken_vision
from glmq.progress import Stopwatch

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # of a text layer's argument; it changed between versions

OWN_WEIGHTS: Final[Mapping[str, Tensor]] = {}


@dataclass(slots=True)
class BlockCall:
    """The call of one block: its hidden states, replaced as blocks are replayed, and everything else it is given."""

    hidden: Tensor
    """Vision: [patches, width]; text: [1, tokens, width]."""
    kwargs: Mapping[str, object]

    @property
    def tokens(self) -> int:
        """Tokens, or patches, that go through the block."""
        return self.hidden.numel() // self.hidden.shape[-1]


class _CapturedError(Exception):
    """Ends a forward pass at the block whose call was to be captured."""


class _Inject(nn.Module):
    """Replaces the vision tower's stem and all its blocks: returns the output that the last block had, computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *_: object, **__: object) -> Tensor:
        assert self.hidden is not None
        return self.hidden


class _EmbeddingRows(nn.Module):
    """An embedding with only some rows of its table.

    Args:
        ids: int64 [rows], ascending: the tokens; on the CPU, as the 300I Duo does not search.
        rows: [rows, width]: their embeddings.
    """

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self._ids, self._rows = ids, rows

    def forward(self, ids: Tensor) -> Tensor:
        return self._rows[torch.searchsorted(self._ids, ids.cpu()).to(self._rows.device)]


class StreamedModel:
    """A model of transformers whose parameters lie on meta, without memory, until `placed` reads those of some modules.

    Args:
        source: the float checkpoint; tensors are read by range and cast to `dtype`.
        config: its configuration.
        device: of placed parameters.
        dtype: of placed parameters and of the hidden states.

    Raises:
        ModelError: transformers cannot build the model from the configuration.
    """

    def __init__(self, source: Checkpoint, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.config, self.device, self.dtype = source, config, device, dtype
        self._text, self._vision, self._lm_head = config.family.text, config.family.vision, config.family.lm_head
        self.model = _build_on_meta(config, dtype)
        self._on_cpu = config.family.cpu_modules if device.type != "cpu" else ()
        for name in self._on_cpu:
            keep_on_cpu(self.module(name), device)
        for owner_name, owner in self.model.named_modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                setattr(owner, name, buffer.to(self._device_of(owner_name)))
        self._inject = _Inject()
        parameters = inspect.signature(type(self.model.get_submodule("model")).forward).parameters
        self._wants_token_types = "mm_token_type_ids" in parameters
        layer = inspect.signature(self.module(f"{self._text}.layers.0").forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in layer)

    def module(self, name: str) -> nn.Module:
        """The module of that name, placed or not."""
        return self.model.get_submodule(name)

    @contextmanager
    def placed(self, *names: str) -> Iterator[None]:
        """Hold the named modules' parameters in memory while the context lasts.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or holds NaN or infinity.
        """
        try:
            for name in names:
                self._place(name)
            yield
        finally:
            for name in names:
                _drop(self.module(name))

    @contextmanager
    def placed_in_time(self, clock: Stopwatch, *names: str) -> Iterator[None]:
        """As `placed`; the clock gets the reading as stage `read`."""
        source, prefixes = self.source, tuple(f"{name}." for name in names)
        with ExitStack() as stack:
            with clock.stage("read"):
                stack.enter_context(self.placed(*names))
            clock.count("read", nbytes=sum(source.nbytes(name) for name in source if name.startswith(prefixes)))
            yield

    @contextmanager
    def embedding_rows(self, ids: Tensor) -> Iterator[None]:
        """Hold the embedding rows of these tokens, and no others, while the context lasts."""
        text = self.module(self._text)
        table = text.embed_tokens
        name = f"{self._text}.embed_tokens.weight"
        unique = ids.cpu().unique()
        if int(unique[-1]) >= self.source.info(name).shape[0]:
            raise SideFileError(
                f"the tokenizer gives token {int(unique[-1])}, but {name} has {self.source.info(name).shape[0]} rows; "
                "take tokenizer and weights from the same release"
            )
        rows = torch.cat([self.source.read_rows(name, i, i + 1) for i in unique.tolist()])
        rows = self.source.check_finite(name, rows).to(device=self.device, dtype=self.dtype)
        text.embed_tokens = _EmbeddingRows(unique, rows)
        try:
            yield
        finally:
            text.embed_tokens = table

    def vision_call(self, inputs: ModelInputs) -> BlockCall:
        """The call of the first vision block; needs the vision stem placed."""
        return self._capture(
            self.module(f"{self._vision}.blocks.0"), self.module(self._vision), self._pixels(inputs), inputs.grid
        )

    def text_call(self, inputs: ModelInputs, vision: BlockCall | None) -> BlockCall:
        """The call of the first text layer; needs its embedding rows and, with an image, the vision tail.

        Args:
            vision: the call of the image's vision blocks, its hidden states being the last block's output.
        """
        visual = self.module(self._vision)
        stem = (name.rpartition(".")[2] for name in self.config.family.vision_stem)
        own = {name: getattr(visual, name) for name in (*stem, "blocks")}
        try:
            for name in own:
                setattr(visual, name, nn.ModuleList([self._inject]) if name == "blocks" else self._inject)
            self._inject.hidden = None if vision is None else vision.hidden
            return self._capture(self.module(f"{self._text}.layers.0"), self.model, **self.arguments(inputs))
        finally:
            for name, module in own.items():
                setattr(visual, name, module)
            self._inject.hidden = None

    def positioned_call(self, inputs: ModelInputs, vision: BlockCall | None) -> tuple[BlockCall, Tensor]:
        """As `text_call`, with the rotary positions of the tokens: int64 [3, tokens], for time, height and width."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

        handle = self.module(f"{self._text}.rotary_emb").register_forward_pre_hook(hook, with_kwargs=True)
        try:
            call = self.text_call(inputs, vision)
        finally:
            handle.remove()
        return call, seen[0][:, 0]

    def prompt_call(self, inputs: ModelInputs, vision: BlockCall | None) -> tuple[BlockCall, int]:
        """As `text_call`, with the rotary position of the token that comes after `inputs`."""
        call, positions = self.positioned_call(inputs, vision)
        return call, int(positions.max()) + 1  # an image takes fewer of them than it has tokens

    @torch.no_grad()
    def text_call_at(self, hidden: Tensor, positions: Tensor) -> BlockCall:
        """The call that `positioned_call` gave, from its hidden states, [1, tokens, width], and the positions alone."""
        hidden, positions = hidden.to(self.device, self.dtype), positions.to(self.device)
        rotary = self.module(f"{self._text}.rotary_emb")(hidden, position_ids=positions[:, None])
        return BlockCall(hidden, {"position_embeddings": rotary, "attention_mask": None})

    @torch.no_grad()
    def token_call(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> BlockCall:
        """The call of the first text layer for one new token of each of S sequences.

        Args:
            tokens: int64 [S].
            positions: int64 [S]: rotary positions.
            visible: bool [S, T]: which of the T cached places each sequence attends to, its new token's included.
        """
        tokens, positions, visible = (x.to(self.device) for x in (tokens, positions, visible))
        with self.embedding_rows(tokens):
            hidden = self.module(f"{self._text}.embed_tokens")(tokens[:, None])  # [S, 1, width]
        rotary = self.module(f"{self._text}.rotary_emb")(hidden, position_ids=positions[None, :, None].expand(3, -1, 1))
        return BlockCall(hidden, {"position_embeddings": rotary, "attention_mask": visible[:, None, None, :]})

    def cached(self, call: BlockCall, cache: PromptCache | TokenCache) -> BlockCall:
        """The same call of a text layer with keys and values kept in `cache`."""
        return BlockCall(call.hidden, {**call.kwargs, self._cache_name: cache})

    @torch.no_grad()
    def replay(self, name: str, call: BlockCall, weights: Mapping[str, Tensor] = OWN_WEIGHTS) -> Tensor:
        """The output of block `name`, which must be placed, for that call, with these weights in place of its own.

        Args:
            weights: by name within the block, e.g. `mlp.gate_up_proj.weight`.
        """
        module, arguments = self.module(name), dict(call.kwargs)
        if weights:
            output = functional_call(module, dict(weights), (call.hidden,), arguments)
        else:
            output = module(call.hidden, **arguments)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def input_of(self, linear: str, name: str, call: BlockCall, weights: Mapping[str, Tensor]) -> Tensor:
        """What a linear of the block gets in that replay, which ends there: [tokens, width]."""
        found = self._capture(self.module(linear), self.replay, name, call, weights)
        return found.hidden.reshape(-1, found.hidden.shape[-1])

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, vocabulary] from the last layer's [1, tokens, width]; needs the norm and lm_head placed."""
        normed = self.module(f"{self._text}.norm")(hidden)
        return self.module(self._lm_head)(normed)[0].float()  # type: ignore[no-any-return]

    def arguments(self, inputs: ModelInputs) -> dict[str, object]:
        """The keyword arguments that the forward of transformers' model takes for these inputs."""
        ids = inputs.ids.to(self.device)
        arguments: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self._wants_token_types:
            arguments["mm_token_type_ids"] = (ids == inputs.image_token_id).to(torch.int32)
        if inputs.grid is not None:
            arguments["pixel_values"] = self._pixels(inputs)
            arguments["image_grid_thw"] = inputs.grid.to(self.device)
        return arguments

    def _pixels(self, inputs: ModelInputs) -> Tensor:
        assert inputs.pixel_values is not None
        return inputs.pixel_values.to(device=self.device, dtype=self.dtype)

    def _device_of(self, module: str) -> torch.device:
        return CPU if module in self._on_cpu else self.device

    def _place(self, name: str) -> None:
        module = self.module(name)
        tensors = {}
        for key, parameter in module.named_parameters():
            full = f"{name}.{key}"
            tensor = self.source.read_finite(full)
            if tuple(tensor.shape) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.source.file_of(full).name}: tensor {full!r} has shape {tuple(tensor.shape)}, "
                    f"config.json asks for {tuple(parameter.shape)}; take both from the same release"
                )
            tensors[key] = tensor.to(device=self._device_of(name), dtype=self.dtype)
        module.load_state_dict(tensors, strict=False, assign=True)  # strict would ask for buffers that are not stored
        module.requires_grad_(False)

    @torch.no_grad()
    def _capture(self, block: nn.Module, run: Callable[..., object], *args: object, **kwargs: object) -> BlockCall:
        caught: list[BlockCall] = []

        def hook(_: nn.Module, call_args: tuple[Tensor, ...], call_kwargs: Mapping[str, object]) -> None:
            rest = dict(call_kwargs)
            hidden = call_args[0] if call_args else rest.pop("hidden_states")
            assert isinstance(hidden, Tensor)
            assert len(call_args) <= 1
            caught.append(BlockCall(hidden, rest))
            raise _CapturedError

        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            run(*args, **kwargs)
        except _CapturedError:
            return caught[0]
        finally:
            handle.remove()
        raise AssertionError("the model ran without reaching its first block")


def _of_the_model(section: JsonObject) -> JsonObject:
    """A deep copy without what has nothing to do with the float model: the classes of a classifier, of which transformers makes
    as many as it is told to; a quantization; dtypes, which transformers would make those of all that other threads compute.
    """
    return {
        key: _of_the_model(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in section.items()
        if key not in ("num_labels", "id2label", "label2id", "quantization_config", "dtype", "torch_dtype")
    }


def _build_on_meta(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    with ALONE:
        return _build_alone(config, dtype)


def _build_alone(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    family = config.family
    with lean_transformers():
        import transformers
        from transformers.utils import logging

        config_class = getattr(transformers, family.config_class)  # imports its module
        model_class = getattr(transformers, family.model_class)

    logging.set_verbosity_error()
    try:
        hf_config = config_class(**_of_the_model(config.nested))
        with _parameters_on_meta(), _NoInit():
            model = model_class._from_config(hf_config, attn_implementation="sdpa")
    except Exception as error:  # whatever a field that glmq does not know trips transformers over
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"config.json: transformers cannot build a {family.title} from it ({reason:.200})") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # meta: no memory; image features are cast to this dtype
    quicken_vision(model)
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter of a module that this thread makes inside lies on meta; buffers are computed as ever, since no checkpoint
    holds them."""
    own = threading.get_ident()

    def move(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter:
        if threading.get_ident() != own:
            return parameter  # torch calls the hook in every thread
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation leaves out that a hook may return another parameter, which its documentation says.
    handle = register_module_parameter_registration_hook(cast("Callable[..., None]", move))
    try:
        yield
    finally:
        handle.remove()


class _NoInit(TorchFunctionMode):
    """Initializes nothing: on meta there is nothing to fill, and `normal_` there would import a compiler to find that out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_:
            return args[0]
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _drop(module: nn.Module) -> None:
    """Put the module's parameters (not its buffers) back on meta."""
    for child in module.modules():
        for key, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, key, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
