"""Any checkpoint of GLM-4.1V, float or quantized, as a streamed model whose int8 linears compute as the NPU does.

The model is the float one of `glmq.model.streamed`; linears that are stored as integers are replaced by `Int8Linear`,
and a norm with a stored bias adds it. Everything else is computed in float32, and results are not rounded to the
engine's half precision, so that numbers of float16 and bfloat16 checkpoints compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glmq.checkpoint.linears import decode_linear, integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import WrongFolderError
from glmq.model.config import ModelConfig
from glmq.model.streamed import StreamedModel
from glmq.numerics.int8_linear import run_linear
from glmq.records import QuantizedLinear


class Int8Linear(nn.Module):
    """A linear of integers; its tensors are read when it is placed and forgotten when it is dropped.

    Args:
        name: of the linear in the checkpoint.
        source: the checkpoint.
    """

    def __init__(self, name: str, source: Checkpoint) -> None:
        super().__init__()
        self.name = name
        self._source = source
        self._linear: QuantizedLinear | None = None

    @property
    def linear(self) -> QuantizedLinear:
        """The placed tensors."""
        assert self._linear is not None, f"{self.name} is not placed"
        return self._linear

    def place(self) -> None:
        """Read the tensors. Raises CheckpointError if they contradict each other."""
        self._linear = decode_linear(self.name, self._source)

    def drop(self) -> None:
        """Forget the tensors."""
        self._linear = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the dtype of `x`; float32 inside."""
        y = run_linear(x.reshape(-1, x.shape[-1]).float(), self.linear)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def open_model(source: Checkpoint, config: ModelConfig) -> StreamedModel:
    """The streamed float32 CPU model of a checkpoint, float or quantized; place its parts with this module's `placed`.

    Raises:
        ModelError: transformers cannot build the model from the configuration.
        CheckpointError: compressed weights, or an int8 tensor where the model has no linear.
    """
    model = StreamedModel(source, config, device=torch.device("cpu"), dtype=torch.float32)
    _check_names(source, config)
    for name in integer_linears(source):
        parent, _, leaf = name.rpartition(".")
        setattr(model.module(parent), leaf, Int8Linear(name, source))
    for name in config.family.rms_norms(config):
        if f"{name}.bias" in source:
            norm = model.module(name)
            width = source[f"{name}.bias"].shape
            norm.register_parameter("bias", nn.Parameter(torch.empty(width, device="meta"), requires_grad=False))
            norm.register_forward_hook(_add_bias)
    return model


@contextmanager
def placed(model: StreamedModel, *names: str) -> Iterator[None]:
    """Hold the named modules in memory, integers included, while the context lasts.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not finite, or contradicts others of its linear.
    """
    linears = [part for name in names for part in model.module(name).modules() if isinstance(part, Int8Linear)]
    with model.placed(*names):
        try:
            for linear in linears:
                linear.place()
            yield
        finally:
            for linear in linears:
                linear.drop()


def _check_names(source: Checkpoint, config: ModelConfig) -> None:
    known = {linear.name for group in config.family.groups(config) for linear in group.linears}
    for name in integer_linears(source):
        if name not in known:
            raise WrongFolderError(
                f"{source.directory}: {name}.weight is int8, but {name} is no linear of the model; "
                "is this a compressed or sharded checkpoint? Run `glmq compress --decompress` first"
            )


def _add_bias(norm: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bias = norm.bias
    assert isinstance(bias, Tensor)
    return output + bias
