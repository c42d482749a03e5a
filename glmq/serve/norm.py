"""RMSNorm with the bias that the Ascend formats store for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.layernorm import RMSNorm

from glmq.serve.config import GlmqConfig


class BiasedRMSNorm(RMSNorm):
    """vLLM's RMSNorm, which adds a bias where the model is one of glmq's; elsewhere it is vLLM's own.

    The bias is float32 [width], zero until one is loaded; the sum is rounded to the run dtype once.
    """

    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, *args: object, **kwargs: object) -> None:
        super().__init__(hidden_size, *args, **kwargs)
        config = get_current_vllm_config_or_none()
        is_ours = config is not None and isinstance(config.quant_config, GlmqConfig)
        bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32), requires_grad=False) if is_ours else None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x, or of x + residual, and then that sum too; as vLLM's."""
        found: Tensor | tuple[Tensor, Tensor] = super().forward(x, residual)
        if self.bias is None:
            return found
        if isinstance(found, tuple):
            return self._add(found[0], self.bias), found[1]
        return self._add(found, self.bias)

    @staticmethod
    def _add(y: Tensor, bias: Tensor) -> Tensor:
        return (y + bias).to(y.dtype)
