"""The classifier's forward and backward: time, memory, and the ratio to its matmuls, to stored logits and to arcface_torch.

    python tools/benchmark.py classifier --batch 512 --classes 50000 --peer PATH/recognition/arcface_torch
    python tools/benchmark.py classifier --device cuda --batch 24576 --classes 32186 --precisions half,tf32 --kernels torch,triton --kept
    python tools/benchmark.py classifier --device cuda --batch 1024 --classes 2059906 --precisions half,tf32 --kernels torch,triton --no-materialised

Variants take turns in one process, and medians are compared. On a CPU the time is process CPU time with one thread, and
malloc keeps freed memory (otherwise the variant that allocates most pays for page faults). Memory is measured in a
separate process for each variant, with malloc's defaults. `classifier_table` runs a whole grid of these.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.classifier import Anchor, Numerics, ShardedClassifier, class_range
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.numerics import chunk_size, formats, matmul_precision
from lvtrain.classifier.partition import initial_centres
from lvtrain.errors import UserError

SMALL: dict[str, Any] = {"batch": 128, "classes": 2_000, "repeats": 2, "memory": False}
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
_ALL = 1e6  # MB: keep every exponential

Step = Callable[[], Any]


@dataclass
class Problem:
    """One shape.

    Attributes:
        x: embeddings of this rank.
        all_x: embeddings of all ranks.
        labels: of this rank.
        all_labels: of all ranks.
        weight: class centres of this rank.
        classes: over all ranks.
        rows: this rank's range of classes.
        rate: share of the classes that take part.
    """

    x: torch.Tensor
    all_x: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor
    weight: torch.nn.Parameter
    classes: int
    rows: tuple[int, int]
    rate: float

    @property
    def taking_part(self) -> int:
        return round(len(self.weight) * self.rate)


def problem(batch: int, classes: int, rate: float, weight: torch.nn.Parameter) -> Problem:
    """A shape with `batch` samples over all ranks. `weight` holds this rank's centres of `classes`."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, weight.shape[1], generator=generator).to(weight.device)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    mine = slice(batch * rank // ranks, batch * (rank + 1) // ranks)
    rows = class_range(classes, rank, ranks)
    return Problem(
        x[mine].clone().requires_grad_(), x, labels[mine].to(weight.device), labels, weight, classes, rows, rate
    )


def run(
    batch: int = 512,
    classes: int = 50_000,
    dim: int = 512,
    rate: float = 1.0,
    precisions: str = "float32,bfloat16",
    kernels: str = "torch",
    chunk: int = 0,
    kept: bool = False,
    peer: str = "",
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
    memory: bool = True,
    materialised: bool = True,
    two_anchors: bool = False,
    only: str = "",
) -> dict[str, Any]:
    """Milliseconds (CPU time on a CPU) of forward and backward, and MB beyond weights and the centres' gradient.

    kept: also measure with memory for all exponentials, for batches too large for the gradient's memory. peer: folder of
    an arcface_torch checkout, to time its PartialFC_V2. only: measure the peak memory of this variant only.
    """
    given = dict(locals())
    check_peer(peer)
    if device == "cpu" and not only and os.environ.get("MALLOC_MMAP_THRESHOLD_") != _MALLOC["MALLOC_MMAP_THRESHOLD_"]:
        return in_children("classifier", given, threads=threads)  # malloc reads its settings when a process starts
    torch.set_num_threads(threads)
    weight = torch.nn.Parameter(initial_centres((0, classes), dim, 0).to(device))
    shape = problem(batch, classes, rate, weight)
    found = variants(shape, precisions.split(","), kernels.split(","), chunk, peer, materialised, two_anchors, kept)
    if only:
        return {"extra_mb": extra_memory(found[only], weight.device)}
    measured = compared(interleaved(found, repeats, weight.device))
    if memory:
        for name, row in measured.items():
            if "matmuls" not in name:
                alone = in_children("classifier", given | {"only": name}, threads=threads, malloc=False)
                row["extra_mb"] = alone["extra_mb"]
                row["extra_mb_beyond_gradient_rows"] = round(row["extra_mb"] - shape.taking_part * dim * 4 / 2**20, 1)
    return {
        "subject": "classifier",
        "device": torch.cuda.get_device_name(device) if device == "cuda" else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "batch": batch,
        "classes": classes,
        "dim": dim,
        "rate": rate,
        "chunk": chunk_size(batch, dim, classes, chunk or None, weight.device),
        "weights_mb": round(classes * dim * 4 / 2**20),
        "gradient_rows_mb": round(shape.taking_part * dim * 4 / 2**20),
        "variants": measured,
    }


def compared(milliseconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Each variant's time, and its ratios: to three and four matmuls in its number formats, to the peer, to one anchor."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in milliseconds.items():
        row: dict[str, Any] = {"ms": round(value, 2)}
        words = name.split()
        for count in (4, 3):
            bound = (
                milliseconds.get(f"{count} matmuls {words[1]}")
                if words[0] == "lvtrain" and "anchors" not in words
                else None
            )
            if bound:
                row[f"times_{count}_matmuls"] = round(value / bound, 3)
        if "peer" in milliseconds:
            row["times_peer"] = round(value / milliseconds["peer"], 3)
        if name.endswith(" two anchors"):
            row["times_one_anchor"] = round(value / milliseconds[name.removesuffix(" two anchors")], 3)
        rows[name] = row
    return rows


def in_children(
    module: str,
    arguments: dict[str, Any],
    *,
    function: str = "run",
    threads: int = 1,
    ranks: int = 1,
    malloc: bool = True,
    limit_s: float = 3600,
) -> dict[str, Any]:
    """Calls `tools.benchmarks.MODULE.FUNCTION(**arguments)` in a new process, or one for each gloo rank. Returns rank 0's result.

    Raises:
        UserError: it fails (for example because memory ran out), or takes longer than `limit_s`.
    """
    code = f"import json, sys; from tools.benchmarks.{module} import {function} as f; print('RESULT ' + json.dumps(f(**json.loads(sys.argv[1]))))"
    environment = {key: value for key, value in os.environ.items() if key not in _MALLOC} | (_MALLOC if malloc else {})
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(ranks), "BENCHMARK_STORE": f"{folder}/store"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(arguments)],
                env=environment | {"RANK": str(rank)},
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            ended = [process.communicate(timeout=limit_s) for process in started]
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the benchmark's process was still running after {limit_s:.0f} s") from error
        finally:
            for process in started:
                process.kill()
    lines = [line for line in ended[0][0].splitlines() if line.startswith("RESULT ")]
    if not lines:
        message = (ended[0][1].strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the benchmark's process ended with {started[0].returncode}: {message}")
    found: dict[str, Any] = json.loads(lines[-1][len("RESULT ") :])
    return found


def variants(
    shape: Problem,
    precisions: list[str],
    kernels: list[str] | None = None,
    chunk: int = 0,
    peer: str = "",
    materialised: bool = False,
    two_anchors: bool = False,
    kept: bool = False,
) -> dict[str, Step]:
    """Steps by name: "4 matmuls P", "3 matmuls P", "lvtrain P [kernel] [kept] [two anchors]", "materialised", "peer"."""
    steps: dict[str, Step] = {}
    for precision in precisions:
        for count in (4, 3):
            steps[f"{count} matmuls {precision}"] = _matmuls(shape, precision, chunk, recompute=count == 4)
        for keep in ["", " kept"] if kept else [""]:
            for kernel in kernels or ["torch"]:
                name = f"lvtrain {precision}" + ("" if kernel == "torch" else f" {kernel}") + keep
                steps[name] = _ours(shape, precision, kernel, chunk, _ALL if keep else None, two=False)
                if two_anchors and not keep:
                    steps[name + " two anchors"] = _ours(shape, precision, kernel, chunk, None, two=True)
    if materialised and shape.rate == 1.0:
        steps["materialised"] = _materialised(shape)
    if peer:
        steps["peer"] = _peer(Path(peer), shape)
    return steps


def _ours(shape: Problem, precision: Any, kernel: Any, chunk: int, keep_mb: float | None, *, two: bool) -> Step:
    x, weight = shape.x, shape.weight
    numerics = Numerics(precision, kernel, chunk or None)
    if keep_mb is not None:
        numerics = replace(numerics, keep_mb=keep_mb)
    head = ShardedClassifier(1, x.shape[1], margin=CosFace(), numerics=numerics, device=x.device)
    # one weight for all variants, because several would not fit
    head.num_classes, head.rows, head.weight = shape.classes, shape.rows, weight
    head.enter_phase(sample_rate=shape.rate)
    second = [Anchor(F.normalize(weight.detach()), CosFace(), is_unit=True)] if two else []

    def step() -> Any:
        x.grad = None
        head.begin_step(0, shape.all_labels)
        loss = head(x, shape.labels, step=0, anchors=second).loss
        loss.backward()
        head.discard_step()
        return loss

    return step


def _matmuls(shape: Problem, precision: str, chunk: int, *, recompute: bool) -> Step:
    """A lower bound: only the four matmuls (three without `recompute`), in the precision's number formats and chunks.

    The centres' gradient is written where the classifier writes it. 16-bit factors are two chunks that stay in cache.
    Nothing is normalised, rounded or exponentiated.
    """
    x, weight, count = shape.all_x, shape.weight.detach(), shape.taking_part
    size = chunk_size(len(x), x.shape[1], count, chunk or None, x.device)
    kind = formats(precision, weight.dtype, x.device)
    unit, factor = (weight.dtype, weight.dtype) if kind.emulated else (kind.unit, kind.factor)
    left, right = F.normalize(x).to(unit), F.normalize(x).to(factor)
    unit_rows = None if unit == weight.dtype else weight[:size].to(unit)
    factor_rows = None if factor == weight.dtype else weight[:size].to(factor)
    e = None if factor == weight.dtype else torch.ones(len(x) * size, dtype=factor, device=x.device)
    wide: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and factor != weight.dtype else {}

    def step() -> Any:
        gradient = weight.new_empty(count, weight.shape[1])
        total = torch.zeros_like(x)
        buffer = x.new_empty(len(x) * size)
        with matmul_precision(precision, x.device):
            for backward in (False, True):
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    logits = buffer[: len(x) * (stop - start)].view(len(x), -1)
                    if recompute or not backward:
                        rows = weight[start:stop] if unit_rows is None else unit_rows[: stop - start]
                        torch.mm(left, rows.t(), out=logits, **({} if unit_rows is None else wide))
                    probability = logits if e is None else e[: logits.numel()].view_as(logits)
                    if not backward:
                        total.add_(
                            torch.mm(
                                probability,
                                weight[start:stop] if factor_rows is None else factor_rows[: stop - start],
                                **wide,
                            )
                        )
                    elif e is None or wide:
                        torch.mm(probability.t(), right, out=gradient[start:stop], **wide)
                    else:
                        torch.mm(probability.t(), right)
        return total

    return step


def _materialised(shape: Problem) -> Step:
    x, weight = shape.x, shape.weight

    def step() -> Any:
        x.grad = weight.grad = None
        cosine = F.linear(F.normalize(x), F.normalize(weight))
        loss = F.cross_entropy(
            64.0 * (cosine - 0.4 * F.one_hot(shape.labels, len(weight)).to(cosine.dtype)), shape.labels
        )
        loss.backward()
        weight.grad = None
        return loss

    return step


def check_peer(folder: str) -> None:
    """Checks that the peer's folder has PartialFC_V2. An empty `folder` means no peer.

    Raises:
        UserError: it has not.
    """
    if folder and not Path(folder, "partial_fc_v2.py").exists():
        raise UserError(
            f"--peer {folder}: no partial_fc_v2.py there; give the recognition/arcface_torch folder of an insightface checkout"
        )


def _peer(folder: Path, shape: Problem) -> Step:
    """PartialFC_V2 of an arcface_torch checkout. On a CPU, `.cuda()` is replaced by one that does nothing."""
    x, weight = shape.x, shape.weight
    check_peer(str(folder))
    modules: dict[str, types.ModuleType] = {}
    for name in ("partial_fc_v2", "losses"):
        spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    if not x.is_cuda:
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    if not dist.is_initialized():
        dist.init_process_group("nccl" if x.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = modules["partial_fc_v2"].PartialFC_V2(
        modules["losses"].CosFace(64.0, 0.4), x.shape[1], dist.get_world_size(), shape.rate
    )
    module.num_local, module.num_sample, module.weight = len(weight), int(shape.rate * len(weight)), weight
    module.class_start = shape.rows[0]

    def step() -> Any:
        x.grad = weight.grad = None
        loss = module(x, shape.labels.clone())
        loss.backward()
        weight.grad = None
        return loss

    return step


def interleaved(
    steps: dict[str, Step], repeats: int, device: torch.device, *, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each step. The steps take turns."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + warm_up):
        for name, step in steps.items():
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                milliseconds = float(begin.elapsed_time(end))
            else:
                started = time.process_time()
                step()
                milliseconds = 1e3 * (time.process_time() - started)
            if turn or not warm_up:
                spent[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in spent.items()}


def extra_memory(step: Step, device: torch.device) -> float:
    """Peak MB of one step, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    # a first call, because libraries keep thread pools and kernels: only the step is to be measured
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    resident = forget_peak()
    step()
    return round(max(0.0, resident_mb("VmHWM") - resident), 1)


def forget_peak() -> float:
    """Resets the peak of `resident_mb("VmHWM")`, and returns the resident MB now.

    getrusage's peak cannot be reset, and is inherited from the parent.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def resident_mb(name: str) -> float:
    """This process's resident MB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
