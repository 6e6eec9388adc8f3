"""The backbone under DeepSpeed: forward, backward, one optimizer step, and its state in and out by parameter name.

Everything DeepSpeed-specific lives here and in `zero_state`. The engine keeps its own count of micro-batches and tells DeepSpeed where a step
ends, so that a step can be discarded and the next one starts clean, under every ZeRO stage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError

from lvtrain.checkpoint.state import Replicated, State
from lvtrain.engine import zero_state
from lvtrain.engine.batch_statistics import BatchStatistics
from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.engine.parameter_groups import parameter_groups
from lvtrain.errors import UserError
from lvtrain.recipe.optimizer import OPTIMIZERS, Optimizer

__all__ = ["Engine", "StateReader", "resolve_ds_config"]

PREFIX = "backbone."


class StateReader(Protocol):
    """What `Engine.import_state` reads from: a checkpoint, or a dict in tests."""

    def replicated(self, name: str) -> torch.Tensor: ...


class Engine:
    """`module` under DeepSpeed, as `ds_config` (from `resolve_ds_config`) and the recipe's optimizer section say.

    `micro_batch` samples a forward, `accumulation` forwards and backwards on this rank a step. A process group must exist already. A loss
    handed to `backward` is divided by `accumulation`; gradients are averaged over the ranks. Parameters and buffers are float32 whatever the
    precision of the arithmetic.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ds_config: dict[str, Any],
        micro_batch: int,
        accumulation: int,
        optimizer: Optimizer,
        device: torch.device,
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        # a shared-memory op that only inference uses: compiling it costs a first start half a minute and a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        module.to(device)
        module.train()
        self.accumulation, self.device = accumulation, device
        self.groups = parameter_groups(module, optimizer)
        self._names = [name for name, _ in module.named_parameters()]
        self._statistics = BatchStatistics(module, accumulation)
        self._micro = 0
        self._clip, self._weight_decay = optimizer.clip, optimizer.weight_decay
        self._skipped = False
        self._verdict = _Verdict(device)
        self._bfloat16 = optimizer.precision == "bfloat16"
        config = dict(ds_config, train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation)
        self.stage = int(config["zero_optimization"]["stage"])
        config["zero_optimization"] = _fit_buckets(config["zero_optimization"], module)
        # Dividing the loss by the accumulation moves where bfloat16 rounds in backward, unless by a power of two: 1 rank x 3 and 3 ranks x 1 would
        # differ. So inside the module the gradient is that of the undivided loss, and each parameter's own is divided, in float32. What is left is
        # the roundings that fall the other way (up to 8e-3 of a tensor's largest moment, tests/test_engine_state.py).
        self._exact = accumulation & (accumulation - 1) == 0 or not self._bfloat16
        parameters = dict(module.named_parameters())
        if not self._exact:
            for parameter in parameters.values():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient / accumulation)
        kind = OPTIMIZERS.get(optimizer.name)
        self._state_names, self._step_name = kind.state_names(optimizer), kind.step_name
        groups = [
            {
                "params": [parameters[name] for name in group.parameters],
                "weight_decay": optimizer.weight_decay if group.decayed else 0.0,
                "decayed": group.decayed,
                "name": group.name,
                "lr_scale": group.lr_scale,
            }
            for group in self.groups
        ]
        self._optimizer: Any = kind.create(groups, optimizer)
        # DeepSpeed warns of every optimizer that it does not know; the tests of the engine cover ours
        config["zero_allow_untested_optimizer"] = True
        deepspeed_logger.setLevel(logging.ERROR)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._optimizer, config=config, dist_init_required=False
            )
        except ValidationError as error:  # only DeepSpeed knows all its own settings
            told = error.errors()[0]
            raise UserError(
                f"the DeepSpeed JSON: {'.'.join(map(str, told['loc']))}: {told['msg']}; correct or remove it"
            ) from error
        finally:
            deepspeed_logger.setLevel(logging.WARNING)
        self._state = zero_state.create(self._engine, self.stage, self._state_names, counts_steps=bool(self._step_name))
        self._state.prepare_state(0.0)  # at once: a first step that is skipped must not leave what was never written
        self._check()

    # ------------------------------------------------------------------------------------------------------------- training

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward on one micro-batch, under autocast if the recipe says bfloat16."""
        self._engine.set_gradient_accumulation_boundary(self._micro == self.accumulation - 1)
        outputs = self._engine(*inputs)
        if self.module.training:
            self._statistics.collect(self._micro)
        return (
            outputs if self._exact else _map(outputs, lambda tensor: _ScaledGradient.apply(tensor, self.accumulation))
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch's loss, a scalar; call it `accumulation` times a step."""
        if self._micro >= self.accumulation:
            raise RuntimeError(f"backward called more than {self.accumulation} times in a step")
        self._engine.set_gradient_accumulation_boundary(self._micro == self.accumulation - 1)
        self._engine.backward(loss)
        self._micro += 1

    def step(self, lr: float, loss: torch.Tensor, *, weight_decay: float | None = None) -> torch.Tensor:
        """One clipped AdamW step at rate `lr` times each group's scale; returns the gradient norm before clipping, a float32 scalar.

        `weight_decay`: of the groups that are decayed, from this step on; at first it is `optimizer.weight_decay`.
        `loss`: the step's, over all ranks. If it or the norm is not finite, weights and moments stay as they are, on every rank alike, and
        `skipped` is True then. The device decides that, inside AdamW's own kernel, which also clips; the host is told while the device is
        still at work on the update.
        """
        if self._micro != self.accumulation:
            raise RuntimeError(f"step after {self._micro} of {self.accumulation} micro-batches")
        if weight_decay is not None:
            self._weight_decay = weight_decay
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = self._weight_decay if group["decayed"] else 0.0
        norm = self._state.gradient_norm().to(self.device, torch.float32)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._verdict.send(finite)
        place = self._state.optimizer_device()
        # torch's fused optimizers divide gradients by `grad_scale`, and change nothing, their step count included, where `found_inf` is 1
        self._optimizer.found_inf = (~finite).to(place, torch.float32)
        if self._clip:
            self._optimizer.grad_scale = ((norm + 1e-6) / self._clip).clamp(min=1.0).to(place)
        self._engine.step()
        self._micro = 0
        self._skipped = not self._verdict.receive()
        if self._skipped:
            self._statistics.discard()
        return norm

    @property
    def skipped(self) -> bool:
        """Whether the last `step` changed nothing because the loss or the gradient was not finite."""
        return self._skipped

    def sync_batch_statistics(self) -> None:
        """Moves BatchNorm's running statistics by the step's V micro-batches, the same on every rank; call it after `step`. A collective."""
        if not self._skipped:
            self._statistics.commit()

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    @torch.no_grad()
    def forward_only(self, *inputs: Any) -> Any:
        """The module's forward in evaluation mode, without gradient; under ZeRO-3 every rank must call it equally often."""
        training = self.module.training
        self.eval()
        try:
            return self._engine(*inputs)
        finally:
            self._engine.train(training)

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers. The module cannot be used afterwards."""
        self._statistics.release()
        if self.stage == 3:
            zero_state.forget_zero3(self.module)
        self._engine.destroy()

    # ---------------------------------------------------------------------------------------------------------------- state

    def full_parameters(self, module: nn.Module | None = None) -> AbstractContextManager[Any]:
        """Inside it, every weight of `module` (all, if none is given) is whole on every rank, to be read. A collective under ZeRO-3."""
        if self.stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list((module or self.module).parameters()), modifier_rank=None)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, trained or frozen, whole, float32, on this rank's device, one at a time. A collective under ZeRO-3."""
        for name, parameter in self.module.named_parameters():
            yield name, self._state.weight(parameter)

    def export_state(self, keep: Callable[[int], bool] = lambda position: True) -> State:
        """The backbone's whole state by parameter name, on the host, a copy. A collective.

        `backbone.param.NAME`, `backbone.buffer.NAME`, of trained parameters the optimizer's `backbone.KEY.NAME` (such as `exp_avg`), and
        its step count (`backbone.adam_step`), a float32 scalar. Of the tensors, numbered in this order, the rank keeps those `keep` says; the others come back
        empty, of dtype and shape only (on the meta device), so that a rank holds no more on the host than it writes.
        """
        if self._micro:
            raise RuntimeError("the state can be exported between steps only")
        state: State = {}

        def add(name: str, whole: torch.Tensor) -> None:
            kept = whole.detach().to("cpu", copy=True) if keep(len(state)) else torch.empty_like(whole, device="meta")
            state[PREFIX + name] = Replicated(kept, given=True)

        for name, parameter in self.module.named_parameters():
            add(f"param.{name}", self._state.weight(parameter))
            if parameter.requires_grad:
                for key in self._state_names:
                    add(f"{key}.{name}", self._state.moment(parameter, key))
        for name, buffer in self._persistent_buffers():
            add(f"buffer.{name}", buffer)
        if self._step_name:
            add(self._step_name, torch.tensor(float(self._state.step_count())))
        return state

    def import_state(self, reader: StateReader) -> None:
        """Takes back what `export_state` gave, bit for bit, whatever ZeRO stage and number of ranks it came from; each rank keeps only its part.

        Raises:
            UserError: a tensor is missing, or its shape or dtype differs.
        """
        self._state.prepare_state(float(reader.replicated(PREFIX + self._step_name)) if self._step_name else 0.0)
        for name, parameter in self.module.named_parameters():
            shape = zero_state.full_shape(parameter)
            self._state.set_weight(parameter, _checked(reader, f"param.{name}", shape, torch.float32))
            if parameter.requires_grad:
                for key in self._state_names:
                    self._state.set_moment(parameter, key, _checked(reader, f"{key}.{name}", shape, torch.float32))
        for name, buffer in self._persistent_buffers():
            buffer.copy_(_checked(reader, f"buffer.{name}", buffer.shape, buffer.dtype))
        self._state.finish_import()
        self._statistics.reload()
        self._check()

    def state_names(self) -> set[str]:
        """The names `export_state` gives, without communication."""
        names = {f"param.{name}" for name in self._names}
        names |= {f"buffer.{name}" for name, _ in self._persistent_buffers()}
        names |= {self._step_name} if self._step_name else set()
        trained = {name for group in self.groups for name in group.parameters}
        return {PREFIX + name for name in names | {f"{key}.{name}" for key in self._state_names for name in trained}}

    def _persistent_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, module in self.module.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name, buffer

    def _check(self) -> None:
        """What DeepSpeed has got wrong in the past: buffers in float32, groups as configured, one Adam step a group."""
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                raise RuntimeError(f"DeepSpeed changed the buffer {name} to {buffer.dtype}; lvtrain needs float32")
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        found = {
            group["name"]: ({names[id(parameter)] for parameter in members}, group["weight_decay"], group["lr_scale"])
            for group, members in zip(self._engine.optimizer.param_groups, self._state.group_members())
        }
        decays = {True: self._weight_decay, False: 0.0}
        if found != {g.name: (set(g.parameters), decays[g.decayed], g.lr_scale) for g in self.groups}:
            raise RuntimeError("DeepSpeed's parameter groups are not the ones configured by name")
        self._state.check_steps()


class _Verdict:
    """One truth from the device to the host. The host waits for what was queued before `send`, not for what was queued since."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._value = torch.zeros((), dtype=torch.bool, pin_memory=self._event is not None)

    def send(self, truth: torch.Tensor) -> None:
        self._value.copy_(truth, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def receive(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value.numpy())


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def _map(outputs: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`function` of every tensor with a gradient in a tensor, tuple or list."""
    if isinstance(outputs, torch.Tensor):
        return function(outputs) if outputs.requires_grad else outputs
    return (
        type(outputs)(_map(output, function) for output in outputs) if isinstance(outputs, (tuple, list)) else outputs
    )


def _fit_buckets(zero: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """No communication bucket larger than the model: DeepSpeed allocates the whole of it, 2 GB by default, anew at every backward."""
    total = sum(zero_state.full_shape(parameter).numel() for parameter in module.parameters())
    total += total % 2  # DeepSpeed wants an even number
    fitted = dict(zero)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        asked = zero.get(name, "auto")
        fitted[name] = min(500_000_000 if asked == "auto" else int(float(asked)), total)
    return fitted


def _checked(reader: StateReader, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    tensor = reader.replicated(PREFIX + name)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise UserError(
            f"the checkpoint's {PREFIX + name} is {tuple(tensor.shape)} {tensor.dtype}, the backbone's {tuple(shape)} {dtype}; "
            "use init_from to take weights only"
        )
    return tensor
