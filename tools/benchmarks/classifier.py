"""The classifier's forward and backward: time, memory and the share of its own four matmuls, against storing the logits.

    python tools/benchmark.py classifier --batch 512 --classes 200000                      # this machine
    python tools/benchmark.py classifier --classes 50000 --peer PATH/recognition/arcface_torch
    python tools/benchmark.py classifier --table                                           # cost per class to 8 million
    python tools/benchmark.py classifier --device cuda --batch 24576 --classes 32186 --precisions half,tf32 --kernels torch,triton
    python tools/benchmark.py classifier --device cuda --batch 1024 --classes 2059906 --precisions half,tf32 --kernels torch,triton

Variants take turns in one process and medians are compared. On a CPU the time is process CPU time with one thread and malloc keeps what it freed
(otherwise whoever allocates most also pays the page faults); memory is measured in a process of its own each, with malloc as it comes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.classes import Classes, chunk_size, matmul_precision
from lvtrain.classifier.logsumexp import combine
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.partition import initial_rows
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.errors import UserError

SMALL: dict[str, Any] = {"batch": 128, "classes": 10_000, "repeats": 2, "memory": False}
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}

Step = Callable[[], Any]


def run(
    batch: int = 512,
    classes: int = 50_000,
    dim: int = 512,
    rate: float = 1.0,
    precisions: str = "float32,half,bfloat16",
    kernels: str = "torch",
    chunk: int = 0,
    peer: str = "",
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
    memory: bool = True,
    materialised: bool = True,
    two_anchors: bool = False,
    table: bool = False,
    table_classes: str = "50000,200000,800000,2000000,8000000",
    only: str = "",
) -> dict[str, Any]:
    """Milliseconds (CPU time on a CPU) of forward + backward without optimizer; extra MB beyond weights and the rows' gradient.

    `peer`: folder of an arcface_torch checkout, to time its PartialFC_V2 as well. `table`: cost per class from 50 thousand to 8 million at d = 128.
    `only`: one variant, its peak memory alone (what the memory measurement starts in a process of its own)."""
    if device == "cpu" and not only and os.environ.get("MALLOC_MMAP_THRESHOLD_") != _MALLOC["MALLOC_MMAP_THRESHOLD_"]:
        arguments = {key: value for key, value in locals().items()}  # malloc reads its settings at start-up: once more, with them
        return _in_child(arguments, {**os.environ, **_MALLOC, "OMP_NUM_THREADS": str(threads)})
    torch.set_num_threads(threads)
    place = torch.device(device)
    if table:
        rows = _table(place, repeats, [int(count) for count in table_classes.split(",")])
        return {"subject": "classifier, cost per class", "device": _name(place), "batch": 256, "dim": 128, "rows": rows}
    variants = _variants(batch, classes, dim, rate, precisions.split(","), kernels.split(","), chunk, peer, place, materialised, two_anchors)
    if only:
        return {"extra_mb": _extra_memory(variants[only], place)}
    milliseconds = _interleaved(variants, repeats, place)
    result: dict[str, Any] = {
        "subject": "classifier",
        "device": _name(place),
        "threads": threads,
        "torch": torch.__version__,
        "batch": batch,
        "classes": classes,
        "dim": dim,
        "rate": rate,
        "chunk": chunk_size(batch, dim, classes, chunk or None, place),
        "weights_mb": round(classes * dim * 4 / 2**20),
        "gradient_rows_mb": round(classes * rate * dim * 4 / 2**20),
        "variants": {},
    }
    for name, value in milliseconds.items():
        row: dict[str, Any] = {"ms": round(value, 2)}
        bound = milliseconds.get(f"matmuls {name.split()[1]}") if name.startswith("lvtrain") else None
        if bound:
            row["times_own_matmuls"] = round(value / bound, 3)
        if "peer" in milliseconds and not name.startswith("matmuls"):
            row["times_peer"] = round(value / milliseconds["peer"], 3)
        if memory and not name.startswith("matmuls"):
            wanted = dict(batch=batch, classes=classes, dim=dim, rate=rate, precisions=precisions, kernels=kernels, chunk=chunk, peer=peer)
            wanted.update(threads=threads, device=device, materialised=materialised, two_anchors=two_anchors, only=name)
            row["extra_mb"] = _in_child(wanted, {**os.environ, "OMP_NUM_THREADS": str(threads)})["extra_mb"]
            row["extra_mb_beyond_gradient_rows"] = round(row["extra_mb"] - classes * rate * dim * 4 / 2**20, 1)
        result["variants"][name] = row
    return result


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _in_child(arguments: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    code = "import json, sys; from tools.benchmarks.classifier import run; print('RESULT ' + json.dumps(run(**json.loads(sys.argv[1]))))"
    root = str(Path(__file__).resolve().parents[2])
    for name in _MALLOC:
        if arguments.get("only"):
            environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], env=environment, cwd=root, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise UserError(f"the benchmark's process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(lines[-1][len("RESULT ") :])


def _variants(
    batch: int,
    classes: int,
    dim: int,
    rate: float,
    precisions: list[str],
    kernels: list[str],
    chunk: int,
    peer: str,
    device: torch.device,
    materialised: bool,
    two_anchors: bool,
) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, classes, (batch,), generator=generator)
    weight = torch.nn.Parameter(initial_rows((0, classes), dim, 0).to(device))
    variants: dict[str, Step] = {}
    for precision in precisions:
        for kernel in kernels:
            for anchors in ["", " two anchors"] if two_anchors else [""]:
                name = f"lvtrain {precision}" + ("" if kernel == "torch" else f" {kernel}") + anchors
                variants[name] = _ours(x, labels, weight, rate, precision, kernel, chunk, anchors != "")
        variants[f"matmuls {precision}"] = _matmuls(x, weight, rate, precision, chunk)
    if materialised and rate == 1.0:
        variants["materialised"] = _materialised(x, labels, weight)
    if peer:
        variants["peer"] = _peer(Path(peer), x, labels, weight, rate)
    return variants


def _ours(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.nn.Parameter, rate: float, precision: Any, kernel: Any, chunk: int, two: bool
) -> Step:
    settings = dict(precision=precision, chunk=chunk or None, kernel=kernel, device=x.device)
    head = ShardedClassifier(1, x.shape[1], margin=CosFace(), expectation_margin=CosFace(), **settings)
    # the same weight for all variants: the head's own would not fit several times
    head.num_classes, head.rows, head.weight = len(weight), (0, len(weight)), weight
    head.enter_phase(sample_rate=rate, expectation="frozen" if two else "off")
    on_device = labels.to(x.device)

    def step() -> Any:
        x.grad = None
        head.begin_step(0, labels)
        loss = head(x, on_device, step=0).loss
        loss.backward()
        head.discard_step()
        return loss

    return step


def _matmuls(x: torch.Tensor, weight: torch.Tensor, rate: float, precision: str, chunk: int) -> Step:
    """The four matmuls, nothing else, same chunks, same number formats, the rows' gradient written where the classifier writes it."""
    count = round(len(weight) * rate)
    size = chunk_size(len(x), x.shape[1], count, chunk or None, x.device)
    left = F.normalize(x.detach())
    native = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(precision) if x.is_cuda else None
    rows = F.normalize(weight.detach()[:count])
    if native:
        left, rows = left.to(native), rows.to(native)

    def step() -> Any:
        gradient = weight.new_empty(count, weight.shape[1])
        total = torch.zeros_like(x)
        buffer = x.new_empty(len(x) * size, dtype=torch.float32)
        probability = None if native is None else torch.zeros(len(x) * size, dtype=native, device=x.device)
        with matmul_precision(precision, x.device):
            for backward in (False, True):
                for start in range(0, count, size):
                    part = rows[start : start + size]
                    logits = buffer[: len(x) * len(part)].view(len(x), len(part))
                    if native is not None and probability is not None:
                        torch.mm(left, part.t(), out_dtype=torch.float32, out=logits)
                        p = probability[: len(x) * len(part)].view(len(x), len(part))
                        if backward:
                            torch.mm(p.t(), left, out_dtype=torch.float32, out=gradient[start : start + size])
                        else:
                            total += torch.mm(p, part, out_dtype=torch.float32)
                    else:
                        torch.mm(left, part.t(), out=logits)
                        if backward:
                            torch.mm(logits.t(), left, out=gradient[start : start + size])
                        else:
                            total.addmm_(logits, part)
        return total

    return step


def _materialised(x: torch.Tensor, labels: torch.Tensor, weight: torch.nn.Parameter) -> Step:
    labels = labels.to(x.device)

    def step() -> Any:
        x.grad = weight.grad = None
        cosine = F.linear(F.normalize(x), F.normalize(weight))
        loss = F.cross_entropy(64.0 * (cosine - 0.4 * F.one_hot(labels, len(weight)).to(cosine.dtype)), labels)
        loss.backward()
        weight.grad = None
        return loss

    return step


def _peer(folder: Path, x: torch.Tensor, labels: torch.Tensor, weight: torch.nn.Parameter, rate: float) -> Step:
    """PartialFC_V2 of an arcface_torch checkout, on a CPU with `.cuda()` made to do nothing."""
    if not (folder / "partial_fc_v2.py").exists():
        raise UserError(f"--peer {folder}: no partial_fc_v2.py there; give the recognition/arcface_torch folder of an insightface checkout")
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
    module = modules["partial_fc_v2"].PartialFC_V2(modules["losses"].CosFace(64.0, 0.4), x.shape[1], 1, rate)
    module.num_local, module.num_sample, module.weight = len(weight), int(rate * len(weight)), weight

    def step() -> Any:
        x.grad = weight.grad = None
        loss = module(x, labels.clone().to(x.device))
        loss.backward()
        weight.grad = None
        return loss

    return step


def _interleaved(variants: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, step in variants.items():
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                milliseconds = begin.elapsed_time(end)
            else:
                started = time.process_time()
                step()
                milliseconds = 1e3 * (time.process_time() - started)
            if turn:
                spent[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in spent.items()}


def _extra_memory(step: Step, device: torch.device) -> float:
    """Peak MB of one step above what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    # warm up on what libraries keep for good (thread pools, oneDNN kernels), so that only the step is seen
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    before = _resident_mb()
    step()
    return round(max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before), 1)


def _resident_mb() -> float:
    # the peak so far must be the present size, or an earlier, higher peak would hide the step's
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return max(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _table(device: torch.device, repeats: int, counts: list[int]) -> list[dict[str, Any]]:
    """Both passes over C classes, the rows' gradient handed on chunk by chunk and never stored: nanoseconds per class and sample."""
    batch, dim = 256, 128
    found = []
    for count in counts:
        x = F.normalize(torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))).to(device)
        labels = torch.randint(0, count, (batch,), generator=torch.Generator().manual_seed(1)).to(device)
        weight = initial_rows((0, count), dim, 0).to(device)
        row: dict[str, Any] = {"classes": count, "weights_mb": round(count * dim * 4 / 2**20)}
        for precision in ("float32", "bfloat16"):

            def step(weight: torch.Tensor = weight, x: torch.Tensor = x, labels: torch.Tensor = labels, precision: str = precision) -> None:
                classes = Classes(weight, 64.0, precision=precision)
                positions = classes.positions(labels, 0)
                cosine = (x * classes.unit_rows_at(positions)).sum(1)
                part = forward_pass(classes, x, positions, running=False, need_rows=True)
                (n,), (cosine,) = combine([part], [cosine], running=False, group=None)
                g = torch.sigmoid(n - 64 * (cosine - 0.4)) / batch
                weight_gradient_pass(classes, x, positions, n, g, -64 * g, lambda start, stop, gradient: None, running=False)

            before = _resident_mb()
            milliseconds = _interleaved({"step": step}, 1 if count > 1_000_000 else repeats, device)["step"]
            row[f"{precision}_ms"] = round(milliseconds, 1)
            row[f"{precision}_us_per_class"] = round(1e3 * milliseconds / count, 4)
            row[f"{precision}_extra_mb"] = round(max(0.0, _resident_mb() - before), 1)
        found.append(row)
        del weight
    return found
