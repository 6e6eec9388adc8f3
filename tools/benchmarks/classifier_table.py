"""The classifier's whole table in one command: times over batch, classes, sample rate and ranks; peak memory; cost per class to 8 million.

    python tools/benchmark.py classifier_table --peer PATH/recognition/arcface_torch --out tools/results/classifier

writes `OUT.json` and `OUT.md`, after every part anew, in about a quarter of an hour on two free cores. How it measures: `classifier`. The longest
cells are measured once, after the short ones have warmed everything up; each row says how often. A part that fails is named in the table, and the
others go on.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.classes import multiplies_bfloat16
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.partition import class_range, initial_rows
from lvtrain.errors import UserError
from tools.benchmarks.classifier import (
    check_peer,
    compared,
    forget_peak,
    in_children,
    interleaved,
    problem,
    resident_mb,
    variants,
)

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
    minutes: float = 15.0,
) -> dict[str, Any]:
    """The table as a dict; with `out` also as OUT.json and OUT.md. `scale`: the classes of the table of cost per class, d = 128.
    `minutes`: after these no further part begins."""
    check_peer(peer)
    started = time.time()
    counts = _numbers(classes)
    shapes = [{"batch": batch, "rate": float(rate)} for rate in rates.split(",") for batch in _numbers(batches)]
    result: dict[str, Any] = {"subject": "classifier", "machine": _machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    result |= {"times": [], "memory": [], "scale": [], "missing": []}

    def part(into: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            if time.time() - started > 60 * minutes:
                raise UserError(f"not begun within {minutes:g} minutes")
            result[into] += measure()["rows"]
        except Exception as error:  # whatever it is, the other parts go on
            result["missing"].append(f"{what}: {error}")
        result["minutes"] = round((time.time() - started) / 60, 1)
        if out:
            Path(out).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            Path(out).with_suffix(".md").write_text(_markdown(result))

    def times(world: int) -> None:
        for count in counts:
            arguments = {"classes": count, "shapes": shapes, "peer": peer}
            measure = partial(in_children, "classifier_table", arguments, function="cells", ranks=world, limit_s=600)
            part("times", f"{count:,} classes on {world} ranks", measure)

    first, *others = _numbers(ranks)
    times(first)
    part("memory", "memory", partial(_memory, counts, peer, result["missing"]))
    for count in _numbers(scale):
        measure = partial(in_children, "classifier_table", {"classes": count}, function="whole_step", malloc=False, limit_s=600)
        part("scale", f"a step over {count:,} classes", measure)
    for world in others:
        times(world)
    return result


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


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


def _memory(counts: list[int], peer: str, missing: list[str]) -> dict[str, Any]:
    """MB beyond weights and the rows' gradient, each in a process of its own with malloc as it comes; B = 512."""
    ends = sorted({min(counts), max(counts)})
    wanted = [(count, f"lvtrain {precision}") for count in counts for precision in _PRECISIONS if precision == "float32" or count in ends]
    wanted += [(min(counts), "materialised")]
    if peer:
        wanted += [(count, "peer") for count in ends if _available_gb() > 1.5 * _PEER_GB * count / 800_000]

    def alone(case: tuple[int, str]) -> list[dict[str, Any]]:
        count, variant = case
        try:
            extra = in_children("classifier", {"classes": count, "only": variant, "peer": peer if variant == "peer" else ""}, malloc=False)["extra_mb"]
        except UserError as error:
            missing.append(f"memory of {variant} at {count:,} classes: {error}")
            return []
        return [{"classes": count, "variant": variant, "extra_mb": extra, "beyond_gradient_rows_mb": round(extra - count * _DIM * 4 / 2**20, 1)}]

    with ThreadPoolExecutor(2) as two:  # memory is the same whoever else runs
        return {"rows": [row for rows in two.map(alone, wanted) for row in rows]}


def whole_step(classes: int) -> dict[str, Any]:
    """One training step over all C classes: forward, backward and AdamW applied in backward, so that no gradient of the rows exists; B = 256, d = 128,
    float32. The largest C is measured once, without a first step to warm up."""
    torch.set_num_threads(1)
    batch, dim = 256, 128
    state_gb = 3 * classes * dim * 4 / 2**30  # rows and two moments
    if _available_gb() < state_gb + 1:
        raise UserError(f"needs {state_gb + 1:.1f} GB, {_available_gb():.1f} are free")
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(batch, dim, generator=generator).requires_grad_(), torch.randint(0, classes, (batch,), generator=generator)
    head = ShardedClassifier(classes, dim, margin=CosFace(), in_backward=True)
    for tensor in (head.optimizer.state()["exp_avg"], head.optimizer.state()["exp_avg_sq"]):
        tensor.fill_(0.0)  # pages that were promised are there from now on

    def step() -> None:
        x.grad = None
        head.begin_step(0, labels, lr=1e-3)
        head(x, labels, step=0).loss.backward()
        head.end_step(lr=1e-3)

    before = forget_peak()
    repeats = 3 if classes < 1_000_000 else 1
    milliseconds = interleaved({"step": step}, repeats, torch.device("cpu"), warm_up=repeats > 1)["step"]
    row = {
        "classes": classes,
        "weights_mb": round(classes * dim * 4 / 2**20),
        "ms": round(milliseconds, 1),
        "us_per_class": round(1e3 * milliseconds / classes, 3),
        "extra_mb": round(max(0.0, resident_mb("VmHWM") - before), 1),
    }
    return {"rows": [row]}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in flags.split()]
    load = round(os.getloadavg()[0], 1)
    return {"cpu": model, "cores": os.cpu_count(), "instructions": known, "load_at_start": load, "multiplies_bfloat16": multiplies_bfloat16()}


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
    if costs := [row["us_per_class"] for row in result["scale"]]:
        ratio, few, many = costs[-1] / costs[0], result["scale"][0]["classes"], result["scale"][-1]["classes"]
        flat = "yes" if ratio <= 1.1 else "no"
        lines.append(f"| cost per class of a whole step, {many:,} classes over {few:,} | flat | {ratio:.2f} | {flat} |")
    return lines


def _markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    text = (Path(__file__).parent / "classifier_table.md").read_text()
    head = f"Machine: {machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['instructions'])}), no GPU, torch {result['torch']}, {result['date']}"
    head += f", load average at the start {machine['load_at_start']}, {result['minutes']} minutes."
    if not machine["multiplies_bfloat16"]:
        head += " This CPU has no bfloat16 instructions: `bfloat16` is rounded and multiplied in float32, and so are its own matmuls."
    times = ["| ranks | B | classes | r | variant | ms | × own matmuls | × peer | × one anchor | turns |", "|---|---|---|---|---|---|---|---|---|---|"]
    for cell in result["times"]:
        for name, row in cell["variants"].items():
            ratios = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in ("times_own_matmuls", "times_peer", "times_one_anchor"))
            shape = f"{cell['ranks']} | {cell['batch']} | {cell['classes']:,} | {cell['rate']}"
            times.append(f"| {shape} | {name} | {row['ms']:,.0f} | {ratios} | {cell['repeats']} |")
    memory = ["| classes | variant | extra MB | beyond the rows' gradient |", "|---|---|---|---|"]
    memory += [f"| {m['classes']:,} | {m['variant']} | {m['extra_mb']:,.0f} | {m['beyond_gradient_rows_mb']:,.0f} |" for m in result["memory"]]
    scale = ["| classes | weights MB | ms | µs per class | extra MB |", "|---|---|---|---|---|"]
    for row in result["scale"]:
        scale.append(f"| {row['classes']:,} | {row['weights_mb']:,} | {row['ms']:,.0f} | {row['us_per_class']:.2f} | {row['extra_mb']:,.0f} |")
    missing = [f"* not measured: {line}" for line in result["missing"]] or ["Everything asked for was measured."]
    sections = {"MACHINE": [head], "GOALS": _goals(result), "TIMES": times, "MEMORY": memory, "SCALE": scale, "MISSING": missing}
    for name, lines in sections.items():
        text = text.replace(f"<!-- {name} -->", "\n".join(lines))
    return text
