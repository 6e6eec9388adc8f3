"""Where DeepSpeed keeps a parameter's weight and optimizer state under each ZeRO stage. Read and written whole, bit for bit.

DeepSpeed's own accessors do not suffice. Its universal checkpoint loses buffers and frozen parameters, and shares one
Adam step between groups. `safe_get_full_optimizer_state` fails on the second group under ZeRO-1/2, and
`safe_set_full_optimizer_state` on odd sizes under ZeRO-3. `tests/test_engine_canary.py` fails when an upgrade changes
what this file relies on.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator


def forget_zero3(module: torch.nn.Module) -> None:
    """Removes `module` from where ZeRO-3 keeps it for as long as the process lives, and with it weights and moments.

    These are a list of modules, and a cache of the method that says which parameters to release.
    """
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The parameter's own shape, also when ZeRO-3 has put an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def create(engine: Any, stage: int, state_names: Sequence[str], step_name: str | None) -> ZeroState:
    """The state of `engine`'s optimizer: tensors `state_names` of every weight, and a `step` if the count has a name."""
    kinds: dict[int, type[ZeroState]] = {0: Unsharded, 1: FlatPartitions, 2: FlatPartitions, 3: ShardedParameters}
    return kinds[stage](engine, state_names, step_name)


class ZeroState(ABC):
    """Common to all stages: the optimizer's state hangs on one or more tensors (`_owners`), each with its own step."""

    def __init__(self, engine: Any, state_names: Sequence[str], step_name: str | None) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.state_names, self.step_name = tuple(state_names), step_name
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.basic_optimizer

    @abstractmethod
    def _owners(self) -> Sequence[torch.Tensor]: ...

    @abstractmethod
    def group_members(self) -> list[list[torch.nn.Parameter]]:
        """The module's parameters of each of the optimizer's groups."""

    @abstractmethod
    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole weight; it may be a view of the live one."""

    @abstractmethod
    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None: ...

    @abstractmethod
    def moment(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor: ...

    @abstractmethod
    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None: ...

    @abstractmethod
    def gradient_norm(self) -> torch.Tensor:
        """Norm of the averaged gradient of all ranks, float32 scalar, the same on every rank. A collective."""

    def finish_import(self) -> None:
        """What a stage must do once the whole state has been set."""

    def optimizer_device(self) -> torch.device:
        """Where the optimizer works: the host under `offload_optimizer`."""
        return self._owners()[0].device

    def step_count(self) -> int:
        steps = {int(state["step"]) for owner in self._owners() if (state := self._inner().state.get(owner))}
        if len(steps) > 1:
            raise RuntimeError(f"the parameter groups' optimizer steps differ: {sorted(steps)}")
        return steps.pop() if steps else 0

    def check_steps(self) -> None:
        """Checks that each owner has its own step tensor. A shared one would advance once for each group."""
        if not self.step_name:
            return
        steps = [id(state["step"]) for owner in self._owners() if (state := self._inner().state.get(owner))]
        if len(set(steps)) != len(steps):
            raise RuntimeError("the optimizer's step tensor is shared between parameter groups")

    def prepare_state(self, step: float) -> None:
        """Makes the state as the optimizer would: zeros, and one step tensor for each owner."""
        for owner in self._owners():
            state = {key: torch.zeros_like(owner, requires_grad=False) for key in self.state_names}
            if self.step_name:
                state["step"] = torch.tensor(step, dtype=torch.float32, device=owner.device)
            self._inner().state[owner] = state


class Unsharded(ZeroState):
    """Stage 0: the plain optimizer on the module's own parameters."""

    def _owners(self) -> Sequence[torch.Tensor]:
        return [parameter for group in self._inner().param_groups for parameter in group["params"]]

    def group_members(self) -> list[list[torch.nn.Parameter]]:
        return [group["params"] for group in self._inner().param_groups]

    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        parameter.data.copy_(whole)

    def moment(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        state = self._inner().state.get(parameter)
        return state[key] if state else torch.zeros_like(parameter)

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        self._inner().state[parameter][key].copy_(whole)

    def gradient_norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self._owners() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


class FlatPartitions(ZeroState):
    """Stages 1 and 2: each group is one flat vector, each rank owns an equal slice of it; weights are whole on every rank."""

    def _owners(self) -> Sequence[torch.Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def group_members(self) -> list[list[torch.nn.Parameter]]:
        return self.optimizer.bit16_groups

    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        parameter.data.copy_(whole)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.hp_fragment.data.copy_(_slice(whole, mapping.lp_fragment_address))

    def _fragment(self, parameter: torch.nn.Parameter, key: str) -> tuple[torch.Tensor, Any] | None:
        """This rank's piece of the parameter's moment, and where in the parameter it lies."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        state = self._inner().state.get(self._owners()[mapping.param_group_index])
        if not state:
            return None
        address = mapping.hp_fragment_address
        return state[key].narrow(0, address.start, address.numel), mapping.lp_fragment_address

    def moment(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        piece = self._fragment(parameter, key)
        if piece is not None:
            whole.narrow(0, piece[1].start, piece[1].numel).copy_(piece[0])
        if self.size > 1:
            # summed as integers, so that every bit comes from one rank; as floats, -0.0 would become 0.0
            dist.all_reduce(whole.view(torch.int32))
        return whole.view(parameter.shape)

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        piece = self._fragment(parameter, key)
        if piece is not None:
            piece[0].copy_(_slice(whole, piece[1]))

    def finish_import(self) -> None:
        # DeepSpeed links fragments to the state once, at its first step; the state is new tensors now
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def gradient_norm(self) -> torch.Tensor:
        if self.optimizer.cpu_offload:
            return self.optimizer.scaled_global_norm()
        # DeepSpeed's own makes the host wait for the device once for each group
        pieces = [piece for group in self.optimizer.averaged_gradients.values() for piece in group]
        total = torch.stack(torch._foreach_norm(pieces, 2, torch.float32)).square().sum()
        if self.size > 1:
            dist.all_reduce(total)
        return total.sqrt()


class ShardedParameters(ZeroState):
    """Stage 3: every parameter is cut into equal pieces, one a rank, the last one padded; moments are cut alike."""

    def _owners(self) -> Sequence[torch.Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def group_members(self) -> list[list[torch.nn.Parameter]]:
        members: list[list[torch.nn.Parameter]] = [[] for _ in self._inner().param_groups]
        for sub_group, parameters in enumerate(self.optimizer.fp16_groups):
            members[self.optimizer.sub_group_to_group_id[sub_group]] += parameters
        return members

    def _gather(self, parameter: Any, piece: torch.Tensor) -> torch.Tensor:
        piece = piece.to(self._device()).contiguous()
        whole = torch.empty(piece.numel() * self.size, dtype=piece.dtype, device=piece.device)
        if self.size > 1:
            dist.all_gather_into_tensor(whole, piece)
        else:
            whole.copy_(piece)
        return whole[: parameter.ds_numel].view(full_shape(parameter))

    def _device(self) -> torch.device:
        return torch.device(self.engine.device)

    def _piece(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """What this rank owns of a whole tensor, without the padding."""
        share = parameter.partition_numel()
        start = min(self.rank * share, parameter.ds_numel)
        return whole.reshape(-1)[start : min(start + share, parameter.ds_numel)]

    def weight(self, parameter: Any) -> torch.Tensor:
        return self._gather(parameter, parameter.ds_tensor.detach().reshape(-1))

    def set_weight(self, parameter: Any, whole: torch.Tensor) -> None:
        piece = self._piece(parameter, whole)
        parameter.ds_tensor.data.reshape(-1)[: len(piece)].copy_(piece)
        if parameter.data.numel() == parameter.ds_numel and parameter.data.shape == full_shape(parameter):
            parameter.data.copy_(whole)  # a small parameter that stays gathered
        if parameter.requires_grad:
            flat, _ = self.optimizer._get_fp32_opt_state_partition(parameter, False)
            flat.data[: len(piece)].copy_(piece)

    def moment(self, parameter: Any, key: str) -> torch.Tensor:
        group, offset, numel = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        state = self._inner().state.get(self._owners()[group])
        piece = state[key].narrow(0, offset, numel) if state else torch.zeros(numel, dtype=torch.float32)
        return self._gather(parameter, piece)

    def set_moment(self, parameter: Any, key: str, whole: torch.Tensor) -> None:
        group, offset, numel = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        piece = self._piece(parameter, whole)
        self._inner().state[self._owners()[group]][key].narrow(0, offset, numel)[: len(piece)].copy_(piece)

    def gradient_norm(self) -> torch.Tensor:
        return combine_grad_norm_groups(self.optimizer._get_norm_groups())


def _slice(whole: torch.Tensor, address: Any) -> torch.Tensor:
    return whole.reshape(-1).narrow(0, address.start, address.numel)
