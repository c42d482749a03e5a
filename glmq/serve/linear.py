"""How vLLM loads and computes one quantized linear, or several that it packs into one, split over ranks or not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from glmq.checkpoint.ascend import decode_deq_scale, unpack_int4
from glmq.errors import CheckpointError
from glmq.serve.arithmetic import dynamic_linear, static_linear, weight_only_linear
from glmq.spec import Activation, QuantType, assert_never


@register_weight_loader_v2_supported_method
class GlmqLinearMethod(LinearMethodBase):
    """Loads the tensors of one type and computes with them as the NPU does.

    Args:
        name: of the linear in vLLM, for messages.
        quant_type: of all its parts.
        group_size: input columns per second-stage scale.
        deq_dtype: how deq_scale is stored: int64 (float16 models) or float32 (bfloat16 models).
    """

    def __init__(self, name: str, quant_type: QuantType, *, group_size: int | None, deq_dtype: torch.dtype) -> None:
        self._name = name
        self._type = quant_type
        self._group_size = group_size
        self._deq_dtype = deq_dtype

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *_: Any,
        weight_loader: Callable[..., None],
        **__: Any,
    ) -> None:
        """Register the parameters that this rank's part of the checkpoint fills; scales are NaN or 0 until then.

        Raises:
            CheckpointError: a rank's columns do not divide into groups.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        layer.register_parameter("weight", self._weight_room(rows, columns, weight_loader))
        for suffix in self._type.spec.suffixes:
            match suffix:
                case "input_scale" | "input_offset":
                    scalars = torch.full((len(output_partition_sizes),), torch.nan, dtype=torch.float32)
                    room = PerTensorScaleParameter(data=scalars, weight_loader=weight_loader)
                case "quant_bias":
                    room = _per_row(torch.zeros(rows, dtype=torch.int32), weight_loader)
                case "deq_scale":
                    room = _per_row(torch.zeros(rows, dtype=self._deq_dtype), self._same_dtype(weight_loader))
                case "weight_scale" | "weight_offset":
                    room = _per_row(torch.full((rows, 1), torch.nan, dtype=torch.float32), weight_loader)
                case _:
                    dtype = torch.int64 if "offset" in suffix else torch.float32
                    room = self._grouped_room(rows, columns, dtype, weight_loader)
            layer.register_parameter(suffix, room)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Bring the loaded tensors into the form that is computed with.

        Raises:
            CheckpointError: scales that are not finite and positive, or were not in the checkpoint.
        """
        match self._type.spec.activation:
            case Activation.STATIC:
                deq_scale = decode_deq_scale(f"{self._name}.deq_scale", layer.deq_scale.data)
                layer.deq_scale = _plain(self._checked("deq_scale", deq_scale))
                quant_bias = layer.quant_bias.data
                # The sum over all ranks has it once.
                is_later = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
                layer.quant_bias = _plain(torch.zeros_like(quant_bias) if is_later else quant_bias)
                layer.input_parts = self._input_parts(layer)
                if "weight_scale" in self._type.spec.suffixes:
                    del layer.weight_scale  # deq_scale has it
            case Activation.PER_TOKEN | Activation.NONE:
                layer.weight_scale = _plain(self._checked("weight_scale", layer.weight_scale.data))
            case other:
                assert_never(other)
        self._drop_offsets(layer)
        if self._type.spec.two_stage:
            second = self._checked("weight_scale_second", layer.weight_scale_second.data)
            layer.weight_scale_second = _plain(second)
            layer.weight = _plain(unpack_int4(layer.weight.data))
        else:
            layer.weight = _plain(layer.weight.data)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] in the dtype of x. A static type has the bias in quant_bias already."""
        match self._type.spec.activation:
            case Activation.STATIC:
                parts = [
                    static_linear(x, layer.weight[rows], layer.deq_scale[rows], layer.quant_bias[rows], scale, offset)
                    for rows, scale, offset in layer.input_parts
                ]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            case Activation.PER_TOKEN:
                second = layer.weight_scale_second if self._type.spec.two_stage else None
                y = dynamic_linear(x, layer.weight, layer.weight_scale, second, bias)
            case Activation.NONE:
                y = weight_only_linear(x, layer.weight, layer.weight_scale, bias)
            case other:
                assert_never(other)
        return y

    def _weight_room(self, rows: int, columns: int, loader: Callable[..., None]) -> BasevLLMParameter:
        if not self._type.spec.two_stage:
            data = torch.empty(rows, columns, dtype=torch.int8)
            return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        return PackedvLLMParameter(
            data=torch.empty(rows // 2, columns, dtype=torch.int8),
            input_dim=1,
            output_dim=0,
            packed_dim=0,
            packed_factor=2,
            weight_loader=loader,
        )

    def _grouped_room(
        self, rows: int, columns: int, dtype: torch.dtype, loader: Callable[..., None]
    ) -> BasevLLMParameter:
        if self._group_size is None or columns % self._group_size:
            raise CheckpointError(
                f"{self._name}: {columns} input columns of a rank do not divide into groups of {self._group_size}; "
                "serve it with a smaller tensor-parallel size"
            )
        data = torch.zeros(rows, columns // self._group_size, dtype=dtype)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)

    def _same_dtype(self, loader: Callable[..., None]) -> Callable[..., None]:
        """A loader that refuses a deq_scale of the other kind, which a plain copy would turn into garbage."""

        def load(param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
            if loaded.dtype != param.dtype:
                raise CheckpointError(
                    f"{self._name}.deq_scale: is {loaded.dtype}, wanted {param.dtype} as torch_dtype in config.json says; "
                    "quantize it again"
                )
            loader(param, loaded, *args, **kwargs)

        return load

    def _input_parts(self, layer: LinearBase) -> list[tuple[slice, float, int]]:
        """Runs of output rows whose linears round the input alike: rows, input scale, input offset."""
        scales = self._checked("input_scale", layer.input_scale.data).tolist()
        offsets = layer.input_offset.data.tolist()
        sizes = layer.output_partition_sizes if len(scales) > 1 else [layer.weight.shape[0]]
        parts, start = [], 0
        for (scale, offset), run in groupby(zip(scales, offsets, sizes, strict=True), key=lambda part: part[:2]):
            stop = start + sum(size for _, _, size in run)
            parts.append((slice(start, stop), scale, int(offset)))
            start = stop
        return parts

    def _drop_offsets(self, layer: LinearBase) -> None:
        for suffix in ("weight_offset", "weight_offset_second"):
            if suffix in self._type.spec.suffixes:
                if bool(getattr(layer, suffix).data.any()):
                    raise CheckpointError(
                        f"{self._name}.{suffix}: is missing or not zero; only symmetric weights are served"
                    )
                delattr(layer, suffix)

    def _checked(self, suffix: str, scale: Tensor) -> Tensor:
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{self._name}.{suffix}: is missing or has values that are not finite and positive; run `glmq verify`"
            )
        return scale


def _per_row(data: Tensor, loader: Callable[..., None]) -> BasevLLMParameter:
    return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)


def _plain(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.contiguous(), requires_grad=False)
