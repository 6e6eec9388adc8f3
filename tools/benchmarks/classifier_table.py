"""The classifier's whole table in one command: times over batch, classes, sample rate and ranks; peak memory; cost per class to 8 million.

    python tools/benchmark.py classifier_table --peer PATH/recognition/arcface_torch --out tools/results/classifier

writes `OUT.json` and `OUT.md` in about 12 minutes on two free cores. How it measures: `classifier`. The longest cells are measured once, after the
short ones have warmed everything up; each row says how often.
"""

from __future__ import annotations

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.classifier.classes import Classes
from lvtrain.classifier.logsumexp import combine
from lvtrain.classifier.partition import class_range, initial_rows
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from tools.benchmarks.classifier import compared, in_children, interleaved, problem, variants

_DIM = 512
_REPEATS = {50_000: 4, 200_000: 2}  # beyond: 1
_PRECISIONS = ["float32", "bfloat16"]
_PEER_GB = 10  # at 800 thousand classes and 512 samples the peer needs that much


def run(
    classes: str = "50000,200000,800000",
    batches: str = "512,128",
    rates: str = "1.0,0.1",
    ranks: str = "1,2",
    scale: str = "50000,800000,8000000",
    peer: str = "",
    out: str = "",
) -> dict[str, Any]:
    """The table as a dict; with `out` also as OUT.json and OUT.md. `scale`: the classes of the table of cost per class, d = 128."""
    started = time.time()
    counts = [int(count) for count in classes.split(",") if count]
    result: dict[str, Any] = {"subject": "classifier", "machine": _machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    shapes = [{"batch": int(b), "rate": float(r)} for r in rates.split(",") for b in batches.split(",")]
    result["times"] = [
        row
        for world in ranks.split(",")
        for count in counts
        for row in in_children("classifier_table", {"classes": count, "shapes": shapes, "peer": peer}, function="cells", ranks=int(world))["rows"]
    ]
    result["memory"] = _memory(counts, peer)
    result["scale"] = in_children("classifier_table", {"classes": [int(c) for c in scale.split(",") if c]}, function="cost_per_class")["rows"]
    result["minutes"] = round((time.time() - started) / 60, 1)
    if out:
        Path(out).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        Path(out).with_suffix(".md").write_text(_markdown(result))
    return result


def cells(classes: int, shapes: list[dict[str, Any]], peer: str) -> dict[str, Any]:
    """The times of every shape (batch, rate) over one set of class rows, on one rank or, started with WORLD_SIZE 2, on each of two."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCHMARK_STORE']}", rank=rank, world_size=ranks)
    rows = class_range(classes, rank, ranks)
    weight = torch.nn.Parameter(initial_rows(rows, _DIM, 0))
    few = torch.nn.Parameter(weight.detach()[:4096].clone())
    found = []
    for shape in shapes:
        batch, rate = shape["batch"], shape["rate"]
        whole = rate == 1.0 and classes in _REPEATS and batch == max(s["batch"] for s in shapes) and ranks == 1
        free = torch.tensor(_available_gb())
        dist.all_reduce(free, op=dist.ReduceOp.MIN)  # the ranks must agree on whether the peer runs
        enough = float(free) > _PEER_GB * classes * batch * rate / (800_000 * 512)
        options: dict[str, Any] = dict(kept=whole, peer=peer if enough else "", two_anchors=whole and classes == min(_REPEATS))
        interleaved(variants(problem(batch, ranks * len(few), rate, few), _PRECISIONS, **options), 1, weight.device, warm_up=False)
        repeats = _REPEATS.get(classes, 1)
        measured = interleaved(variants(problem(batch, classes, rate, weight), _PRECISIONS, **options), repeats, weight.device, warm_up=repeats > 1)
        found.append({"ranks": ranks, "batch": batch, "classes": classes, "rate": rate, "repeats": repeats, "variants": compared(measured)})
        if peer and not enough:
            found[-1]["note"] = "the peer's memory was not free"
    dist.destroy_process_group()
    return {"rows": found}


def _memory(counts: list[int], peer: str) -> list[dict[str, Any]]:
    """MB beyond weights and the rows' gradient, each in a process of its own with malloc as it comes; B = 512."""
    wanted = [(count, f"lvtrain {precision}") for count in counts for precision in _PRECISIONS if precision == "float32" or count == min(counts)]
    wanted += [(min(counts), "materialised")]
    if peer:
        wanted += [(count, "peer") for count in sorted({min(counts), max(counts)}) if _available_gb() > 1.5 * _PEER_GB * count / 800_000]

    def alone(case: tuple[int, str]) -> dict[str, Any]:
        given = {"classes": case[0], "only": case[1], "peer": peer if case[1] == "peer" else ""}
        extra = in_children("classifier", given, malloc=False)["extra_mb"]
        gradient = case[0] * _DIM * 4 / 2**20
        return {"classes": case[0], "variant": case[1], "extra_mb": extra, "beyond_gradient_rows_mb": round(extra - gradient, 1)}

    with ThreadPoolExecutor(2) as two:  # memory is the same whoever else runs
        return list(two.map(alone, wanted))


def cost_per_class(classes: list[int]) -> dict[str, Any]:
    """Both passes over C classes, B = 256, d = 128, the rows' gradient handed on chunk by chunk and never stored."""
    torch.set_num_threads(1)
    batch, dim = 256, 128
    found = []
    for count in classes:
        x = F.normalize(torch.randn(batch, dim, generator=torch.Generator().manual_seed(0)))
        labels = torch.randint(0, count, (batch,), generator=torch.Generator().manual_seed(1))
        weight = initial_rows((0, count), dim, 0)
        row: dict[str, Any] = {"classes": count, "weights_mb": round(count * dim * 4 / 2**20)}
        for precision in _PRECISIONS:

            def step(weight: torch.Tensor = weight, x: torch.Tensor = x, labels: torch.Tensor = labels, precision: str = precision) -> None:
                rows = Classes(weight, 64.0, precision=precision)
                positions = rows.positions(labels, 0)
                cosine = (x * rows.unit_rows_at(positions)).sum(1)
                part = forward_pass(rows, x, positions, running=False, need_rows=True)
                (n,), (cosine,) = combine([part], [cosine], running=False, group=None)
                g = torch.sigmoid(n - 64 * (cosine - 0.4)) / batch
                weight_gradient_pass(rows, x, positions, n, g, -64 * g, lambda start, stop, gradient: None, running=False)

            repeats = 3 if count < 1_000_000 else 1
            milliseconds = interleaved({"step": step}, repeats, weight.device, warm_up=repeats > 1)["step"]
            row[precision] = {
                "ms": round(milliseconds, 1),
                "us_per_class": round(1e3 * milliseconds / count, 3),
            }
        found.append(row)
        del weight
    return {"rows": found}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in flags.split()]
    return {"cpu": model, "cores": os.cpu_count(), "instructions": known, "load_at_start": round(os.getloadavg()[0], 1)}


def _available_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))


def _goals(result: dict[str, Any]) -> list[str]:
    """Each goal with what was found: the range over the numbers of classes measured."""
    cells = [c["variants"] for c in result["times"] if c["ranks"] == 1 and c["batch"] == 512 and c["rate"] == 1.0]
    wanted = [(f"{v}: times its own matmuls", v, "times_own_matmuls", limit) for v, limit in (("lvtrain float32", 1.15), ("lvtrain bfloat16", 1.4))]
    wanted += [(f"{v}: times the peer", v, "times_peer", 0.85) for v in ("lvtrain float32", "lvtrain float32 kept")]
    wanted += [(f"{v}: times the peer", v, "times_peer", 0.45) for v in ("lvtrain bfloat16", "lvtrain bfloat16 kept")]
    wanted += [(f"{v}: times one anchor", v, "times_one_anchor", 2.1) for v in ("lvtrain float32 two anchors", "lvtrain bfloat16 two anchors")]
    found = [(goal, [c[name][key] for c in cells if key in c.get(name, {})], limit) for goal, name, key, limit in wanted]
    for name in (f"lvtrain {precision}" for precision in _PRECISIONS):
        extra = [row["beyond_gradient_rows_mb"] for row in result["memory"] if row["variant"] == name]
        found.append((f"{name}: MB beyond weights and the rows' gradient", extra, 40.0))
    lines = ["| goal | at most | found | reached |", "|---|---|---|---|"]
    for goal, values, limit in found:
        if values:
            spread = f"{min(values):.2f}" + (f" to {max(values):.2f}" if len(values) > 1 else "")
            reached = "yes" if max(values) <= limit else "no" if min(values) > limit else "in part"
            lines.append(f"| {goal} | {limit} | {spread} | {reached} |")
    costs = [row["float32"]["us_per_class"] for row in result["scale"]]
    flat = "yes" if costs[-1] <= 1.1 * costs[0] else "no"
    lines.append(f"| float32: cost per class with the most classes, over that with the fewest | flat | {costs[-1] / costs[0]:.2f} | {flat} |")
    return lines


def _markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    text = (Path(__file__).parent / "classifier_table.md").read_text()
    head = f"Machine: {machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['instructions'])}), no GPU, torch {result['torch']}, {result['date']}"
    head += f", load average at the start {machine['load_at_start']}, {result['minutes']} minutes."
    times = ["| ranks | B | classes | r | variant | ms | × own matmuls | × peer | × one anchor | turns |", "|---|---|---|---|---|---|---|---|---|---|"]
    for cell in result["times"]:
        for name, row in cell["variants"].items():
            ratios = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in ("times_own_matmuls", "times_peer", "times_one_anchor"))
            shape = f"{cell['ranks']} | {cell['batch']} | {cell['classes']:,} | {cell['rate']}"
            times.append(f"| {shape} | {name} | {row['ms']:,.0f} | {ratios} | {cell['repeats']} |")
    memory = ["| classes | variant | extra MB | beyond the rows' gradient |", "|---|---|---|---|"]
    memory += [f"| {m['classes']:,} | {m['variant']} | {m['extra_mb']:,.0f} | {m['beyond_gradient_rows_mb']:,.0f} |" for m in result["memory"]]
    scale = ["| classes | weights MB | float32 ms | µs per class | bfloat16 ms | µs per class |", "|---|---|---|---|---|---|"]
    for row in result["scale"]:
        wide, narrow = row["float32"], row["bfloat16"]
        first = f"| {row['classes']:,} | {row['weights_mb']:,} | {wide['ms']:,.0f} | {wide['us_per_class']:.2f} |"
        scale.append(f"{first} {narrow['ms']:,.0f} | {narrow['us_per_class']:.2f} |")
    for name, lines in (("MACHINE", [head]), ("GOALS", _goals(result)), ("TIMES", times), ("MEMORY", memory), ("SCALE", scale)):
        text = text.replace(f"<!-- {name} -->", "\n".join(lines))
    return text
