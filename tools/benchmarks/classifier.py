"""The classifier's forward and backward: time, memory, and the ratio to its matmuls, to stored logits and to arcface_torch.

    python tools/benchmark.py classifier --batch 512 --classes 50000 --peer PATH/recognition/arcface_torch
    python tools/benchmark.py classifier --device cuda --batch 24576 --classes 32186 --precisions half,tf32 --kernels torch,triton --kept
    python tools/benchmark.py classifier --device cuda --batch 1024 --classes 2059906 --precisions half,tf32 --kernels torch,triton --no-materialised

Variants take turns in one process, and medians are compared. On a CPU the time is process CPU time with one thread, and
malloc keeps freed memory (otherwise the variant that allocates most pays for page faults). Memory is measured in a
separate process for each variant, with malloc's defaults. `classifier_table` runs a whole grid of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvtrain.classifier.numerics import chunk_size
from lvtrain.classifier.partition import initial_centres
from tools.benchmarks.apart import extra_memory, in_children, interleaved, keeps_freed_memory
from tools.benchmarks.classifier_peers import check_peer, liger, partial_fc, why_no_liger
from tools.benchmarks.classifier_variants import problem, variants

SMALL: dict[str, Any] = {"batch": 128, "classes": 2_000, "repeats": 2, "memory": False}


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
    an arcface_torch checkout, to time its PartialFC_V2. only: measure the peak memory of this variant only. Liger's loss
    is timed, too, where liger-kernel is installed; "skipped" says why not.
    """
    given = dict(locals())
    check_peer(peer)
    if device == "cpu" and not only and not keeps_freed_memory():
        return in_children("classifier", given, threads=threads)  # malloc reads its settings when a process starts
    torch.set_num_threads(threads)
    weight = torch.nn.Parameter(initial_centres((0, classes), dim, 0).to(device))
    shape = problem(batch, classes, rate, weight)
    found = variants(shape, precisions.split(","), kernels.split(","), chunk, materialised, two_anchors, kept)
    if peer:
        found["peer"] = partial_fc(Path(peer), shape)
    if not (no_liger := why_no_liger(shape)):
        found["liger bfloat16"] = liger(shape)
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
        **({"skipped": {"liger": no_liger}} if no_liger else {}),
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
