"""RecordIO: round trip of any payload, mxnet's bytes, insightface's arrangement, and DALI as the independent reader."""

import resource
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.datasets import recordio
from lvtrain.datasets.synthetic import DIFFICULTIES
from lvtrain.datasets.synthetic.dataset import encode_face
from lvtrain.errors import UserError

MAGIC = struct.pack("<I", recordio.MAGIC)
# payloads made of the magic, zeros and odd bytes, so that cuts happen at aligned, unaligned, first and last places
PIECES = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9), st.just(b"\0" * 4)), max_size=8).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.integers(0, 2**24 - 1), st.lists(st.integers(0, 1000), min_size=1, max_size=3)), PIECES),
        min_size=1,
        max_size=6,
    )
)
def test_round_trip(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("rec") / "train.rec"
    payloads = [recordio.pack_record(label, image, id=number) for number, (label, image) in enumerate(records)]
    with recordio.RecordWriter(path) as writer:
        offsets = [writer.write(3 + number, payload) for number, payload in enumerate(payloads)]
    file = recordio.RecordFile(path)
    assert list(file.scan()) == offsets
    keys, indexed = recordio.read_index(path.with_suffix(".idx"))
    assert indexed.tolist() == offsets and keys.tolist() == [3 + number for number in range(len(offsets))]
    for offset, payload, (label, image) in zip(offsets, payloads, records):
        assert offset % 4 == 0 and file.payload(offset) == payload
        record = file.record(offset)
        assert record.image == image
        assert record.labels.tolist() == ([label] if isinstance(label, int) else label)


def test_bytes_are_mxnets(tmp_path):
    """The layout written out by hand from mxnet's rules: whole record with pad, then a record cut at the magic."""
    path = tmp_path / "train.rec"
    with recordio.RecordWriter(path) as writer:
        writer.write(0, recordio.pack_record(7, b"abc"))
        writer.write(1, recordio.pack_record([2, 9], b"ab" + b"cd" + MAGIC + b"x"))
    head = struct.pack("<IfQQ", 0, 7.0, 0, 0) + b"abc"
    array = struct.pack("<IfQQ", 2, 0.0, 0, 0) + struct.pack("<ff", 2, 9) + b"abcd"
    expected = MAGIC + struct.pack("<I", len(head)) + head + b"\0"
    expected += (
        MAGIC + struct.pack("<I", 1 << 29 | len(array)) + array + MAGIC + struct.pack("<I", 3 << 29 | 1) + b"x\0\0\0"
    )
    assert path.read_bytes() == expected


def write_insightface(path, images, labels, classes, array_labels=False):
    """Insightface's arrangement: header, images sorted by identity, identity records."""
    order = np.argsort(labels, kind="stable")
    count = len(images)
    with recordio.RecordWriter(path) as writer:
        writer.write(0, recordio.pack_record([count + 1, count + 1 + classes]))
        for key, row in enumerate(order, start=1):
            label = int(labels[row])
            writer.write(key, recordio.pack_record([label, 0] if array_labels else label, images[row], id=key))
        sorted_labels = np.asarray(labels)[order]
        for label in range(classes):
            low, high = np.searchsorted(sorted_labels, [label, label + 1]) + 1
            writer.write(count + 1 + label, recordio.pack_record([int(low), int(high)]))


@pytest.mark.parametrize("array_labels", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_insightface_arrangement(tmp_path, array_labels, with_index):
    images = [bytes([number]) * (5 + number) for number in range(11)]
    labels = [0, 0, 1, 1, 1, 3, 3, 4, 4, 4, 4]
    write_insightface(tmp_path / "train.rec", images, labels, classes=5, array_labels=array_labels)
    if not with_index:
        (tmp_path / "train.idx").unlink()
    file = recordio.RecordFile(tmp_path / "train.rec")
    found = recordio.catalogue(file)
    assert found.labels.tolist() == labels and found.keys.tolist() == list(range(1, 12)) and found.empty == (2,)
    assert [file.record(int(offset)).image for offset in found.offsets] == images


def test_flat_arrangement_keeps_key_zero(tmp_path):
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        for key in range(3):
            writer.write(key, recordio.pack_record(key, b"image"))
    assert recordio.catalogue(recordio.RecordFile(tmp_path / "train.rec")).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("images", [(1 << 24), (1 << 24) + 1, (1 << 24) + 2, (1 << 25) + 1, (1 << 25) + 3])
def test_a_header_that_float32_has_rounded_hides_no_image(tmp_path, images):
    """The last records of a file of so many images: an .idx need not name all."""
    keys = list(range(images - 6, images + 1))
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, recordio.pack_record([images + 1, images + 3]))
        for key in keys:
            writer.write(key, recordio.pack_record(0, b"image"))
        writer.write(images + 1, recordio.pack_record([1, images + 1]))
        writer.write(images + 2, recordio.pack_record([images + 1, images + 1]))
    found = recordio.catalogue(recordio.RecordFile(tmp_path / "train.rec"))
    assert found.keys.tolist() == keys and found.empty == (1,)


def test_labels_float32_cannot_hold_are_refused(tmp_path):
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, recordio.pack_record((1 << 24) - 1, b"x"))
        with pytest.raises(UserError, match="16777216"):
            writer.write(1, recordio.pack_record(1 << 24, b"x"))


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path):
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, recordio.pack_record(0, b"old"))
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limit[1]))
    try:
        for size in (11_990, 60_000):  # noticed at the end, and while it is written
            with (
                pytest.raises(OSError, match="File too large"),
                recordio.RecordWriter(tmp_path / "train.rec") as writer,
            ):
                writer.write(0, recordio.pack_record(0, bytes(size)))
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_cut_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "train.rec"
    with recordio.RecordWriter(path) as writer:
        writer.write(0, recordio.pack_record(0, b"image" * 30))
        writer.write(1, recordio.pack_record(1, b"image" * 30))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"train\.rec"):
        recordio.catalogue(recordio.RecordFile(path))
    path.write_bytes(whole)
    recordio.write_index(path.with_suffix(".idx"), [0, 1], [0, 12])
    with pytest.raises(UserError, match="byte 12"):
        recordio.catalogue(recordio.RecordFile(path))
    path.with_suffix(".idx").write_text("not an index\n")
    with pytest.raises(UserError, match=r"train\.idx"):
        recordio.catalogue(recordio.RecordFile(path))


def test_dali_reads_our_records(tmp_path):
    """DALI's own MXNet reader, on a flat file, a multipart record, array labels, and a filtered .idx of an unchanged .rec."""
    dali = pytest.importorskip("nvidia.dali")
    images = [encode_face(5, identity, 0, DIFFICULTIES["normal"]) for identity in range(6)]
    images[4] = (
        images[4] + bytes(-len(images[4]) % 4) + MAGIC + b"tail"
    )  # behind the JPEG's end: decoders ignore it, RecordIO must cut it
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        offsets = [writer.write(key, recordio.pack_record(10 + key, image)) for key, image in enumerate(images)]
    recordio.write_index(tmp_path / "subset.idx", [1, 4, 5], [offsets[1], offsets[4], offsets[5]])

    def read(index, count):
        @dali.pipeline_def(batch_size=count, num_threads=1, device_id=None)
        def pipeline():
            data, labels = dali.fn.readers.mxnet(path=[str(tmp_path / "train.rec")], index_path=[str(index)])
            return data, labels

        pipe = pipeline()
        pipe.build()
        data, labels = pipe.run()
        return [bytes(np.asarray(data[i])) for i in range(count)], [
            float(np.asarray(labels[i])[0]) for i in range(count)
        ]

    assert read(tmp_path / "train.idx", 6) == (images, [10.0, 11, 12, 13, 14, 15])
    assert read(tmp_path / "subset.idx", 3) == ([images[1], images[4], images[5]], [11.0, 14, 15])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from lvtrain.datasets.packing import PackOptions, pack

    folder = tmp_path_factory.mktemp("export")
    for person in range(4):
        (folder / "src" / f"p{person}").mkdir(parents=True)
        for image in range(2 + person):
            (folder / "src" / f"p{person}" / f"{image}.jpg").write_bytes(
                encode_face(9, person, image, DIFFICULTIES["normal"])
            )
    pack(folder / "src", folder / "set", PackOptions("folder"))
    return folder / "set"


@pytest.mark.parametrize("flat", [False, True])
def test_a_dataset_goes_to_recordio_and_back(packed, tmp_path, monkeypatch, flat):
    from typer.testing import CliRunner

    from lvtrain.data.shards import ShardDataset
    from lvtrain.datasets.packing import PackOptions, pack
    from tools.recordio import app

    if flat:  # as with more records than float32 counts
        monkeypatch.setattr(recordio, "LARGEST_LABEL", 18)
    result = CliRunner().invoke(app, ["write", str(packed), str(tmp_path / "rec" / "train.rec")])
    assert recordio.read_index(tmp_path / "rec" / "train.idx")[0].tolist() == list(range(14 if flat else 19))
    assert result.exit_code == 0 and (tmp_path / "rec" / "property").read_text() == "4,112,112\n14\n", result.output
    pack(tmp_path / "rec", tmp_path / "back", PackOptions("recordio"))

    def pairs(folder):
        dataset = ShardDataset(folder)
        return sorted((label, data) for data, label in (dataset.read(sample) for sample in range(len(dataset))))

    assert pairs(tmp_path / "back") == pairs(packed)


def test_filtered_index_for_dali(packed, tmp_path):
    from nvidia import dali
    from typer.testing import CliRunner

    from lvtrain.data.shards import ShardDataset
    from lvtrain.datasets.recordio.export import write_recordio
    from tools.recordio import app

    rec, chosen = tmp_path / "train.rec", tmp_path / "chosen.idx"
    write_recordio(ShardDataset(packed), rec)
    before = rec.read_bytes()
    (tmp_path / "bad.txt").write_text("3\n")
    arguments = ["--min-images", "3", "--shots", "2", "--without-keys", str(tmp_path / "bad.txt")]
    result = CliRunner().invoke(app, ["filter", str(rec), str(chosen), *arguments])
    assert result.exit_code == 0 and "4 images of 2 identities" in result.output
    for itself in (rec, rec.with_suffix(".idx")):
        assert CliRunner().invoke(app, ["filter", str(rec), str(itself)]).exit_code == 2
    assert rec.read_bytes() == before
    file = recordio.RecordFile(rec)
    expected = [file.record(int(offset)) for offset in recordio.read_index(chosen)[1]]

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        data, labels = dali.fn.readers.mxnet(path=[str(rec)], index_path=[str(chosen)])
        return data, labels

    pipe = pipeline()
    pipe.build()
    data, labels = pipe.run()
    assert [bytes(np.asarray(data[i])) for i in range(4)] == [record.image for record in expected]
    assert [float(np.asarray(labels[i])[0]) for i in range(4)] == [2.0, 2.0, 3.0, 3.0]
    own = CliRunner().invoke(app, ["filter", str(rec), str(tmp_path / "train.idx")])
    assert own.exit_code == 2 and "own index" in own.output
    none = CliRunner().invoke(app, ["filter", str(rec), str(chosen), "--min-images", "9"])
    assert none.exit_code == 2 and "nothing" in none.output
    (tmp_path / "bad.txt").write_text("3\n99\n")
    unknown = CliRunner().invoke(app, ["filter", str(rec), str(chosen), *arguments])
    assert unknown.exit_code == 2 and "has no record 99" in unknown.output
