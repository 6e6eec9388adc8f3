"""Time and memory of all-pairs TAR at FAR on generated embeddings, and an estimate for a larger set."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch

from lvtrain.evaluation.allpairs import all_pairs

SMALL = {"images": 4000, "dim": 64}


def run(
    images: int = 200_000,
    dim: int = 512,
    per_identity: int = 8,
    tile: int = 8192,
    device: str = "cpu",
    larger: int = 1_600_000,
) -> dict[str, Any]:
    """Seconds and peak resident memory (GB) of TAR at FAR over all pairs, and the estimate for `larger` images.

    Time grows with the square of `images`, memory with their number. `cpu_seconds` does not depend on other load on the
    machine.
    """
    generator = np.random.default_rng(0)
    labels = np.arange(images) // per_identity
    embeddings = generator.standard_normal((images, dim), dtype=np.float32)
    centres = generator.standard_normal((labels[-1] + 1, dim), dtype=np.float32)
    for start in range(0, images, 65536):
        embeddings[start : start + 65536] += 0.7 * centres[labels[start : start + 65536]]
    before = _peak_gb()
    started, cpu_started = time.perf_counter(), time.process_time()
    result = all_pairs(embeddings, labels, tile=tile, device=device)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    pairs = images * (images - 1) / 2
    return {
        "images": images,
        "dim": dim,
        "tile": tile,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "million_pairs_per_second": round(pairs / seconds / 1e6, 1),
        "embeddings_gb": round(embeddings.nbytes / 1e9, 3),
        "peak_gb_before": round(before, 3),
        "peak_gb": round(_peak_gb(), 3),
        "larger": larger,
        "larger_seconds_estimated": round(seconds * (larger / images) ** 2),
        "larger_cpu_seconds_estimated": round(cpu_seconds * (larger / images) ** 2),
        "larger_gb_estimated": round(2 * larger * dim * 4 / 1e9 + (_peak_gb() - 2 * embeddings.nbytes / 1e9), 2),
        "tar_at_far": result["tar_at_far"],
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
