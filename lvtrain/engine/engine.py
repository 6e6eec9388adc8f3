"""The backbone under DeepSpeed: forward, backward and one optimizer step.

Everything specific to DeepSpeed lives here and in `zero_state`. The engine counts the micro-batches itself and tells
DeepSpeed where a step ends. So a step can be discarded, and the next one starts clean, under every ZeRO stage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError

from lvtrain.checkpoint.state import State
from lvtrain.engine import named_state, zero_state
from lvtrain.engine.batch_statistics import BatchStatistics
from lvtrain.engine.ds_config import fit_buckets, resolve_ds_config
from lvtrain.engine.gradient_buckets import ELEMENTS, GradientBuckets
from lvtrain.engine.named_state import StateReader
from lvtrain.engine.parameter_groups import parameter_groups
from lvtrain.errors import UserError
from lvtrain.recipe.optimizer import OPTIMIZERS, Optimizer

__all__ = ["Engine", "resolve_ds_config"]


class Engine:
    """A module under DeepSpeed. A process group must exist already.

    Parameters and buffers are float32, whatever the precision of the arithmetic. `backward` divides the loss by
    `accumulation`, and gradients are averaged over the ranks.

    Args:
        module: the network to train.
        ds_config: from `resolve_ds_config`.
        micro_batch: images in one forward.
        accumulation: micro-batches of this rank in one step.
        optimizer: the recipe's section.
        device: where the module is moved to.
        still: parts of the module that stay in evaluation mode while it is trained.

    Attributes:
        held: whether the whole module stays as it is in this step, see `train`.

    Raises:
        UserError: DeepSpeed refuses the configuration.
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
        still: Sequence[nn.Module] = (),
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        if device.type == "cpu":
            # a shared-memory op that only inference uses; compiling it would need a compiler and half a minute at the
            # first start. On CUDA, asking for this table makes DeepSpeed probe each of its operators.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        module.to(device)
        module.train()
        self.accumulation, self.device = accumulation, device
        self._still, self.held = still, False
        self.groups = parameter_groups(module, optimizer)
        self._statistics = BatchStatistics(module, accumulation)
        self._micro = 0
        self._clip, self._weight_decay = optimizer.clip, optimizer.weight_decay
        self._skipped = False
        self._verdict = _Verdict(device)
        config = dict(ds_config, train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation)
        self.stage = int(config["zero_optimization"]["stage"])
        zero = config["zero_optimization"]
        elements = sum(zero_state.full_shape(parameter).numel() for parameter in module.parameters())
        config["zero_optimization"] = fit_buckets(zero, elements)
        has_own_buckets = self.stage in (1, 2) and (zero.get("offload_optimizer") or {}).get("device", "none") == "none"
        if has_own_buckets:
            config["zero_optimization"]["overlap_comm"] = False
        # Dividing the loss by an accumulation that is not a power of two changes the rounding of bfloat16 in backward, so
        # 1 rank x 3 and 3 ranks x 1 would differ. Here the module sees the gradient of the undivided loss, and each
        # parameter's gradient is divided in float32. A small difference remains (up to 8e-3 of a tensor's largest
        # moment, tests/test_engine_state.py).
        self._exact = accumulation & (accumulation - 1) == 0 or optimizer.precision != "bfloat16"
        parameters = dict(module.named_parameters())
        if not self._exact:
            for parameter in parameters.values():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient / accumulation)
        kind = OPTIMIZERS.get(optimizer.name)
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
        # DeepSpeed warns of optimizers that it has not tested; tests/test_engine_optimizers.py tests ours
        config["zero_allow_untested_optimizer"] = True
        deepspeed_logger.setLevel(logging.ERROR)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._optimizer, config=config, dist_init_required=False
            )
        except ValidationError as error:  # only DeepSpeed knows all its own settings
            problem = error.errors()[0]
            raise UserError(
                f"the DeepSpeed JSON: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; correct or remove it"
            ) from error
        finally:
            deepspeed_logger.setLevel(logging.WARNING)
        self._buckets: GradientBuckets | None = None
        if has_own_buckets:
            asked = zero.get("reduce_bucket_size", "auto")
            self._buckets = GradientBuckets(
                self._engine.optimizer,
                [parameter for parameter in module.parameters() if parameter.requires_grad],
                elements=ELEMENTS if asked == "auto" else int(float(asked)),
                overlap=zero.get("overlap_comm") is not False,
            )
        self._state = zero_state.create(self._engine, self.stage, kind.state_names(optimizer), kind.step_name)
        # at once: when its first step is skipped, torch's fused SGD would keep a momentum that was never written
        self._state.prepare_state(0.0)
        self._check()

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward on one micro-batch, in bfloat16 if the recipe says so."""
        if self.held:
            with torch.no_grad():
                fixed = self._engine(*inputs)
            return _map(fixed, lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), every=True)
        self._engine.set_gradient_accumulation_boundary(self._micro == self.accumulation - 1)
        outputs = self._engine(*inputs)
        if self.module.training:
            self._statistics.collect(self._micro)
        return (
            outputs if self._exact else _map(outputs, lambda tensor: _ScaledGradient.apply(tensor, self.accumulation))
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch's scalar loss. Call it `accumulation` times a step."""
        if self._micro >= self.accumulation:
            raise RuntimeError(f"backward called more than {self.accumulation} times in a step")
        if self.held:  # the gradient ends at the module's outputs, for what is trained outside it
            (loss / self.accumulation).backward()
            self._micro += 1
            return
        self._engine.set_gradient_accumulation_boundary(self._micro == self.accumulation - 1)
        self._engine.backward(loss)
        self._micro += 1

    def step(self, lr: float, loss: torch.Tensor, *, weight_decay: float | None = None) -> torch.Tensor:
        """One clipped step of the optimizer.

        If the loss or the gradient norm is not finite, weights and optimizer state stay as they are on every rank, and
        `skipped` is True. The device decides that inside the optimizer's kernel, which also clips. The host reads the
        decision while the device still works on the update.

        Args:
            lr: learning rate, before each group's scale.
            loss: the step's loss over all ranks, a scalar on the device.
            weight_decay: of the decayed groups from this step on; None keeps it (at first `optimizer.weight_decay`).

        Returns:
            The gradient norm before clipping, float32 scalar.
        """
        if self._micro != self.accumulation:
            raise RuntimeError(f"step after {self._micro} of {self.accumulation} micro-batches")
        if self.held:
            self._verdict.send(~torch.isfinite(loss))
            self._micro = 0
            self._skipped = self._verdict.receive()
            return torch.zeros((), device=self.device)
        if weight_decay is not None:
            self._weight_decay = weight_decay
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = self._weight_decay if group["decayed"] else 0.0
        norm = self._state.gradient_norm().to(self.device, torch.float32)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        self._verdict.send(bad)
        place = self._state.optimizer_device()
        # torch's fused optimizers divide gradients by `grad_scale`; where `found_inf` is 1 they change nothing
        self._optimizer.found_inf = bad.to(place, torch.float32)
        if self._clip:
            self._optimizer.grad_scale = ((norm + 1e-6) / self._clip).clamp(min=1.0).to(place)
        self._engine.step()
        self._micro = 0
        self._skipped = self._verdict.receive()
        if self._skipped:
            self._statistics.discard()
        return norm

    @property
    def skipped(self) -> bool:
        """Whether the last `step` changed nothing, because the loss or the gradient was not finite."""
        return self._skipped

    def sync_batch_statistics(self) -> None:
        """Updates BatchNorm's running statistics from all micro-batches of the step. Call it after `step`. A collective."""
        if not self._skipped and not self.held:
            self._statistics.commit()

    def train(self, *, held: bool = False) -> None:
        """Prepares a training step.

        Args:
            held: the module stays in evaluation mode and its weights, buffers and optimizer state stay as they are, to the
                bit. `backward` gives a gradient only to what is trained outside the module.
        """
        self.held = held
        if held:
            self._engine.eval()
            return
        self._engine.train()
        for part in self._still:
            part.eval()

    def eval(self) -> None:
        self._engine.eval()

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers. The module cannot be used afterwards."""
        self._statistics.release()
        if self._buckets is not None:
            self._buckets.release()
        if self.stage == 3:
            zero_state.forget_zero3(self.module)
        self._engine.destroy()

    def full_parameters(self) -> AbstractContextManager[Any]:
        """A context in which all weights are whole on every rank, to read. A collective under ZeRO-3."""
        if self.stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None)

    def export_state(self, keep: Callable[[int], bool] = lambda position: True) -> State:
        """A copy of the backbone's whole state, see `named_state`. A collective.

        Args:
            keep: says which tensors this rank keeps, by their number. The others come back on the meta device, so a rank
                holds no more on the host than it writes.
        """
        if self._micro:
            raise RuntimeError("the state can be exported between steps only")
        return named_state.export_state(self.module, self._state, keep)

    def import_state(self, reader: StateReader) -> None:
        """Loads what `export_state` gave, bit for bit, from any ZeRO stage and number of ranks. Each rank keeps its part.

        Raises:
            UserError: a tensor is missing, or its shape or dtype differs.
        """
        named_state.import_state(self.module, self._state, reader)
        self._statistics.reload()
        self._check()

    def _check(self) -> None:
        """Checks what DeepSpeed got wrong in the past: float32 buffers, the groups, one optimizer step per group."""
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
    """Copies one boolean from GPU to host. Reading it waits only for work that was queued before `send`."""

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
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def _map(outputs: Any, function: Callable[[torch.Tensor], Any], *, every: bool = False) -> Any:
    """Applies `function` to every tensor (or those that require a gradient) in a tensor, tuple or list."""
    if isinstance(outputs, torch.Tensor):
        return function(outputs) if every or outputs.requires_grad else outputs
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(_map(output, function, every=every) for output in outputs)
    return outputs
