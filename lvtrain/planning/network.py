"""What one image costs a network. It runs on fake tensors, which have no memory, and its operations are counted."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lvtrain.backbones import Backbone
from lvtrain.backbones.memory import KEPT

Module = TypeVar("Module", bound=nn.Module)
_BATCH = 2


@dataclass(frozen=True)
class Network:
    """A network, measured.

    Attributes:
        name: for tables.
        parameters: elements of all parameters.
        largest: elements of the largest single module's own parameters, which ZeRO-3 gathers whole.
        forward_flops: of one image; a multiply-add is 2.
        train_flops: likewise, with the backward pass and what it recomputes.
        saved: bytes an image that autograd keeps for the backward pass, in bfloat16 autocast, without copies of weights.
        recomputed: further bytes an image while one block is recomputed.
        unrecomputed: `saved` if nothing were recomputed.
        image_size: side of the image, pixels.
        compiles_whole: whether torch.compile makes one graph of it, which gives all gradients at its end.
    """

    name: str
    parameters: int
    largest: int
    forward_flops: float
    train_flops: float
    saved: float
    recomputed: float = 0.0
    unrecomputed: float = 0.0
    image_size: int = 112
    compiles_whole: bool = False

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes a part of the forward pass again."""
        return 0 < self.unrecomputed != self.saved


def measure_network(name: str, build: Callable[[], Backbone], *, image_size: int = 112) -> Network:
    """Measures the backbone that `build()` returns; a network of any size takes no memory.

    Example: `measure_network("vit_h", lambda: create_backbone("vit_h"))`.
    """
    with _fake(build) as module:
        module.train()
        saved, flops = _train_step(module, image_size, with_flops=True)
        mode, unrecomputed = module.checkpoint_blocks, saved
        if mode != "none":
            module.recompute("none")
            unrecomputed, _ = _train_step(module, image_size)
    sizes = [sum(p.numel() for p in part.parameters(recurse=False)) for part in module.modules()]
    checkpointed = max(module.num_blocks // module.checkpoint_every, 1)
    recomputed = (unrecomputed - saved) / checkpointed
    forward, train = flops
    return Network(
        name,
        parameters=sum(sizes),
        largest=max(sizes),
        forward_flops=forward / _BATCH,
        train_flops=train / _BATCH,
        saved=saved,
        recomputed=recomputed,
        unrecomputed=unrecomputed,
        image_size=image_size,
        compiles_whole=module.compiles_whole,
    )


@contextmanager
def _fake(build: Callable[[], Module]) -> Iterator[Module]:
    """The network on fake tensors, which pass for tensors of the CPU. It is built on the meta device."""
    with torch.device("meta"):
        module = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield module.to_empty(device="cpu")


def forward_peak(build: Callable[[], nn.Module], *, image_size: int = 112) -> float:
    """Bytes an image at the fullest moment of a forward pass that has no backward pass, in bfloat16 autocast.

    Weights, copies of weights and the image itself are left out. `build` is as for `measure_network`.
    """
    with _fake(build) as module, torch.no_grad():
        module.eval().requires_grad_(False)
        images, alive = torch.randn(_BATCH, 3, image_size, image_size), _Alive(_shapes(module))
        with alive, torch.autocast("cpu", torch.bfloat16):
            module(images)
    return alive.peak / _BATCH


def _train_step(module: Backbone, image_size: int, with_flops: bool = False) -> tuple[float, tuple[float, float]]:
    """Bytes an image that are kept for the backward pass, and (forward, total) flops of `_BATCH` images."""
    weights = _shapes(module)
    counter, flops, kept = FlopCounterMode(display=False), (0.0, 0.0), _Kept()
    sizes: dict[int, int] = {}
    alive = []  # a storage must live while it is counted, or its address may be given to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            storage = tensor.untyped_storage()
            alive.append(storage)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.randn(_BATCH, 3, image_size, image_size)
    with counter:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, kept, torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            # selective checkpointing bypasses the hooks; `kept` counts what they do not see
            warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
            embedding = module(images)
        forward = counter.get_total_flops()
        if with_flops:
            embedding.float().sum().backward()
            flops = (float(forward), float(counter.get_total_flops()))
    selective = kept.bytes if module.checkpoint_blocks == "activation" else 0
    return (sum(sizes.values()) + selective) / _BATCH, flops


def _shapes(module: nn.Module) -> set[tuple[int, ...]]:
    """Shapes of weights, and of their copies and transposes, which do not grow with the batch."""
    weights = {tuple(p.shape) for p in module.parameters()}
    return weights | {shape[::-1] for shape in weights}


class _Kept(TorchDispatchMode):
    """Counts what selective checkpointing keeps and saved-tensor hooks do not see: results of matmuls inside blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in KEPT:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


class _Alive(TorchDispatchMode):
    """The most bytes that results of operations held at one time. Shapes in `left_out` do not count."""

    def __init__(self, left_out: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.left_out, self.known = left_out, weakref.WeakSet[torch.UntypedStorage]()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in args:  # a view of a weight is no new memory
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                if tuple(tensor.shape) not in self.left_out:
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
