"""Cleaning: planted faults are found, all of them and nothing else, and the subset manifest trains without them."""

import io
import json

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lvtrain.data.shards import ShardDataset
from lvtrain.data.subset import DROPPED
from lvtrain.datasets import clean, vectors
from lvtrain.datasets.findings import choose
from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.datasets.synthetic import DIFFICULTIES
from lvtrain.datasets.synthetic.dataset import encode_face
from lvtrain.errors import UserError
from lvtrain.evaluation.bins import write_bin

PEOPLE, SHOTS, DIMENSION = 24, 9, 64


class Planted:
    """A packed dataset whose faults we know, with embeddings of a model that knows who is who."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        # folder name -> [(who it shows, which picture)]; two folders show person 5, one picture of person 3 lies in 8, one of 9 in 2
        plan = {f"p{person:02d}": [(person, shot) for shot in range(SHOTS - person % 3)] for person in range(PEOPLE)}
        plan["p05b"] = [(5, SHOTS + shot) for shot in range(6)]
        plan["p08"].append((3, 90))
        plan["p02"].append((9, 91))
        images = {}
        for name, pictures in plan.items():
            for who, shot in pictures:
                images[name, f"{who}-{shot}"] = encode_face(7, who, shot, DIFFICULTIES["normal"])
        images["p11", "11-again"] = self.reencoded(images["p11", "11-1"], mirror=False)  # the same picture, other bytes
        images["p14", "14-again"] = self.reencoded(images["p14", "14-0"], mirror=True)
        for (name, shot), data in images.items():
            (folder / "src" / name).mkdir(parents=True, exist_ok=True)
            (folder / "src" / name / f"{shot}.jpg").write_bytes(data)
        pack(folder / "src", folder / "set", PackOptions("folder", samples_per_shard=50))
        self.folder, self.data = folder / "set", ShardDataset(folder / "set")
        self.names = self.data.label_names()
        self.labels = self.data.labels(np.arange(len(self.data)))
        self.centres = rng.normal(size=(PEOPLE + 1, DIMENSION))
        identity_of = {data: key for key, data in images.items()}
        self.key = [identity_of[self.data.read(sample)[0]] for sample in range(len(self.data))]
        self.who = [int(shot.split("-")[0]) for _, shot in self.key]
        self.embeddings = np.stack([self.embed(rng, who) for who in self.who]).astype(np.float32)
        for name, again, first in (("p11", "11-again", "11-1"), ("p14", "14-again", "14-0")):
            self.embeddings[self.sample(name, again)] = self.embeddings[self.sample(name, first)] + 0.05 * rng.normal(
                size=DIMENSION
            )
        self.embeddings *= rng.uniform(0.5, 20, size=(len(self.embeddings), 1))  # scale carries no meaning
        # the test set: person 20 who is trained on, picture 14-2 itself, and a stranger
        shown = [
            (20, encode_face(7, 20, 50, DIFFICULTIES["normal"])),
            (PEOPLE, encode_face(7, PEOPLE, 0, DIFFICULTIES["normal"])),
        ] * 5
        self.test_images = [image for _, image in shown] + [images["p14", "14-2"]] * 10
        rows = [self.embed(rng, who) for who, _ in shown]
        self.test_embeddings = np.stack(rows + [self.embeddings[self.sample("p14", "14-2")]] * 10)

    def embed(self, rng, who):
        return self.centres[who] + 0.45 * rng.normal(size=DIMENSION)

    def sample(self, name, shot):
        return self.key.index((name, shot))

    @staticmethod
    def reencoded(data, mirror):
        picture = Image.open(io.BytesIO(data)).resize((104, 104)).resize((112, 112))
        out = io.BytesIO()
        (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else picture).save(out, "JPEG", quality=80)
        return out.getvalue()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def findings(planted):
    part = clean.EvaluationSet("exam", planted.test_embeddings, planted.test_images.__getitem__)
    return clean.analyse(
        planted.embeddings, planted.labels, lambda sample: planted.data.read(sample)[0], evaluation=[part]
    )


def test_strangers(planted, findings):
    found = {(planted.names[label], sample): planted.names[other] for sample, label, _, other, _ in findings.outliers}
    assert found == {("p08", planted.sample("p08", "3-90")): "p03", ("p02", planted.sample("p02", "9-91")): "p09"}
    for sample, label, cosine, _, other_cosine in findings.outliers:
        # the definition, written out: against the mean direction of the others of its label
        unit = planted.embeddings / np.linalg.norm(planted.embeddings, axis=1, keepdims=True)
        others = unit[(planted.labels == label) & (np.arange(len(unit)) != sample)].sum(axis=0)
        assert cosine == pytest.approx(float(unit[sample] @ others / np.linalg.norm(others)), abs=1e-5)
        assert other_cosine > 0.7 > findings.limits["outlier"] > cosine


def test_a_hard_picture_that_is_like_nobody_else_is_no_stranger():
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(30, DIMENSION))
    labels = np.repeat(np.arange(30), 8)
    embeddings = centres[labels] + 0.45 * rng.normal(size=(240, DIMENSION))
    beside = rng.normal(size=DIMENSION)  # no centre's direction
    beside -= centres.T @ np.linalg.lstsq(centres.T, beside, rcond=None)[0]
    embeddings[17] = centres[2] / np.linalg.norm(centres[2]) + 3.5 * beside / np.linalg.norm(beside)
    found = clean.analyse(embeddings, labels, lambda sample: b"")
    assert not found.outliers and found.limits["outlier"] > 0.3
    at_any = clean.analyse(embeddings, labels, lambda sample: b"", limits=clean.Limits(outlier=found.limits["outlier"]))
    assert [outlier[:2] for outlier in at_any.outliers] == [(17, 2)] and at_any.outliers[0][2] < found.limits["outlier"]


def test_one_person_under_two_labels(planted, findings):
    assert [sorted(planted.names[label] for label in group) for group, _ in findings.same_person] == [["p05", "p05b"]]


def test_the_same_picture_in_other_bytes(planted, findings):
    expected = {
        frozenset((planted.sample("p11", "11-1"), planted.sample("p11", "11-again"))),
        frozenset((planted.sample("p14", "14-0"), planted.sample("p14", "14-again"))),
    }
    assert {frozenset((first, second)) for first, second, _ in findings.duplicates} == expected
    assert all(first < second for first, second, _ in findings.duplicates)


def test_overlap_with_an_evaluation_set(planted, findings):
    assert {(name, planted.names[label]) for name, _, label, _ in findings.overlaps} == {
        ("exam", "p20"),
        ("exam", "p14"),
    }
    assert sorted({image for _, image, label, _ in findings.overlaps if planted.names[label] == "p20"}) == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert {(image, sample) for _, image, sample, _ in findings.repeated_images} == {
        (image, planted.sample("p14", "14-2")) for image in range(10, 20)
    }


@pytest.mark.parametrize("policy", ["merge", "drop", "keep"])
def test_choice(planted, findings, policy):
    classes = len(planted.names)
    ids, label_of = choose(findings, planted.labels, classes, same_person=policy)
    gone = set(range(len(planted.labels))) - set(ids.tolist())
    dropped = {"p20", "p14"} | ({"p05b"} if policy == "drop" else set())
    expected = {sample for sample, *_ in findings.outliers} | {second for _, second, _ in findings.duplicates}
    expected |= {sample for sample, label in enumerate(planted.labels) if planted.names[label] in dropped}
    assert gone == expected
    used = label_of[label_of != DROPPED]
    assert sorted(set(used.tolist())) == list(
        range({"merge": classes - 3, "drop": classes - 3, "keep": classes - 2}[policy])
    )
    five, five_b = planted.names.index("p05"), planted.names.index("p05b")
    assert (label_of[five] == label_of[five_b]) == (policy == "merge")


def test_small_identities_can_be_dropped(planted, findings):
    ids, _ = choose(findings, planted.labels, len(planted.names), same_person="keep", min_images=8)
    assert np.bincount(planted.labels[ids])[np.unique(planted.labels[ids])].min() >= 8


def test_unusable_rows_and_singletons_do_no_harm(planted):
    embeddings = planted.embeddings.copy()
    embeddings[3], embeddings[4] = np.nan, 0
    found = clean.analyse(embeddings, planted.labels, lambda sample: planted.data.read(sample)[0])
    assert found.unusable == [3, 4]
    labels = planted.labels.copy()
    labels[7] = len(planted.names)  # an identity of one image has no centre without it
    found = clean.analyse(planted.embeddings, labels, lambda sample: planted.data.read(sample)[0])
    assert 7 not in {sample for sample, *_ in found.outliers}


def test_neighbours_beyond_the_exhaustive_size_agree(monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 1, 16)) + 0.05 * rng.normal(size=(400, 10, 16))
    rows = vectors.normalised(rows.reshape(-1, 16))
    exact = vectors.neighbours(rows, rows, 3)[1]
    monkeypatch.setattr(vectors, "_EXACT", 1000)
    assert (vectors.neighbours(rows, rows, 3)[1] == exact).all(axis=1).mean() > 0.98


def test_command_line_writes_a_subset_that_loads(planted, tmp_path):
    from tools.clean_dataset import main

    np.save(tmp_path / "all.npy", planted.embeddings)
    np.save(tmp_path / "exam.npy", planted.test_embeddings)
    write_bin(tmp_path / "exam.bin", planted.test_images, [True] * 10)
    before = {path: path.read_bytes() for path in planted.folder.rglob("*") if path.is_file()}
    app = typer.Typer()
    app.command()(main)
    arguments = [
        str(planted.folder),
        str(tmp_path / "cleaned.json"),
        "--embeddings",
        str(tmp_path / "all.npy"),
        "--evaluation",
    ]
    arguments += [str(tmp_path / "exam.bin"), "--evaluation-embeddings", str(tmp_path / "exam.npy")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cleaned.report.json").read_text())
    assert report["counts"]["outliers"] == 2 and report["counts"]["same_person_groups"] == 1
    assert {(row["identity"], row["closest_identity"]) for row in report["outliers"]} == {
        ("p08", "p03"),
        ("p02", "p09"),
    }
    assert {row["identity"] for row in report["overlaps"]} == {"p14", "p20"}
    lists = ("outliers", "same_person", "duplicates", "overlaps", "repeated_images", "unusable")
    assert all(isinstance(row, dict) for name in lists for row in report[name])
    cleaned = ShardDataset(tmp_path / "cleaned.json")
    assert len(cleaned) == report["samples_kept"] and cleaned.num_classes == len(planted.names) - 3
    labels = cleaned.labels(np.arange(len(cleaned)))
    assert np.unique(labels).tolist() == list(range(cleaned.num_classes))
    assert Image.open(tmp_path / "cleaned.png").size[0] > 600
    assert {path: path.read_bytes() for path in planted.folder.rglob("*") if path.is_file()} == before
    np.save(tmp_path / "short.npy", planted.embeddings[:-1])
    bad = CliRunner().invoke(app, [*arguments[:2], "--embeddings", str(tmp_path / "short.npy")])
    assert bad.exit_code == 2 and "embed this dataset again" in bad.output
    late = CliRunner().invoke(
        app, [arguments[0], str(tmp_path / "exam.json"), "--embeddings", str(tmp_path / "nothing.npy")]
    )
    assert late.exit_code == 2 and "exam.bin" in late.output  # before anything is embedded


def test_a_set_that_holds_everybody_is_blamed_and_reported(planted, tmp_path):
    from tools.clean_dataset import main

    np.save(tmp_path / "all.npy", planted.embeddings)
    firsts = [int(np.flatnonzero(planted.labels == label)[0]) for label in range(len(planted.names))]
    firsts += firsts[: len(firsts) % 2]
    np.save(tmp_path / "exam.npy", planted.embeddings[firsts])
    write_bin(tmp_path / "exam.bin", [planted.data.read(sample)[0] for sample in firsts], [True] * (len(firsts) // 2))
    app = typer.Typer()
    app.command()(main)
    arguments = [str(planted.folder), str(tmp_path / "cleaned.json"), "--embeddings", str(tmp_path / "all.npy")]
    arguments += ["--evaluation", str(tmp_path / "exam.bin"), "--evaluation-embeddings", str(tmp_path / "exam.npy")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "--overlap" in result.output and not (tmp_path / "cleaned.json").exists()
    report = json.loads((tmp_path / "cleaned.report.json").read_text())
    assert report["samples_kept"] == 0 and report["counts"]["overlapping_identities"] == len(planted.names)
    assert (tmp_path / "cleaned.png").stat().st_size > 10_000


def test_embeddings_that_separate_no_identity_are_refused(planted):
    noise = np.random.default_rng(3).normal(size=planted.embeddings.shape)
    with pytest.raises(UserError, match="--outlier"):
        clean.analyse(noise, planted.labels, lambda sample: planted.data.read(sample)[0])


def test_bad_limits_are_one_line():
    with pytest.raises(UserError, match="outlier 3"):
        clean.Limits(outlier=3)
