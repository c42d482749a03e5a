"""What a text layer's rows count for the answer, collected by hooks while the layer is replayed, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from glmq.model.config import ModelConfig
from glmq.model.family import Block, TextLayer
from glmq.model.streamed import StreamedModel
from glmq.numerics.sensitivity import Heads, LayerOutputs, LayerWeights, SensitivityAccumulator
from glmq.progress import Stopwatch
from glmq.ranks import Ranks


class LayerWatch:
    """Collects the row sensitivities of one text layer, sample by sample; of a block of another kind, nothing.

    Every rank calls `take_turn` equally often, after each sample of its own and where it has none and another rank has one,
    because each call exchanges tensors between all ranks.

    Args:
        block: the layer.
        config: its sizes.
        ranks: the processes that share the samples.
        clock: gets the time as stage `statistics`.
    """

    def __init__(self, block: Block, config: ModelConfig, ranks: Ranks, clock: Stopwatch) -> None:
        self._block, self._layer, self._ranks, self._clock = block, block.layer, ranks, clock
        self._sums = SensitivityAccumulator(Heads(config.heads, config.kv_heads))
        self._seen: dict[str, Tensor] = {}
        self._observed: list[Tensor] = []

    def hooked(self, model: StreamedModel) -> AbstractContextManager[None]:
        """Observe the layer in every forward pass inside the context."""
        return nullcontext() if self._layer is None else self._hooked(model, self._layer)

    def take_turn(self) -> None:
        """Add what every rank observed since the last turn, in the order of the ranks."""
        if self._layer is None:
            return
        observed, self._observed = self._observed, []
        for theirs in self._ranks.all_gather_tensors(observed):
            if theirs:
                self._sums.accumulate(theirs)

    def finish(self, model: StreamedModel) -> Mapping[str, Tensor]:
        """float32 [rows of all linears that read it] for each input of the layer, by site.

        The layer must be placed. Empty on all ranks but the first, and for a block of another kind.
        """
        layer = self._layer
        if layer is None or not self._ranks.place.is_first:
            return {}

        def weight(name: str) -> Tensor:
            return model.module(name).get_parameter("weight").detach()

        with self._clock.stage("statistics"):
            rows = self._sums.finish(
                LayerWeights(
                    attention_norm=weight(layer.attention_norm),
                    mlp_norm=weight(layer.mlp_norm),
                    output=weight(layer.output),
                    down=weight(layer.down),
                )
            )
        by_linear = {
            layer.query: rows.query,
            layer.key: rows.key,
            layer.value: rows.value,
            layer.output: rows.output,
            layer.gate_up: rows.gate_up,
            layer.down: rows.down,
        }
        return {
            group.site: torch.cat([by_linear[linear.name] for linear in group.linears]) for group in self._block.groups
        }

    @contextmanager
    def _hooked(self, model: StreamedModel, layer: TextLayer) -> Iterator[None]:
        def remember(name: str) -> torch.utils.hooks.RemovableHandle:
            def hook(_: nn.Module, __: object, output: Tensor) -> None:
                self._seen[name] = output

            return model.module(name).register_forward_hook(hook)

        def remember_stream(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[layer.middle_norm] = args[0]

        def observe(_: nn.Module, __: object, output: Tensor) -> None:
            with self._clock.stage("statistics"):
                self._observe(layer, output)

        handles = [remember(name) for name in (layer.query, layer.key, layer.output, layer.gate_up, layer.down)]
        handles.append(model.module(layer.middle_norm).register_forward_pre_hook(remember_stream))
        handles.append(model.module(layer.mlp_norm).register_forward_hook(observe))
        try:
            yield
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def _observe(self, layer: TextLayer, added: Tensor) -> None:
        """Observe a sample whose layer has just computed `added`, [1, T, H], the last thing that joins the stream."""

        def tokens(x: Tensor) -> Tensor:
            return x.detach().reshape(-1, x.shape[-1])

        self._observed = self._sums.observe(
            LayerOutputs(
                query=tokens(self._seen[layer.query]),
                key=tokens(self._seen[layer.key]),
                attention=tokens(self._seen[layer.output]),
                gate_up=tokens(self._seen[layer.gate_up]),
                mlp=tokens(self._seen[layer.down]),
                residual=tokens(self._seen[layer.middle_norm] + added),
            )
        )
        self._seen.clear()
