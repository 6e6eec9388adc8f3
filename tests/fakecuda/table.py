"""What one step of rank 0 asks of the host, by recipe, batch and number of GPUs: tools/results/cuda_host.{json,md}.

python -m tests.fakecuda.table [--only NAME] [--out tools/results/cuda_host]

A case takes a minute or two and some gigabytes. `--only` measures again what contains NAME, and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakecuda.device import FakeDevice
from tests.fakecuda.planned import planned_bytes
from tests.fakecuda.step import Case, measure

COLUMNS = ("launches", "products", "collectives", "waits", "pageable", "mallocs")
PARTS = ("begin", "forward", "loss", "backward", "update", "end")


def cases() -> Iterator[Case]:
    """ViT-B, L and H on WebFace42M, all classes and both anchors, on 8 and 64 GPUs, with PCO's two batches."""
    for network in ("vit_b", "vit_l", "vit_h"):
        for ranks in (64, 8):
            for phase in ("refinement", "refinement_small_batch"):
                for kernel in ("torch", "triton") if (network, ranks) == ("vit_l", 64) else ("triton",):
                    recipe = "pco_vith_webface42m" if network == "vit_h" else "pco_vitl_webface42m"
                    changes = (f"backbone.name={network}", f"classifier.numerics.kernel={kernel}")
                    batch = "batch 8,192" if phase.endswith("small_batch") else "batch 24,576"
                    name = f"{network}, {ranks} GPUs, {batch}, {kernel}"
                    yield Case(name, ranks, phase, recipe, changes)


def row(device: FakeDevice, case: Case, folder: Path) -> dict[str, Any]:
    """The counts of each part, and gigabytes."""
    found = measure(device, case, folder)
    parts = {
        part: {column: found.parts.get(part, {}).get(column, 0) for column in COLUMNS}
        | {"peak_gb": round(found.peaks[part] / 1e9, 2)}
        for part in PARTS
    }
    return {"parts": parts, "states_gb": round(found.states / 1e9, 3)}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# What does one step ask of the host, and of a GPU's memory?",
        "",
        "`python -m tests.fakecuda.table` runs steps of rank 0 on a",
        "[simulated H200](../../tests/fakecuda/README.md) whose kernels do nothing. The step is one of PCO's",
        "third phase, with class centres and feature expectations over all 2,059,906 classes, under ZeRO-1,",
        "with an eager backbone. The counts are of the fourth step. No figure is a time.",
        "`tests/test_cuda_step.py` fails if a step exceeds these counts.",
        "",
        "The simulated GPU has no cuDNN, so the patch convolution has one launch for each image.",
        "",
        "## Launches of kernels and matrix products",
        "",
        *_table(rows, lambda part: f"{part['launches']:,} + {part['products']:,}"),
        "",
        "## Collectives (NCCL calls)",
        "",
        *_table(rows, lambda part: f"{part['collectives']:,}"),
        "",
        "## Waits of the host: synchronisations + copies from pageable memory",
        "",
        *_table(rows, lambda part: f"{part['waits']} + {part['pageable']}"),
        "",
        "## Peak memory, GB",
        "",
        *_table(rows, lambda part: f"{part['peak_gb']:.2f}", last="between steps"),
        "",
        "## Planned and allocated memory, GB",
        "",
        "`lvtrain.planning`, without the 2 GB that it adds for what torch does not allocate.",
        "`tests/test_planning_peaks.py` allows 10% of the peak, and 1% of what stays between steps.",
        "",
        *_against_the_plan(rows),
    ]
    return "\n".join(lines) + "\n"


def _against_the_plan(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| case | between steps, planned | allocated | ratio | peak, planned | allocated | ratio |"
    yield "|---" * 7 + "|"
    for case in cases():
        if found := rows.get(case.name):
            states, peak = (size / 1e9 for size in planned_bytes(case))
            kept, most = found["states_gb"], peak_gb(found)
            yield (
                f"| {case.name} | {states:.2f} | {kept:.2f} | {states / kept:.3f} "
                f"| {peak:.2f} | {most:.2f} | {peak / most:.3f} |"
            )


def peak_gb(found: dict[str, Any]) -> float:
    """Of the whole step."""
    return max(part["peak_gb"] for part in found["parts"].values())


def _table(rows: dict[str, dict[str, Any]], cell: Any, last: str = "") -> list[str]:
    head = ["case", *PARTS, *([last] if last else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in rows.items():
        cells = [
            name,
            *(cell(found["parts"][part]) for part in PARTS),
            *([f"{found['states_gb']:.2f}"] if last else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures, and writes after each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("tools/results/cuda_host"))
    options = parser.parse_args()
    path = options.out.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        device = FakeDevice(Path(folder))
        for number, case in enumerate(cases()):
            if options.only in case.name:
                kept[case.name] = row(device, case, Path(folder) / str(number))
                print(case.name, json.dumps(kept[case.name]), flush=True)
            rows = {case.name: kept[case.name] for case in cases() if case.name in kept}
            path.write_text(json.dumps(rows, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(page(rows))
        device.close()


if __name__ == "__main__":
    main()
