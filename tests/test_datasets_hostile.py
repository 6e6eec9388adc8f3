"""Sources that a hostile or careless tool wrote: each is refused in one line, or every image is in the sum with its own label."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvtrain.data.images import ImageError, decode
from lvtrain.datasets.packing import Policies
from lvtrain.datasets.recordio import RecordWriter, pack_record
from lvtrain.errors import UserError
from tests.messy_sources import add, jpeg, packed, people, write_rec, write_table

Source = Callable[[Path], Any]
ZIP = "0_0_0000000/"


def tar(*members: tuple[str, bytes], name: str = "a.tar") -> Source:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for member, data in members:
                add(archive, member, data)

    return write


def sample(number: int, label: int) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return (f"{number}.jpg", jpeg(number)), (f"{number}.cls", str(label).encode())


def both(*sources: Source) -> Source:
    return lambda folder: [source(folder) for source in sources] and None


def text(name: str, content: str | bytes) -> Source:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data) and None


def negative_size(folder: Path) -> None:
    tar(*sample(0, 0), *sample(1, 1))(folder)
    data = bytearray((folder / "a.tar").read_bytes())
    start = next(at for at in range(0, len(data), 512) if data[at:].startswith(b"1.jpg"))
    member = tarfile.TarInfo.frombuf(bytes(data[start : start + 512]), "utf-8", "strict")
    member.size = -512  # tarfile would read this header for ever
    data[start : start + 512] = member.tobuf(tarfile.GNU_FORMAT)
    (folder / "a.tar").write_bytes(data)


def long_name(folder: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (folder / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


def linked(folder: Path) -> None:
    tar(*sample(0, 0))(folder)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    tar(*sample(1, 1))(elsewhere)
    (folder / "more").symlink_to(elsewhere)


def rec(edit: Callable[[Path], Any] = lambda folder: None) -> Source:
    return lambda folder: [edit(write_rec(folder / "x").parent)] and folder / "x"


def records(*payloads: bytes) -> Source:
    def write(folder: Path) -> Path:
        with RecordWriter(folder / "a.rec") as out:
            for key, payload in enumerate(payloads):
                out.write(key, payload)
        return folder / "a.rec"

    return write


def without_first_line(folder: Path) -> None:
    path = folder / "train.idx"
    path.write_text(path.read_text().split("\n", 1)[1])
    (folder / "property").unlink()


def zipped(damage: bool, *more: str) -> Source:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name in more:
                archive.writestr(name, jpeg(3))
            for number in (1, 2):
                archive.writestr(f"{ZIP}{number}.jpg", jpeg(number))
        data = bytearray((folder / "a.zip").read_bytes())
        if damage:
            data[data.index(jpeg(2)) + len(jpeg(2)) - 2] ^= 1  # behind the image's end: it decodes as before
        (folder / "a.zip").write_bytes(data)

    return write


def two_columns(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = [pa.array([jpeg(1), jpeg(2)]), pa.array([0, 1]), pa.array([0, 0])]
    parquet.write_table(pa.Table.from_arrays(columns, names=["image", "label", "label"]), folder / "a.parquet")


def images(*names: str) -> Source:
    def write(folder: Path) -> None:
        for number, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(jpeg(number))

    return write


SHARDS = '{"shardlist": [{"url": "a.tar", "nsamples": %s}]}'
# key in the refusal -> kind, source, options
REFUSED: dict[str, tuple[str, Source, dict[str, Any]]] = {
    "half of a character": ("webdataset", tar(("a.jpg", jpeg(1)), ("a.json", b'{"label": "\\ud800"}')), {}),
    "half of a character ": ("parquet", lambda at: write_table(at / "a.parquet", [0, 1], ["\ud800", "b"]), {}),
    "nsamples": ("webdataset", both(tar(*sample(0, 0)), text("i.json", SHARDS % "1e999")), {}),
    "shardlist": ("webdataset", both(tar(*sample(0, 0)), text("i.json", '{"shardlist": 5}')), {}),
    "stray.tar": (
        "webdataset",
        both(tar(*sample(0, 0)), tar(*sample(1, 1), name="stray.tar"), text("i.json", SHARDS % 1)),
        {},
    ),
    "-512 bytes": ("webdataset", negative_size, {}),
    "8,589,93": ("webdataset", long_name, {}),
    "[3.5, 5.5]": ("recordio", records(pack_record([3.5, 5.5]), pack_record(0, jpeg(1)), pack_record(1, jpeg(2))), {}),
    "property": ("recordio", rec(lambda folder: (folder / "property").write_bytes(b"\xff\xfe6")), {}),
    "train.lst": ("recordio", rec(lambda folder: (folder / "train.lst").write_text("1\t0\tx.jpg\n" * 19)), {}),
    "announces 24 images, 18 were found": ("recordio", rec(without_first_line), {}),
    "2 columns 'label'": ("parquet", two_columns, {}),
    "looks like a part": ("folder", images("d/train/a/1.jpg", "d/train/b/1.jpg"), {"level": 2}),
}
# source -> kind, images of each identity, the sum
PACKED: dict[str, tuple[str, Source, dict[str, int], str]] = {
    "names that no font can measure": (
        "webdataset",
        tar(("a.jpg", jpeg(1)), ("a.cls", "a\x85b".encode()), ("b.jpg", jpeg(2)), ("b.cls", "a\u2028b".encode())),
        {"a\x85b": 1, "a\u2028b": 1},
        "announced 2 = packed 2 + skipped 0 + refused 0",
    ),
    "a manifest of tars in folders": (
        "webdataset",
        both(
            tar(*sample(0, 0), name="x/0.tar"),
            tar(*sample(1, 1), name="y/0.tar"),
            text("i.json", json.dumps({"shardlist": [{"url": f"{part}/0.tar", "nsamples": 1} for part in "xy"]})),
        ),
        {"0": 1, "1": 1},
        "announced 2 = packed 2 + skipped 0 + refused 0",
    ),
    "a link to a folder of tars": (
        "webdataset",
        linked,
        {"0": 1},
        "announced 2 = packed 1 + skipped 1 (link to a folder: 1) + refused 0",
    ),
    "a tar in a hidden folder": (
        "webdataset",
        both(tar(*sample(0, 0)), tar(*sample(1, 1), name=".cache/b.tar")),
        {"0": 1},
        "announced 2 = packed 1 + skipped 1 (.tar file in a hidden or system folder: 1) + refused 0",
    ),
    "hidden files in an identity's folder": (
        "folder",
        images("a/1.jpg", "b/1.jpg", "b/.1.jpg", "b/._1.jpg"),
        {"a": 1, "b": 1},
        "announced 4 = packed 2 + skipped 2 (hidden file: 2) + refused 0",
    ),
    "macOS's companion of a .rec": (
        "recordio",
        rec(lambda folder: (folder / "._train.rec").write_bytes(b"x")),
        {str(label): 3 for label in range(6)},
        "announced 18 = packed 18 + skipped 0 + refused 0",
    ),
    "a sound zip": ("webface-zip", zipped(False), {ZIP[:-1]: 2}, "announced 2 = packed 2 + skipped 0 + refused 0"),
    "a zip with a system's folder": (
        "webface-zip",
        zipped(False, f"__MACOSX/{ZIP}3.jpg", f"./x/.trash/{ZIP}4.jpg"),
        {ZIP[:-1]: 2},
        "announced 4 = packed 2 + skipped 2 (zip entry in a hidden or system folder: 2) + refused 0",
    ),
    "a zip with a flipped bit": (
        "webface-zip",
        zipped(True),
        {ZIP[:-1]: 1},
        "announced 2 = packed 1 + skipped 0 + refused 1 (undecodable: 1)",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_it_is_refused_in_one_line(key: str, tmp_path: Path) -> None:
    kind, source, options = REFUSED[key]
    (tmp_path / "source").mkdir()
    given = source(tmp_path / "source")
    with pytest.raises(UserError) as refusal:
        packed(kind, given or tmp_path / "source", tmp_path / "out", Policies(), **options)
    assert key.strip() in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", PACKED)
def test_it_adds_up(name: str, tmp_path: Path) -> None:
    kind, source, identities, total = PACKED[name]
    (tmp_path / "source").mkdir()
    given = source(tmp_path / "source")
    report = packed(kind, given or tmp_path / "source", tmp_path / "out", Policies())
    assert people(tmp_path / "out") == identities
    assert report["reconciliation"]["line"] == total


def test_integers_of_32_bits_are_not_drawn_white() -> None:
    for value, wanted in ((0x1234, 0x12), (0x10000, None), (-1, None)):
        out = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.int32)).save(out, "TIFF")
        if wanted is None:
            with pytest.raises(ImageError):
                decode(out.getvalue())
        else:
            assert (decode(out.getvalue()) == wanted).all()
