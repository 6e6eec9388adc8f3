"""The classifier's whole table in one command: times over batch, classes, sample rate and ranks; peak memory; cost per class.

    python tools/benchmark.py classifier_table --peer PATH/recognition/arcface_torch --out tools/results/classifier

It writes `OUT.json` and `OUT.md` after every part, in about 25 minutes on two free cores. `classifier` does the measuring.
The longest cells are measured once, after a first turn to warm up; each row says how often. A part that fails is listed in
the table, and the others continue.
"""

from __future__ import annotations

import json
import os
import platform
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.numerics import multiplies_bfloat16
from lvtrain.classifier.partition import class_range, initial_centres
from lvtrain.errors import UserError
from tools.benchmarks.apart import Step, forget_peak, in_children, interleaved, resident_mb
from tools.benchmarks.classifier import compared
from tools.benchmarks.classifier_peers import check_peer, partial_fc
from tools.benchmarks.classifier_variants import Problem, problem, variants

_DIM = 512
_REPEATS = {50_000: 4, 200_000: 2}  # beyond: 1
_PRECISIONS = ["float32", "bfloat16"]
_PEER_GB = 10  # memory of the peer at 800 thousand classes and 512 samples


def run(
    classes: str = "50000,200000,800000",
    batches: str = "512,128",
    rates: str = "1.0,0.1",
    ranks: str = "1,2",
    scale: str = "50000,800000,8000000",
    peer: str = "",
    out: str = "",
    minutes: float = 25.0,
) -> dict[str, Any]:
    """The table as a dict; with `out` also as OUT.json and OUT.md.

    scale: numbers of classes for the cost per class, d = 128. minutes: no part begins after this time.
    """
    check_peer(peer)
    started = time.time()
    counts = _numbers(classes)
    shapes = [{"batch": batch, "rate": float(rate)} for rate in rates.split(",") for batch in _numbers(batches)]
    result: dict[str, Any] = {
        "subject": "classifier",
        "machine": _machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    result |= {"times": [], "memory": [], "scale": [], "missing": []}

    def part(into: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            if time.time() - started > 60 * minutes:
                raise UserError(f"not begun within {minutes:g} minutes")
            result[into] += measure()["rows"]
        except Exception as error:  # whatever it is, the other parts continue
            result["missing"].append(f"{what}: {error}")
        result["minutes"] = round((time.time() - started) / 60, 1)
        if out:
            Path(out).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            Path(out).with_suffix(".md").write_text(_markdown(result))

    def times(world: int) -> None:
        for count in counts:
            part("times", f"{count:,} classes on {world} ranks", partial(_cells, count, shapes, peer, world))

    first, *others = _numbers(ranks)
    times(first)
    part("memory", "memory", partial(_memory, counts, peer, result["missing"]))
    for count in _numbers(scale):
        measure = partial(
            in_children, "classifier_table", {"classes": count}, function="whole_step", malloc=False, limit_s=600
        )
        part("scale", f"a step over {count:,} classes", measure)
    for world in others:
        times(world)
    return result


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _cells(classes: int, shapes: list[dict[str, Any]], peer: str, ranks: int) -> dict[str, Any]:
    """The times of every shape (batch, rate) with one set of class centres.

    All variants take turns in one process. If the peer does not fit into memory together with ours, each has its own
    process, one after the other.
    """
    apart = classes not in _REPEATS

    def measured(whose: str) -> list[dict[str, Any]]:
        if whose == "peer" and _available_gb() < _PEER_GB * classes * max(s["batch"] for s in shapes) / (800_000 * 512):
            raise UserError("the peer's memory is not free")
        arguments = {"classes": classes, "shapes": shapes, "peer": peer, "whose": whose}
        found: list[dict[str, Any]] = in_children(
            "classifier_table", arguments, function="cells", ranks=ranks, limit_s=900
        )["rows"]
        return found

    rows = measured("ours" if apart or not peer else "both")
    for row, other in zip(rows, measured("peer") if apart and peer else []):
        row["variants"] |= other["variants"]
    return {"rows": [row | {"variants": compared(row["variants"]), "apart": apart} for row in rows]}


def cells(classes: int, shapes: list[dict[str, Any]], peer: str, whose: str) -> dict[str, Any]:
    """Milliseconds of `ours`, the `peer` or `both`. Started with WORLD_SIZE 2, it measures on two ranks."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCHMARK_STORE']}", rank=rank, world_size=ranks)
    rows = class_range(classes, rank, ranks)
    weight = torch.nn.Parameter(initial_centres(rows, _DIM, 0))
    few = torch.nn.Parameter(weight.detach()[:4096].clone())
    precisions = [] if whose == "peer" else _PRECISIONS
    found = []
    for shape in shapes:
        batch, rate = shape["batch"], shape["rate"]
        two = rate == 1.0 and classes == min(_REPEATS) and batch == max(s["batch"] for s in shapes) and ranks == 1
        options: dict[str, Any] = dict(peer="" if whose == "ours" else peer, two_anchors=two)
        interleaved(
            _steps(problem(batch, ranks * len(few), rate, few), precisions, **options),
            1,
            weight.device,
            warm_up=False,
        )
        repeats = _REPEATS.get(classes, 1)
        steps = _steps(problem(batch, classes, rate, weight), precisions, **options)
        milliseconds = interleaved(steps, repeats, weight.device)
        found.append(
            {
                "ranks": ranks,
                "batch": batch,
                "classes": classes,
                "rate": rate,
                "repeats": repeats,
                "variants": milliseconds,
            }
        )
    dist.destroy_process_group()
    return {"rows": found}


def _steps(shape: Problem, precisions: list[str], peer: str, **options: Any) -> dict[str, Step]:
    steps = variants(shape, precisions, **options)
    return steps | ({"peer": partial_fc(Path(peer), shape)} if peer else {})


def _memory(counts: list[int], peer: str, missing: list[str]) -> dict[str, Any]:
    """MB beyond weights and the centres' gradient, each in a new process with malloc's defaults; B = 512."""
    ends = sorted({min(counts), max(counts)})
    wanted = [
        (count, f"lvtrain {precision}")
        for count in counts
        for precision in _PRECISIONS
        if precision == "float32" or count in ends
    ]
    wanted += [(min(counts), "materialised")]
    if peer:
        wanted += [(count, "peer") for count in ends if _available_gb() > 1.5 * _PEER_GB * count / 800_000]

    def alone(case: tuple[int, str]) -> list[dict[str, Any]]:
        count, variant = case
        try:
            extra = in_children(
                "classifier",
                {"classes": count, "only": variant, "peer": peer if variant == "peer" else ""},
                malloc=False,
            )["extra_mb"]
        except UserError as error:
            missing.append(f"memory of {variant} at {count:,} classes: {error}")
            return []
        return [
            {
                "classes": count,
                "variant": variant,
                "extra_mb": extra,
                "beyond_gradient_rows_mb": round(extra - count * _DIM * 4 / 2**20, 1),
            }
        ]

    with ThreadPoolExecutor(2) as two:  # memory does not depend on what else runs
        return {"rows": [row for rows in two.map(alone, wanted) for row in rows]}


def whole_step(classes: int) -> dict[str, Any]:
    """One training step with all C classes: forward, backward and AdamW; B = 256, d = 128, float32.

    The largest C is measured once, without warming up.
    """
    torch.set_num_threads(1)
    batch, dim = 256, 128
    state_gb = 4 * classes * dim * 4 / 2**30  # centres, two moments, gradient
    if _available_gb() < state_gb + 1:
        raise UserError(f"needs {state_gb + 1:.1f} GB, {_available_gb():.1f} are free")
    generator = torch.Generator().manual_seed(0)
    x, labels = (
        torch.randn(batch, dim, generator=generator).requires_grad_(),
        torch.randint(0, classes, (batch,), generator=generator),
    )
    head = ShardedClassifier(classes, dim, margin=CosFace())
    for tensor in (head.optimizer.state()["exp_avg"], head.optimizer.state()["exp_avg_sq"]):
        tensor.fill_(0.0)  # makes the system allocate the pages now

    def step() -> None:
        x.grad = None
        head.begin_step(0, labels)
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
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in flags.split()]
    load = round(os.getloadavg()[0], 1)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": known,
        "load_at_start": load,
        "multiplies_bfloat16": multiplies_bfloat16(),
    }


def _available_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))


def _goals(result: dict[str, Any]) -> list[str]:
    """Each goal and its result: the range over the measured numbers of classes."""
    cells = [c["variants"] for c in result["times"] if c["ranks"] == 1 and c["batch"] == 512 and c["rate"] == 1.0]
    limits = (("lvtrain float32", 1.15, 0.85), ("lvtrain bfloat16", 1.4, 0.45))
    wanted = [(f"{v}: times its own four matmuls", v, "times_4_matmuls", limit) for v, limit, _ in limits]
    wanted += [(f"{v}: times the peer", v, "times_peer", limit) for v, _, limit in limits]
    wanted += [
        (f"{v}: times one anchor", v, "times_one_anchor", 2.1)
        for v in ("lvtrain float32 two anchors", "lvtrain bfloat16 two anchors")
    ]
    found = [
        (goal, [c[name][key] for c in cells if key in c.get(name, {})], limit) for goal, name, key, limit in wanted
    ]
    for name in (f"lvtrain {precision}" for precision in _PRECISIONS):
        extra = [row["beyond_gradient_rows_mb"] for row in result["memory"] if row["variant"] == name]
        found.append((f"{name}: MB beyond weights and the centres' gradient", extra, 40.0))
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
    head = (
        f"Machine: {machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['instructions'])}), no GPU, torch "
        f"{result['torch']}, {result['date']}, load average at the start {machine['load_at_start']}, "
        f"{result['minutes']} minutes."
    )
    if not machine["multiplies_bfloat16"]:
        head += " This CPU has no bfloat16 instructions: `bfloat16` is rounded and multiplied in float32."
    times = [
        "| ranks | B | classes | r | variant | ms | × 4 matmuls | × 3 matmuls | × peer | × 1 anchor | turns |",
        "|---" * 11 + "|",
    ]
    for cell in result["times"]:
        for name, row in cell["variants"].items():
            keys = ("times_4_matmuls", "times_3_matmuls", "times_peer", "times_one_anchor")
            ratios = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in keys)
            shape = f"{cell['ranks']} | {cell['batch']} | {cell['classes']:,} | {cell['rate']}"
            times.append(
                f"| {shape} | {name} | {row['ms']:,.0f} | {ratios} | {cell['repeats']}{' *' if cell['apart'] else ''} |"
            )
    memory = ["| classes | variant | extra MB | beyond the centres' gradient |", "|---|---|---|---|"]
    memory += [
        f"| {m['classes']:,} | {m['variant']} | {m['extra_mb']:,.0f} | {m['beyond_gradient_rows_mb']:,.0f} |"
        for m in result["memory"]
    ]
    scale = [*textwrap.wrap(note, 100), ""] if (note := result.get("scale_note")) else []
    scale += ["| classes | weights MB | ms | µs per class | extra MB |", "|---|---|---|---|---|"]
    for row in result["scale"]:
        scale.append(
            f"| {row['classes']:,} | {row['weights_mb']:,} | {row['ms']:,.0f} | {row['us_per_class']:.2f} | {row['extra_mb']:,.0f} |"
        )
    missing = [f"- not measured: {line}" for line in result["missing"]] or ["Every part of the run was measured."]
    sections = {
        "MACHINE": textwrap.wrap(head, 100),
        "GOALS": _goals(result),
        "TIMES": times,
        "MEMORY": memory,
        "SCALE": scale,
        "MISSING": missing,
    }
    for name, lines in sections.items():
        text = text.replace(f"<!-- {name} -->", "\n".join(lines))
    return text
