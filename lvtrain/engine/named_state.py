"""The backbone's whole state by parameter name: the same for every ZeRO stage and number of ranks, bit for bit.

Names: `backbone.param.NAME`, `backbone.buffer.NAME`; for trained parameters also the optimizer's state `backbone.KEY.NAME`
(such as `exp_avg`); and its step count (`backbone.adam_step`), a float32 scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from lvtrain.checkpoint.state import Replicated, State
from lvtrain.engine.zero_state import ZeroState, full_shape
from lvtrain.errors import UserError

PREFIX = "backbone."


class StateReader(Protocol):
    """What a state is read from, such as a checkpoint."""

    def replicated(self, name: str) -> torch.Tensor: ...


def export_state(module: nn.Module, zero: ZeroState, keep: Callable[[int], bool]) -> State:
    """A copy of the state on the host. A collective.

    Args:
        module: under DeepSpeed.
        zero: where its tensors are.
        keep: whether this rank keeps the tensor of this number. The others come back on the meta device.
    """
    state: State = {}

    def add(name: str, whole: torch.Tensor) -> None:
        kept = whole.detach().to("cpu", copy=True) if keep(len(state)) else torch.empty_like(whole, device="meta")
        state[PREFIX + name] = Replicated(kept, given=True)

    for name, parameter in module.named_parameters():
        add(f"param.{name}", zero.weight(parameter))
        if parameter.requires_grad:
            for key in zero.state_names:
                add(f"{key}.{name}", zero.moment(parameter, key))
    for name, buffer in _persistent_buffers(module):
        add(f"buffer.{name}", buffer)
    if zero.step_name:
        add(zero.step_name, torch.tensor(float(zero.step_count())))
    return state


def import_state(module: nn.Module, zero: ZeroState, reader: StateReader) -> None:
    """Loads what `export_state` gave; each rank keeps its part.

    Raises:
        UserError: a tensor is missing, or its shape or dtype differs.
    """
    zero.prepare_state(float(reader.replicated(PREFIX + zero.step_name)) if zero.step_name else 0.0)
    for name, parameter in module.named_parameters():
        shape = full_shape(parameter)
        zero.set_weight(parameter, _checked(reader, f"param.{name}", shape, torch.float32))
        if parameter.requires_grad:
            for key in zero.state_names:
                zero.set_moment(parameter, key, _checked(reader, f"{key}.{name}", shape, torch.float32))
    for name, buffer in _persistent_buffers(module):
        buffer.copy_(_checked(reader, f"buffer.{name}", buffer.shape, buffer.dtype))
    zero.finish_import()


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def _checked(reader: StateReader, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    tensor = reader.replicated(PREFIX + name)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise UserError(
            f"the checkpoint's {PREFIX + name} is {tuple(tensor.shape)} {tensor.dtype}, the backbone's {tuple(shape)} {dtype}; "
            "use init_from to take weights only"
        )
    return tensor
