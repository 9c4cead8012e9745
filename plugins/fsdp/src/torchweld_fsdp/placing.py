"""Give every tensor of a module its values: real, on the device, contiguous, and rank 0's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchweld.interfaces import Env
from torchweld_fsdp.deferred import in_place_of

ValueOf = Callable[[Tensor], Tensor]
"""From a tensor on the meta device to the values it is to have; see ``deferred``."""


class Placer:
    """Settles the tensors of one model, some at a time, each once.

    One unit after the other is settled and then sharded, so that a process never holds more than
    its shards and one unit.

    Attributes:
        restrided: how many tensors had a memory format that FSDP2 cannot keep.
    """

    def __init__(
        self, model: nn.Module, env: Env, *, dtype: torch.dtype | None, value_of: ValueOf
    ) -> None:
        self._env, self._dtype, self._value_of = env, dtype, value_of
        self._settled: set[int] = set()
        self.restrided = 0
        # A tied weight lies in several modules and must stay one object.
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._places[id(tensor)].append((module, name))

    @torch.no_grad()
    def settle(self, tensors: Iterable[Tensor]) -> None:
        """Settle those that are not settled yet; every rank must call it alike."""
        for tensor in list(tensors):
            if id(tensor) not in self._settled:
                new = self._on_device(tensor)
                if self._env.world_size > 1:
                    dist.broadcast(new, src=0, group=self._env.group)
                self._replace(tensor, new)

    def _on_device(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        if not tensor.is_meta:
            self.restrided += not tensor.is_contiguous()
            return tensor.detach().to(self._env.device, dtype).contiguous()
        if self._env.rank == 0:
            return self._value_of(tensor).to(self._env.device, dtype).contiguous()
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=self._env.device)

    def _replace(self, tensor: Tensor, new: Tensor) -> None:
        if tensor.is_meta:
            made = in_place_of(tensor, new)
            for module, name in self._places[id(tensor)]:
                setattr(module, name, made)  # an LSTM notes its parameters elsewhere, too
            tensor = made
        else:
            tensor.data = new
        self._settled.add(id(tensor))
