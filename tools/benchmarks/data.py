"""CPU time per image from a shard to a float32 batch, our path next to others; memory over epochs; index and order.

    python tools/benchmark.py data --out tools/results/data

It writes `OUT.json` and `OUT.md` in about 8 minutes on two free cores. Index and order are measured at 42.5 and 260 million
samples. CPU time is user and system time of the process with all its threads, which other load on the machine affects
least; wall time is given, too.

Every path ends in a float32 [batch, 3, 112, 112] tensor of randomly mirrored images. Exceptions are those named
`decode_only`, and `lvtrain_torch_host_of_gpu`, which ends in bytes that a GPU turns into floats.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.data.index import RECORD, IndexWriter
from lvtrain.datasets.shard_writer import ShardWriter
from tools.benchmarks.data_paths import paths as all_paths

SMALL = {"images": 512, "batch": 64, "batches": 4, "repeats": 1, "large": "1000000", "epochs": 2}
# the page has all three, and says which of them meets a goal
OURS = ("lvtrain_dali", "lvtrain_torch", "lvtrain_torch_host_of_gpu")
GOALS = {"dali_webdataset_reader": 1.0, "decode_only_simplejpeg": 1.5, "dataloader_pillow": 0.25}


def run(
    images: int = 4000,
    batch: int = 128,
    batches: int = 40,
    threads: int = 2,
    repeats: int = 15,
    epochs: int = 40,
    large: str = "42474557,260890076",
    only: str = "",
    out: str = "",
) -> dict[str, Any]:
    """Microseconds per image (medians of `repeats` interleaved rounds), memory over `epochs`, and times of index and order.

    With `out` also as OUT.json and OUT.md.
    """
    torch.set_num_threads(1)
    load = [round(value, 1) for value in os.getloadavg()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = make_images(folder / "data", images)
        paths = all_paths(folder / "data", batch, threads)
        paths = {path: opened for path, opened in paths.items() if not only or path in only.split(",")}
        rounds: dict[str, list[tuple[float, float]]] = {path: [] for path in paths}
        for _ in range(repeats):
            for path, open_path in paths.items():
                rounds[path].append(_measure(open_path, batch, batches))
        memory = _memory_over_epochs(folder / "data", batch, threads, epochs) if epochs else {}
        sizes = {size: _large(folder / "large", int(size)) for size in large.split(",") if size}
    table = {
        path: {
            "cpu_us_per_image": round(statistics.median(cpu for cpu, _ in values), 1),
            "wall_us_per_image": round(statistics.median(wall for _, wall in values), 1),
        }
        for path, values in rounds.items()
    }
    ratios = {
        f"{ours} / {path}": round(table[ours]["cpu_us_per_image"] / row["cpu_us_per_image"], 2)
        for ours in OURS
        for path, row in table.items()
        if ours in table
    }
    result = {
        "images": images,
        "jpeg_bytes_mean": round(stored / images),
        "batch": batch,
        "batches": batches,
        "threads": threads,
        "repeats": repeats,
        "epochs": epochs,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average_at_start": load,
        "paths": table,
        "ratios": ratios,
        "memory_over_epochs": memory,
        "index_and_order": sizes,
    }
    if out:
        Path(out).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        Path(out).with_suffix(".md").write_text(_markdown(result))
    return result


def make_images(folder: Path, images: int) -> int:
    """Writes four shards of textured 112x112 JPEGs, quality 95, as large as aligned faces (4.7 KB). Returns their bytes."""
    from PIL import Image

    writer, stored = IndexWriter(folder), 0
    for number, part in enumerate(np.array_split(np.arange(images), 4)):
        with ShardWriter(folder, f"shards/{number:06d}.tar") as shard:
            for sample in part.tolist():
                rng = np.random.default_rng(sample)
                low = Image.fromarray(rng.integers(70, 190, (12, 12, 3)).astype(np.uint8))
                pixels = np.asarray(low.resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
                out = io.BytesIO()
                noisy = np.clip(pixels + rng.normal(0, 1.5, (112, 112, 1)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(out, "JPEG", quality=95)
                shard.add(f"{sample:09d}", out.getvalue(), sample % 100)
                stored += len(out.getvalue())
        made = shard.written
        writer.add_shard(made.name, made.size, made.sha256, made.offsets, made.lengths, made.labels)
    writer.close([str(label) for label in range(100)])
    return stored


def _measure(
    open_path: Callable[[], tuple[Callable[[], Any], Callable[[], None]]], batch: int, batches: int
) -> tuple[float, float]:
    step, close = open_path()
    for _ in range(4):
        step()
    cpu, wall = _cpu(), time.perf_counter()
    for _ in range(batches):
        step()
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    close()
    return cpu / batches / batch * 1e6, wall / batches / batch * 1e6


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


_EPOCHS = """
import ctypes, json, sys, torch
from lvtrain.data import Loader, ShardDataset
torch.set_num_threads(1)
class Heap(ctypes.Structure):
  _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
def resident(): return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
def allocated(): heap = libc.mallinfo2(); return (heap.uordblks + heap.hblkhd) / 2**20
folder, augmentation, backend, batch, threads, epochs = *sys.argv[1:4], *map(int, sys.argv[4:7])
dataset, found = ShardDataset(folder), {}
with Loader(dataset, seed=0, micro_batch=batch, micro_batches=1, block=256, threads=threads, augmentation=augmentation, backend=backend) as loader:
  for epoch in range(1, epochs + 1):
    for _ in range(len(dataset) // batch): next(loader)
    if epoch in (2, 5, 10, 20, 40) or epoch == epochs: found[epoch] = {"resident": round(resident(), 1), "allocated": round(allocated(), 1)}
print(json.dumps(found))
"""


def _memory_over_epochs(folder: Path, batch: int, threads: int, epochs: int) -> dict[str, dict[str, dict[str, float]]]:
    """MiB of a new process, by augmentation and backend, and by epoch: resident, and allocated.

    The difference are free blocks that malloc keeps.
    """
    found = {}
    for augmentation, backend in itertools.product(("flip", "strong"), ("dali", "torch")):
        argv = [
            sys.executable,
            "-c",
            _EPOCHS,
            str(folder),
            augmentation,
            backend,
            str(batch),
            str(threads),
            str(epochs),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        found[f"{augmentation}, {backend}"] = json.loads(done.stdout)
    return found


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


_OPEN = """
import json, sys, time
import numpy as np
from lvtrain.data import SampleOrder, ShardDataset
def resident(): return {l.split(":")[0]: int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(("VmRSS", "RssAnon"))}
SampleOrder(10, 0, 4).at(range(10))
before, started = resident(), time.perf_counter()
dataset = ShardDataset(sys.argv[1])
opened, after = time.perf_counter() - started, resident()
order = SampleOrder(len(dataset), 0, 4096)
for step in range(50): dataset.records(order.at(range(step * 512, step * 512 + 512)))
read = resident()
cpu = time.process_time()
order.at(range(10**9, 10**9 + 5_000_000))
cpu = time.process_time() - cpu
print(json.dumps({"open_seconds": round(opened, 4), "open_mb": round(after["VmRSS"] - before["VmRSS"], 1),
  "process_mb_after_reading_50_batches": round(read["VmRSS"], 1), "of_it_private_mb": round(read["RssAnon"], 1),
  "order_million_positions_per_cpu_second": round(5 / cpu, 1)}))
"""


def _large(folder: Path, samples: int) -> dict[str, Any]:
    """Measures a generated index of `samples` in shards of 10,000. Its tars are sparse files of the right size."""
    per_shard, length = 10_000, 4700
    folder = folder.with_name(f"{folder.name}_{samples}")
    (folder / "shards").mkdir(parents=True)
    writer = IndexWriter(folder)
    offsets = np.arange(per_shard, dtype=np.uint64) * 6656 + 512
    for number, start in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - start)
        name, size = f"shards/{number:06d}.tar", count * 6656 + 10_240
        with open(folder / name, "wb") as file:
            file.truncate(size)
        labels = np.arange(start, start + count) * 2_000_000 // samples
        writer.add_shard(name, size, "0" * 64, offsets[:count], np.full(count, length), labels)
    writer.close([str(label) for label in range(2_000_000)])
    code = subprocess.run([sys.executable, "-c", _OPEN, str(folder)], capture_output=True, text=True, check=True)
    index = (folder / "index.bin").stat().st_size
    (folder / "index.bin").unlink()
    return {"index_gib": round(index / 2**30, 3), "bytes_a_sample": RECORD.itemsize, **json.loads(code.stdout)}


def _markdown(result: dict[str, Any]) -> str:
    head = (
        f"Measured on {result['date']} with {result['cores']} cores of an {result['cpu']}, load average "
        f"{result['load_average_at_start'][0]} at the start. 112x112 JPEG of quality 95, {result['jpeg_bytes_mean']} bytes "
        f"on average, batch {result['batch']}, {result['threads']} threads, medians of {result['repeats']} interleaved "
        f"rounds of {result['batches']} batches."
    )
    lines = [
        "# Data path on a CPU",
        "",
        "```",
        f"python tools/benchmark.py data --repeats {result['repeats']} --epochs {result['epochs']} --out tools/results/data",
        "```",
        "",
        *textwrap.wrap(head, 100),
        "",
        "Every path makes float32 batches of randomly mirrored images, with two exceptions:",
        "",
        "- `decode_only_*` only decode, on as many threads as lvtrain.",
        "- `lvtrain_torch_host_of_gpu` is the host's part of lvtrain's path for a GPU without DALI. It gives",
        "  bytes, which the GPU converts to floats.",
        "",
        "torch's DataLoader runs without worker processes, so their cost is not counted.",
        "",
        "The columns DALI, torch and torch, GPU have lvtrain's CPU time divided by that of the path: with",
        "DALI, with torch, and with torch for a GPU. The goal is the largest such ratio that we accept; the",
        "last number says how many of the three meet it.",
        "",
        "| path | CPU µs an image | wall µs | DALI | torch | torch, GPU | goal, met by |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, row in sorted(result["paths"].items(), key=lambda item: item[1]["cpu_us_per_image"]):
        ratios = {ours: result["ratios"].get(f"{ours} / {path}") for ours in OURS}
        goal = ""
        if path in GOALS:
            meeting = sum(ratio is not None and ratio <= GOALS[path] for ratio in ratios.values())
            goal = f"{GOALS[path]}, {meeting} of {len(ratios)}"
        cells = " | ".join("" if ratio is None else str(ratio) for ratio in ratios.values())
        lines.append(f"| {path} | {row['cpu_us_per_image']} | {row['wall_us_per_image']} | {cells} | {goal} |")
    if memory := result["memory_over_epochs"]:
        epochs = list(next(iter(memory.values())))
        lines += [
            "",
            "Memory of a process with lvtrain's path, MiB: resident, and in brackets the allocated part. A leak",
            "would show in the allocated part. The rest is libraries, and freed blocks that malloc keeps.",
            "",
            "| set | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |",
            "|---" * (1 + len(epochs)) + "|",
        ]
        for augmentation, row in memory.items():
            figures = [f"{row[epoch]['resident']:.0f} ({row[epoch]['allocated']:.0f})" for epoch in epochs]
            lines.append(f"| {augmentation} | " + " | ".join(figures) + " |")
    lines += [
        "",
        "Index and order of generated datasets. Shards have 10,000 images and are sparse files. Opening",
        "checks the size of each. *Process MB* is after 50 batches, in brackets the private part. *Order* is",
        "million positions a CPU second.",
        "",
        "| samples | index GiB | bytes a sample | open s | open MB | process MB | order |",
        "|---|---|---|---|---|---|---|",
    ]
    for samples, row in result["index_and_order"].items():
        lines.append(
            f"| {int(samples):,} | {row['index_gib']} | {row['bytes_a_sample']} | {row['open_seconds']} | {row['open_mb']} | "
            f"{row['process_mb_after_reading_50_batches']} ({row['of_it_private_mb']}) | {row['order_million_positions_per_cpu_second']} |"
        )
    return "\n".join(lines) + "\n"
