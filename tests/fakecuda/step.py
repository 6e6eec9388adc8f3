"""One training step of rank 0 of N at full size, on the fake device: what the host asks for, and what memory it takes.

Only the step is run: there are neither data nor other ranks. Everything else is what `lvtrain.training` calls.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fakecuda.device import Call, FakeDevice

# torch's allocator asks for memory until blocks that another stream used have come back
_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A recipe's phase on `ranks` GPUs. `changes`: overrides of the recipe, as on the command line.

    The backbone is eager unless `compiled`, whatever the recipe says: compiling it takes minutes.
    """

    name: str
    ranks: int
    phase: str
    recipe: str = "pco_vitl_webface42m"
    changes: tuple[str, ...] = ()
    ds_config: str = "zero1"
    compiled: bool = False


@dataclass
class Measured:
    """Of one case: what the host did and the peak, bytes, by part of the step; bytes that stay between steps.

    `calls`: of each part, kind and stream of every call, in the order of the host.
    """

    parts: dict[str, Counter[str]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    states: float = 0.0
    calls: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def measure(device: FakeDevice, case: Case, folder: Path) -> Measured:
    """Builds the phase's method and engine, trains some steps, and reports the last."""
    arguments = (case.recipe, list(case.changes), case.ds_config, case.phase, case.ranks, case.compiled)
    ended = device.call("tests.fakecuda.step:run", *arguments, folder=folder, copy_limit=1 << 16)
    assert ended.code == 0, ended.output[-4000:]
    found = Measured(**ended.value)
    part = None
    for call in ended.trace():
        if call.kind == "mark":
            part = call.text or None
        elif part:
            found.parts.setdefault(part, Counter())[_column(call)] += 1
            found.calls.setdefault(part, []).append((call.kind, call.stream))
    return found


def _column(call: Call) -> str:
    if call.text.endswith("pageable"):
        return "pageable"
    kinds = {"launch": "launches", "gemm": "products", "nccl": "collectives", "sync": "waits", "malloc": "mallocs"}
    return kinds.get(call.kind, call.kind)


def run(
    recipe_name: str, changes: list[str], ds_config_name: str, phase_name: str, ranks: int, compiled: bool
) -> dict[str, Any]:
    """In the device's process: the step itself, with a mark in the trace before each part."""
    import torch
    import torch.distributed as dist

    from lvtrain.data.augment import augmentation
    from lvtrain.data.loader import Batch
    from lvtrain.engine.ds_config import resolve_ds_config
    from lvtrain.engine.engine import Engine
    from lvtrain.methods import StepInfo, create_method
    from lvtrain.recipe import files as recipes

    library = ctypes.CDLL("libcuda.so.1")
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    cuda = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=ranks, device_id=cuda)
    recipe = recipes.load(Path(f"lvtrain/recipes/{recipe_name}.yaml"), changes)
    phase = next(phase for phase in recipe.phases if phase.name == phase_name)
    accumulation = phase.micro_batches // ranks

    def rows(span: tuple[int, int], dim: int, seed: int) -> torch.Tensor:  # drawing them takes minutes
        return torch.zeros(span[1] - span[0], dim, device=cuda)

    # torch would have NVRTC compile the one for weights that are drawn on a GPU
    erfinv = mock.patch("torch.Tensor.erfinv_", lambda tensor: tensor)
    with mock.patch("lvtrain.classifier.sharded.initial_centres", rows), erfinv, cuda:
        method = create_method(recipe, num_classes=recipe.data.num_classes or 0, device=cuda)
    if compiled:
        torch.use_deterministic_algorithms(recipe.deterministic)  # inductor then compiles one variant of each sum
        method.evaluated().compile()
    method.enter_phase(phase, first_time=True)
    ds_config = resolve_ds_config(Path(f"ds_configs/{ds_config_name}.json"), optimizer=recipe.optimizer)
    engine = Engine(
        method.module,
        ds_config=ds_config,
        micro_batch=phase.micro_batch,
        accumulation=accumulation,
        optimizer=recipe.optimizer,
        device=cuda,
    )
    size = recipe.backbone.image_size
    views = {
        view.name: torch.zeros(phase.micro_batch, 3, view.size or size, view.size or size, device=cuda)
        for view in augmentation(recipe.data.augmentation)
    }
    labels = torch.randint(0, recipe.data.num_classes or 1, (phase.global_batch,))
    batch = Batch(views, labels[: phase.micro_batch].to(cuda), torch.arange(phase.micro_batch))

    peaks: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        library.fakecuda_mark(name.encode() if step == _STEPS - 1 else b"")
        yield
        peaks[name] = max(peaks.get(name, 0.0), float(torch.cuda.max_memory_allocated()))

    for step in range(_STEPS):
        peaks.clear()
        now = StepInfo(step, 1e-3, 0.1, 1.0)
        with part("begin"):
            method.begin_step(now, labels)
            engine.train()
        losses = []
        for _ in range(accumulation):
            with part("forward"):
                outputs = engine(*method.inputs(batch))
            with part("loss"):
                output = method.loss(outputs, batch, now)
            with part("backward"):
                engine.backward(output.loss)
            losses.append(output.loss.detach())
            del outputs, output
        with part("update"):
            engine.step(1e-3, method.global_loss(torch.stack(losses).mean()))
        with part("end"):
            engine.sync_batch_statistics()
            method.end_step(now, engine.full_parameters)
    library.fakecuda_mark(b"")
    return {"peaks": peaks, "states": float(torch.cuda.memory_allocated())}
