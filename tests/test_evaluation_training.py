"""Every protocol runs during training, on two ranks, and the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data.shards import ShardDataset
from lvtrain.evaluation import suite
from lvtrain.evaluation.bins import write_bin
from lvtrain.evaluation.protocol import PROTOCOLS
from lvtrain.export.model_card import Card, write_card
from lvtrain.report import write_report
from tests.runs import events, output, recipe_file, run
from tests.test_evaluation_ijb_galleries import make_galleries
from tests.test_evaluation_tinyface import make_tinyface


def benchmarks(tiny_faces: Path, folder: Path) -> dict[str, Any]:
    """A small set for every protocol: 20 identities with three images each in folders, and what the other tests generate."""
    data = ShardDataset(tiny_faces / "train")
    faces, others = folder / "faces", folder / "others"
    for label in range(24):
        place = (faces if label < 20 else others) / f"p{label:02}"
        place.mkdir(parents=True)
        for image, sample in enumerate(np.flatnonzero(data.labels(np.arange(len(data))) == label)[:3]):
            (place / f"{image}.jpg").write_bytes(data.read(int(sample))[0])
    files = [file.read_bytes() for file in sorted(faces.rglob("*.jpg"))]
    # ten folds of two genuine and two impostor pairs
    pairs = [(3 * k, 3 * k + 1) if k % 4 < 2 else (3 * (k % 20), 3 * ((k + 2) % 20)) for k in range(20)] * 2
    write_bin(folder / "pairs.bin", [files[i] for pair in pairs for i in pair], [a // 3 == b // 3 for a, b in pairs])
    rows = [f"{i},{'ab'[pairs[i // 2][i % 2] // 3 % 2]}" for i in range(80)]
    (folder / "images.csv").write_text("\n".join(["image,group", *rows]))
    rows = [f"p{label:02},{'ab'[label % 2]}" for label in range(20)]
    (folder / "identities.csv").write_text("\n".join(["identity,group", *rows]))
    ijb = make_galleries(folder / "ijb", templates=14, subjects=4)
    return {
        "all": {"path": str(faces), "groups": str(folder / "identities.csv")},
        "search": {"protocol": "identification", "path": str(faces), "enrolled": 2},
        "clusters": {"protocol": "clustering", "path": str(faces)},
        "thresholds": {"protocol": "calibration", "path": str(faces)},
        "mega": {"protocol": "megaface", "path": f"{faces},{others}"},
        "pairs": {"path": str(folder / "pairs.bin"), "groups": str(folder / "images.csv")},
        "templates": str(ijb),
        "galleries": {"protocol": "ijb_identification", "path": str(ijb)},
        "tiny": {"path": str(make_tinyface(folder / "tinyface", identities=6, distractors=12)), "flip": False},
    }


def test_every_protocol_runs_during_training(tiny_faces: Path, tmp_path: Path) -> None:
    wanted = benchmarks(tiny_faces, tmp_path)
    kinds = {task.name: task.kind for task in suite.recipe_tasks(wanted)}
    assert sorted(kinds.values()) == sorted(PROTOCOLS.names()), "a new protocol belongs here too"
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
        schedule={"total": "1 steps", "warmup": "0 steps"},
        evaluation={"benchmarks": wanted},
    )
    assert run(recipe, ranks=2) == 0, output(recipe)
    folder = tmp_path / "runs" / "tiny"
    for moment in ("before", "final"):
        results = json.loads((folder / "evaluation" / f"{moment}.json").read_text())["benchmarks"]
        assert {name: result["kind"] for name, result in results.items()} == kinds
        for name, result in results.items():
            assert 0 <= suite.figure(result) <= 1, name
            assert suite.headline(result), name
        for name in ("pairs", "all"):
            assert set(results[name]["groups"]["at"]) == set(results[name]["tar_at_far"])
    (last,) = [event for event in events(folder, "evaluation") if event["name"] == "final"]
    assert last["figures"].keys() == wanted.keys()
    write_card(tmp_path / "card.md", Card("m", "vit_nano", 32, 1, "x", figures=results))
    card = (tmp_path / "card.md").read_text()
    for title in ("IJB 1:N", "TinyFace", "FNMR by group"):
        assert title in card
    text = write_report(folder).read_text()
    for name in ("galleries", "tiny", "search", "mega", "templates"):
        assert name in text
    assert "IJB 1:N" in text and "TinyFace" in text and "rank 5" in text


def test_a_damaged_benchmark_is_refused_before_training(tiny_faces: Path, tmp_path: Path) -> None:
    wanted = benchmarks(tiny_faces, tmp_path)
    (tmp_path / "ijb" / "meta" / "ijbtest_1N_probe_mixed.csv").unlink()
    (tmp_path / "identities.csv").write_text("identity,group\nnobody,a\n")
    for file in (tmp_path / "others").rglob("*.jpg"):
        file.unlink()
    faults = {"galleries": "1N_probe_mixed.csv", "all": "none of its 1 names", "mega": "holds no images"}
    for name, words in faults.items():
        recipe = recipe_file(tmp_path / name, tiny_faces / "train", evaluation={"benchmarks": {name: wanted[name]}})
        assert run(recipe) == 2
        assert f"evaluation.benchmarks.{name}" in output(recipe) and words in output(recipe)
        assert not (tmp_path / name / "runs" / "tiny" / "metrics.jsonl").exists()
