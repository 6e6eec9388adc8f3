"""Verification sets: what numpy, OpenCV and Python 2 write is read; what could run code, or has lost pairs, is refused."""

import io
import json
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvtrain.errors import UserError
from lvtrain.evaluation.bins import read_bin, write_bin


def jpegs(count: int, size: int = 16) -> list[bytes]:
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


def labels(pairs: int) -> list[bool]:
    """Ten folds, each with as many positive as negative pairs."""
    return [(i % (pairs // 10)) < pairs // 20 for i in range(pairs)]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "array", "column"])
@pytest.mark.parametrize("flags", ["bool", "numpy bool", "array", "int"])
def test_reads_everything_the_field_writes(tmp_path: Path, protocol: int, kind: str, flags: str) -> None:
    images, issame = jpegs(40), labels(20)
    stored = {
        "bytes": images,
        "array": [np.frombuffer(image, np.uint8).copy() for image in images],
        "column": [np.frombuffer(image, np.uint8).copy()[:, None] for image in images],
    }[kind]
    stored_flags = {
        "bool": issame,
        "numpy bool": [np.bool_(flag) for flag in issame],
        "array": np.array(issame),
        "int": [np.int64(flag) for flag in issame],
    }[flags]
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((stored, stored_flags), protocol=protocol))
    read, same = read_bin(path)
    assert read == images
    assert same.dtype == bool and same.tolist() == issame


def test_reads_numpy_1_names(tmp_path: Path) -> None:
    images = [np.frombuffer(image, np.uint8).copy() for image in jpegs(40)]
    data = pickle.dumps((images, [np.bool_(flag) for flag in labels(20)]), protocol=2)
    # protocol 2 names modules in plain text, so numpy 1's spelling can be put in
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    path = tmp_path / "set.bin"
    path.write_bytes(old)
    assert read_bin(path)[0] == [image.tobytes() for image in images]


def test_reads_python_2_strings(tmp_path: Path) -> None:
    """Python 2 pickled image bytes as BINSTRING, which Python 3 would decode as text and fail."""
    images, issame = jpegs(40), labels(20)
    body = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in issame)
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x02](" + body + b"e](" + flags + b"e\x86.")
    read, same = read_bin(path)
    assert read == images and same.tolist() == issame


class Malicious:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


def test_refuses_code(tmp_path: Path) -> None:
    import builtins
    import codecs
    import os
    import subprocess

    touched = tmp_path / "touched"
    attacks = [
        Malicious(os.system, f"touch {touched}"),
        Malicious(builtins.eval, f"open({str(touched)!r}, 'w')"),
        Malicious(builtins.exec, f"open({str(touched)!r}, 'w')"),
        Malicious(subprocess.Popen, ["touch", str(touched)]),
        Malicious(codecs.encode, "aa", "rot13"),
        Malicious(np.dtype, "O"),
        Malicious(np.ndarray, (4,)),
        np.array([object], dtype=object),
        {1, 2}.union,
    ]
    for number, attack in enumerate(attacks):
        for protocol in (0, 2, 4, 5):
            path = tmp_path / f"{number}.bin"
            path.write_bytes(pickle.dumps(([attack, *jpegs(39)], labels(20)), protocol=protocol))
            with pytest.raises(UserError, match=r"refused|not encoded bytes"):
                read_bin(path)
    assert not touched.exists()


def test_refuses_to_have_its_own_names_changed(tmp_path: Path) -> None:
    """GLOBAL, then BUILD with a state: would set attributes of the object with that name."""
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x02c_codecs\nencode\n}U\x08__code__K\x01sb.")
    with pytest.raises(UserError, match="changing a function"):
        read_bin(path)


@pytest.mark.parametrize(
    "issame",
    [
        b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93C\x03abc\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02i8\x85R\x86R",
        b"\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93)R",
    ],
    ids=["3 bytes of int64", "an array without content"],
)
def test_damaged_flags_are_one_line(tmp_path: Path, issame: bytes) -> None:
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x04]" + issame + b"\x86.")
    with pytest.raises(UserError, match="issame"):
        read_bin(path)


def test_round_trip_and_sidecar(tmp_path: Path) -> None:
    images, issame = jpegs(40), labels(20)
    path = tmp_path / "set.bin"
    write_bin(path, images, issame, about={"alignment": "arcface"})
    read, same = read_bin(path)
    assert read == images and same.tolist() == issame
    # the original reader of the field
    plain_images, plain_flags = pickle.loads(path.read_bytes(), encoding="bytes")
    assert plain_images == images and plain_flags == issame
    assert json.loads((tmp_path / "set.bin.json").read_text())["alignment"] == "arcface"

    # two images of two pairs swapped: same length, same counts, only the sidecar knows
    images[1], images[3] = images[3], images[1]
    path.write_bytes(pickle.dumps((images, issame), protocol=4))
    with pytest.raises(UserError, match=r"\.json"):
        read_bin(path)


def test_missing_pairs_are_noticed(tmp_path: Path) -> None:
    images, issame = jpegs(200), labels(100)
    path = tmp_path / "set.bin"

    def write(chosen_images: list[bytes], chosen: list[bool], name: Path = path) -> Path:
        name.write_bytes(pickle.dumps((chosen_images, chosen)))
        return name

    assert len(read_bin(write(images, issame))[1]) == 100
    with pytest.raises(UserError, match="199 images for 100 pairs"):
        read_bin(write(images[:-1], issame))
    with pytest.raises(UserError, match="99 pairs"):
        read_bin(write(images[:-2], issame[:-1]))
    with pytest.raises(UserError, match="fold"):
        read_bin(write(images[20:], issame[10:]))
    shuffled = np.random.default_rng(0).permutation(100)
    with pytest.raises(UserError, match="fold"):
        read_bin(write([images[j] for i in shuffled for j in (2 * i, 2 * i + 1)], [issame[i] for i in shuffled]))
    assert len(read_bin(write(images[20:], issame[10:]), strict=False)[1]) == 90
    with pytest.raises(UserError, match="6000"):
        read_bin(write(images, issame, tmp_path / "lfw.bin"))
    with pytest.raises(UserError, match="cut short"):
        path.write_bytes(pickle.dumps((images, issame))[:-1000])
        read_bin(path)
    with pytest.raises(UserError, match=r"absent\.bin"):
        read_bin(tmp_path / "absent.bin")


def test_a_pickle_of_9_bytes_cannot_ask_for_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")  # LONG_BINPUT at place 268,435,455
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"set\.bin"):
        read_bin(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.bin")
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    for name in ("set.bin", "lfs.bin"):
        with pytest.raises(UserError, match=name):
            read_bin(tmp_path / name)
