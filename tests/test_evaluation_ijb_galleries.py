"""IJB 1:N on a generated release, against loops over probes written from the definition, and scikit-learn's top-k accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import suite
from lvtrain.evaluation.sets import ijb, ijb_galleries
from lvtrain.weights import extract
from tests.test_evaluation_ijb import make_release

ALONE = World(0, 1, 0, torch.device("cpu"))


def make_galleries(folder: Path, templates: int = 260, subjects: int = 30, seed: int = 0) -> Path:
    """Adds the 1:N files: a gallery template for each subject, half of them in G1; the other templates are probes, some of nobody there."""
    make_release(folder, templates, subjects, seed)
    faces = [line.split() for line in (folder / "meta" / "ijbtest_face_tid_mid.txt").read_text().splitlines()]
    ids = sorted({int(face[1]) for face in faces})
    image = {int(face[1]): face[0] for face in faces}
    rows: dict[str, list[str]] = {"gallery_G1": [], "gallery_G2": [], "probe_mixed": []}
    for number, template in enumerate(ids):
        subject = 500 + number % (subjects + 5)
        is_gallery = number < subjects
        kind = "probe_mixed" if not is_gallery else "gallery_G1" if number % 2 else "gallery_G2"
        # NIST's files have a line for each image of a template
        rows[kind] += [f"{template},{subject},img/{image[template]},1.5,2"] * (1 + number % 2)
    for kind, lines in rows.items():
        text = "TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X,FACE_Y\n" + "\n".join(lines) + "\n"
        (folder / "meta" / f"ijbtest_1N_{kind}.csv").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_galleries(tmp_path_factory.mktemp("ijb"))


def table(folder: Path, kind: str) -> dict[int, int]:
    lines = (folder / "meta" / f"ijbtest_1N_{kind}.csv").read_text().splitlines()[1:]
    return {int(line.split(",")[0]): int(line.split(",")[1]) for line in lines}


def fused(folder: Path, features: np.ndarray, detector_scores: bool) -> dict[int, np.ndarray]:
    """Template by template, medium by medium, from the text files."""
    faces = [line.split() for line in (folder / "meta" / "ijbtest_face_tid_mid.txt").read_text().splitlines()]
    points = [line.split() for line in (folder / "meta" / "ijbtest_name_5pts_score.txt").read_text().splitlines()]
    media: dict[int, dict[int, list[np.ndarray]]] = {}
    for row, (_, template, medium) in enumerate(faces):
        weight = float(points[row][-1]) if detector_scores else 1.0
        media.setdefault(int(template), {}).setdefault(int(medium), []).append(weight * features[row].astype(float))
    sums = {template: np.sum([np.mean(each, 0) for each in found.values()], 0) for template, found in media.items()}
    return {template: value / np.linalg.norm(value) for template, value in sums.items()}


def by_definition(folder: Path, rows: dict[int, np.ndarray], kinds: list[str]) -> dict[str, Any]:
    """One gallery of all `kinds`: rank shares, and TPIR by trying every unmated score as a threshold."""
    gallery = {subject: rows[template] for kind in kinds for template, subject in table(folder, kind).items()}
    subjects = sorted(gallery)
    scores, own, mated, unmated = [], [], [], []
    for template, subject in table(folder, "probe_mixed").items():
        found = np.array([rows[template] @ gallery[other] for other in subjects])
        if subject in gallery:
            scores.append(found)
            own.append(subjects.index(subject))
            mated.append(found[own[-1]])
        else:
            unmated.append(found.max())
    ranks = {
        str(k): top_k_accuracy_score(own, np.stack(scores), k=k, labels=np.arange(len(subjects))) for k in (1, 5, 10)
    }
    rates = {}
    for target in (0.1, 0.01):
        allowed = [t + 1e-9 for t in unmated if np.mean(np.array(unmated) >= t + 1e-9) <= target]
        if target * len(unmated) >= 1:
            rates[f"{target:.0e}"] = max(np.mean(np.array(mated) >= t) for t in allowed)
    return {"rank": ranks, "tpir": rates, "mated": len(mated), "unmated": len(unmated)}


@pytest.mark.parametrize("detector_scores", [True, False])
def test_it_is_what_the_definition_says(folder: Path, detector_scores: bool) -> None:
    release = ijb_galleries.read_galleries(folder)
    subjects = dict(table(folder, "probe_mixed")) | table(folder, "gallery_G1") | table(folder, "gallery_G2")
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(600, 24))
    of_faces = np.array([subjects[template] for template in release.faces.templates])
    features = (centres[of_faces] + 2.2 * generator.normal(size=(len(of_faces), 24))).astype(np.float32)
    result = ijb_galleries.score_searches(release, features, detector_scores=detector_scores)
    rows = fused(folder, features, detector_scores)
    expected = {name: by_definition(folder, rows, [f"gallery_{name}"]) for name in ("G1", "G2")}
    for name, one in expected.items():
        got = result["galleries"][name]
        assert (got["mated"], got["unmated"]) == (one["mated"], one["unmated"])
        assert got["rank"] == pytest.approx(one["rank"], abs=1e-9)
        assert {far: rate["tpir"] for far, rate in got["tpir_at_fpir"].items()} == pytest.approx(one["tpir"], abs=1e-9)
    for far in ("1e-01", "1e-02"):
        assert result["tpir_at_fpir"][far] == pytest.approx(np.mean([one["tpir"][far] for one in expected.values()]))
    assert "1e-03" not in result["tpir_at_fpir"]  # about 130 unmated searches cannot resolve it
    assert result["rank"]["1"] == pytest.approx(np.mean([one["rank"]["1"] for one in expected.values()]))
    joined = by_definition(folder, rows, ["gallery_G1", "gallery_G2"])
    assert result["joined"]["rank"] == pytest.approx(joined["rank"], abs=1e-9)
    assert 0.3 < result["rank"]["1"] < 0.999  # the sample has errors
    # insightface's script: the highest scores of all pairs of a probe and another subject, as many as FPIR x probes
    gallery = {**table(folder, "gallery_G1"), **table(folder, "gallery_G2")}
    probes = table(folder, "probe_mixed")
    own = [rows[p] @ rows[g] for p, who in probes.items() for g, subject in gallery.items() if subject == who]
    others = sorted(rows[p] @ rows[g] for p, who in probes.items() for g, subject in gallery.items() if subject != who)
    for far in (0.1, 0.01):
        limit = others[-int(np.ceil(far * len(probes)))]
        expected_rate = sum(score > limit + 1e-7 for score in own) / len(probes)
        assert result["joined"]["tpir_at_fpir"][f"{far:.0e}"] == pytest.approx(expected_rate, abs=1e-9)


def test_by_name(tmp_path: Path) -> None:
    folder = make_galleries(tmp_path / "r", templates=30, subjects=8)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(147, 8)).eval()
    setting = extract.Setting(ALONE, "cpu", 64)
    task = suite.parse(f"set:ijb_identification:{folder}", {"ijb_identification": {"flip": False}})
    result = suite.evaluate(model, [task], setting)["set"]
    release = ijb_galleries.read_galleries(folder)
    features = setting.embed(model, ijb.AlignedCrops(release.faces), mirror=False)
    expected = ijb_galleries.score_searches(release, features)
    assert result["rank"] == expected["rank"] and result["galleries"] == expected["galleries"]
    assert suite.figure(result) == expected["rank"]["1"]
    assert ("rank 1", f"{100 * expected['rank']['1']:.2f}%") in suite.headline(result)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gallery_G1", lambda lines: [*lines, "5,501,x"], "template 5"),
        ("gallery_G1", lambda lines: [*lines, lines[-1].replace(",5", ",6")], "two subjects"),
        ("gallery_G1", lambda lines: [*lines, "a,b"], "not a table"),
        ("gallery_G1", lambda lines: lines[:1], "names no template"),
        ("probe_mixed", lambda lines: [lines[0], "7"], "not a table"),
        ("probe_mixed", None, "does not exist"),
    ],
)
def test_planted_errors_are_named(tmp_path: Path, kind: str, change: Any, message: str) -> None:
    folder = make_galleries(tmp_path / "r", templates=20, subjects=6)
    path = folder / "meta" / f"ijbtest_1N_{kind}.csv"
    if change is None:
        path.unlink()
    else:
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=message):
        ijb_galleries.read_galleries(folder)


def test_galleries_that_share_a_subject_or_are_missing(tmp_path: Path) -> None:
    folder = make_galleries(tmp_path / "r", templates=20, subjects=6)
    path = folder / "meta" / "ijbtest_1N_gallery_G1.csv"
    template, other = next(iter(table(folder, "gallery_G1"))), next(iter(table(folder, "gallery_G2").values()))
    path.write_text(f"T,S\n{template},{other}\n")
    with pytest.raises(UserError, match="two galleries"):
        ijb_galleries.read_galleries(folder)
    for file in folder.glob("meta/*gallery*"):
        file.unlink()
    with pytest.raises(UserError, match="1N_gallery"):
        ijb_galleries.read_galleries(folder)
