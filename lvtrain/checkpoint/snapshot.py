"""A private copy of a rank's tensors in host memory, so that training can continue while they are written."""

from __future__ import annotations

import torch


class Snapshot:
    """Copies tensors to the host, into buffers that are reused by the next save.

    Buffers for a GPU's tensors are page-locked, which makes the copy several times faster.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor], given: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Private host copies of `tensors`. The next `take` overwrites them.

        Those named in `given` are private copies already, and are not copied again.
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
