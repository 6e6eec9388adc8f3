"""A rank's share of a checkpoint as a private copy in host memory, so that training may go on while it is written."""

from __future__ import annotations

import torch


class Snapshot:
    """Copies tensors to the host, into buffers kept from one save to the next (page-locked when they come from a GPU: several times faster)."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor], given: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Private host copies of `tensors`; those named in `given` are the caller's gift and are not copied again.

        The result is overwritten by the next `take`.
        """
        taken: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if name in given and tensor.device.type == "cpu":
                taken[name] = tensor
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            taken[name] = buffer
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return taken
