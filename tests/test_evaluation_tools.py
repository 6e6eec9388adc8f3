"""tools/build_bin.py and tools/evaluate.py as a user starts them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvtrain.evaluation.bins import read_bin
from tests.runs import tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten identities with six images each, and a list of 60 pairs: positives first, and some more at the end."""
    folder = tmp_path_factory.mktemp("people")
    generator = np.random.default_rng(0)
    for person in range(10):
        face = generator.integers(0, 256, (7, 7, 3))
        (folder / f"p{person}").mkdir()
        for image in range(6):
            noisy = np.clip(face + generator.normal(0, 40, (7, 7, 3)), 0, 255).astype(np.uint8)
            size = (112, 112) if image else (140, 140)
            Image.fromarray(noisy).resize(size).save(folder / f"p{person}" / f"{image}.jpg", quality=92)
    lines = [f"p{i % 10}/{i % 6}.jpg\tp{i % 10}/{(i + 1) % 6}.jpg\t1" for i in range(20)]
    lines += [f"p{i % 10}/{i % 6}.jpg\tp{(i + 1 + i % 8) % 10}/{(i + 2) % 6}.jpg\t0" for i in range(30)]
    lines += [f"p{i % 10}/{i % 6}.jpg\tp{i % 10}/{(i + 2) % 6}.jpg\t1" for i in range(10)]
    (folder / "pairs.txt").write_text("# a list\n" + "\n".join(lines) + "\n")
    return folder


def test_build_and_evaluate(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.bin"
    refused = tool("build_bin", folder / "pairs.txt", folder, out)
    assert refused.exit_code == 2 and "--balance-folds" in refused.stderr and "Traceback" not in refused.stderr
    built = tool("build_bin", folder / "pairs.txt", folder, out, "--balance-folds", "--alignment", "none")
    assert built.exit_code == 0, built.stderr
    images, issame = read_bin(out)
    assert issame.tolist() == ([True] * 3 + [False] * 3) * 10
    assert (folder / "p1" / "1.jpg").read_bytes() in images, "an image of the right size keeps its bytes"
    assert json.loads((tmp_path / "own.bin.json").read_text())["alignment"] == "none"

    done = tool(
        "evaluate", "raw_pixels", "--cpu", "--benchmark", f"own:{out}", "--benchmark", f"all:{folder}",
        "--benchmark", f"groups:clustering:{folder}", "--benchmark", f"cal:calibration:{out}",
        "--benchmark", f"mega:megaface:{folder},{folder}", "--option", "clustering.cosine=0.5",
        "-o", tmp_path / "results",
    )  # fmt: skip
    # the same folder cannot be probes and distractors, 30 pairs no threshold; the other benchmarks are done all the same
    assert done.exit_code == 2 and "distractor" in done.stderr and "cal: 30 " in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    results = json.loads((tmp_path / "results" / "evaluation.json").read_text())["benchmarks"]
    assert [result["kind"] for result in results.values()] == ["verification", "all_pairs", "clustering"]
    assert results["groups"]["cosine"] == 0.5
    assert results["own"]["accuracy"] > 0.8 and results["all"]["images"] == 60
    assert "accuracy" in done.stdout and "BCubed" in done.stdout
    for picture in ("roc.png", "own_cosines.png", "own_hardest.png"):
        with Image.open(tmp_path / "results" / picture) as image:
            assert image.size[0] > 300


def test_protocols_on_one_set_share_its_embeddings(folder: Path) -> None:
    from lvtrain.distributed.world import alone
    from lvtrain.evaluation import Setting, raw_pixels, suite

    calls: list[int] = []
    seen: list[tuple[int, int]] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return raw_pixels(images)

    def evaluated(*kinds: str) -> dict[str, dict[str, Any]]:
        calls.clear()
        seen.clear()
        setting = Setting(alone(), "cpu", 25, progress=lambda done, total: seen.append((done, total)))
        options = {"all_pairs": {"flip": False}, "clustering": {"flip": False}}
        tasks = [suite.parse(f"{kind}:{kind}:{folder}", options) for kind in kinds]
        return suite.evaluate(forward, tasks, setting)

    apart = {kind: evaluated(kind)[kind] for kind in ("all_pairs", "clustering")}
    together = evaluated("all_pairs", "clustering")
    assert calls == [25, 25, 25] and seen == [(25, 60), (50, 60), (60, 60)]
    assert together == apart


def test_a_runs_figures_go_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.evaluate import _folder

    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000012"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    assert _folder(tmp_path / "run") == tmp_path / "run" / "evaluated", "not evaluation/, which is the trainer's"
    assert _folder(checkpoint) == tmp_path / "run" / "evaluated_step_000000012"
    assert _folder(tmp_path / "model.onnx") == _folder(Path("raw_pixels")) == Path("evaluation")
    monkeypatch.chdir(tmp_path / "run")
    assert _folder(Path("model.onnx")) == _folder(Path("export") / "model.onnx") == Path("evaluation"), (
        "a model in a run is no checkpoint of it"
    )
    monkeypatch.chdir(checkpoint.parent)
    assert _folder(Path(checkpoint.name)) == tmp_path / "run" / "evaluated_step_000000012"


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    people = tmp_path / "people"
    for name in ("a/cut.jpg", "b/0.jpg"):
        (people / name).parent.mkdir(parents=True, exist_ok=True)
        (people / name).write_bytes((folder / "p1" / "1.jpg").read_bytes()[: 400 if "cut" in name else None])
    (tmp_path / "deep" / "a").mkdir(parents=True)
    Image.fromarray(np.full((112, 112), 0.5, dtype=np.float32)).save(tmp_path / "deep" / "a" / "0.tif")
    (tmp_path / "bad.txt").write_text("a.jpg b.jpg yes\n")
    (tmp_path / "none.txt").write_text("a.jpg b.jpg 1\na.jpg c.jpg 0\n" * 10)
    attempts = {
        "absent.bin": ("evaluate", "raw_pixels", "--benchmark", f"x:{tmp_path}/absent.bin"),
        "--benchmark NAME:PATH": ("evaluate", "raw_pixels"),
        f"{tmp_path / 'absent'} ": (
            "evaluate",
            tmp_path / "absent",
            "--cpu",
            "--benchmark",
            f"x:clustering:{folder}",
        ),
        "cut.jpg": ("evaluate", "raw_pixels", "--cpu", "--benchmark", f"x:clustering:{people}"),
        "0.tif": ("evaluate", "raw_pixels", "--cpu", "--benchmark", f"x:clustering:{tmp_path / 'deep'}"),
        "rainbow": ("evaluate", "raw_pixels", "--cpu", "--benchmark", f"x:rainbow:{people}"),
        "clustering": (
            "evaluate",
            "raw_pixels",
            "--cpu",
            "-b",
            f"x:clustering:{people}",
            "--option",
            "clustering.hue=1",
        ),
        "line 1": ("build_bin", tmp_path / "bad.txt", folder, tmp_path / "x.bin"),
        "No such file": ("build_bin", tmp_path / "none.txt", folder, tmp_path / "x.bin"),
    }
    for message, (name, *arguments) in attempts.items():
        failed = tool(name, *arguments)
        assert failed.exit_code == 2
        assert message in failed.stderr and len(failed.stderr.strip().splitlines()) == 1, failed.stderr
