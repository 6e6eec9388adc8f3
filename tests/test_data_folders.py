"""One rule for folders of images: packing and evaluation see the same identities, and everything in the folder is accounted for."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.data.folders import natural_key, walk_identities
from lvtrain.errors import UserError
from lvtrain.evaluation.sources import labelled_images

FOLDERS = st.sampled_from(["ann", "ben", "@eaDir", ".cache", "__MACOSX", "a\u0300", "à", "10", "9", "x y"])
FILES = st.sampled_from(["0.jpg", "1.JPG", "2.png", "._0.jpg", "Thumbs.db", "3.gif", "b.webp"])
TREES = st.sets(
    st.one_of(
        st.tuples(FILES), st.tuples(FOLDERS, FILES), st.tuples(FOLDERS, st.sampled_from(["s1", ".s", "@eaDir"]), FILES)
    ),
    min_size=1,
    max_size=25,
)
HIDDEN = {"@eaDir", ".cache", "__MACOSX", ".s"}
IMAGES = {"0.jpg", "1.JPG", "2.png", "b.webp"}


def grow(root: Path, tree: set[tuple[str, ...]]) -> None:
    for parts in tree:
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_every_file_is_an_image_of_its_folder_or_left_out(tmp_path_factory: pytest.TempPathFactory, tree: set) -> None:
    root = tmp_path_factory.mktemp("tree")
    grow(root, tree)
    found = list(walk_identities(root, level=1))
    images = {entry.path: entry.identity for entry in found if entry.path and not entry.reason}
    expected = {
        os.path.join(*parts): parts[0]
        for parts in tree
        if len(parts) > 1 and parts[-1] in IMAGES and not HIDDEN & set(parts)
    }
    assert images == expected
    left_out = [entry.path for entry in found if entry.reason]
    assert Counter([*images, *left_out]) == Counter(os.path.join(*parts) for parts in tree)
    if expected:
        files, labels = labelled_images(root) if len(root.name) and _is_plain(root) else ([], [])
        names = [Path(file).relative_to(root).parts[0] for file in files]
        assert len({(name, int(label)) for name, label in zip(names, labels)}) == len(set(names))


def _is_plain(root: Path) -> bool:
    try:
        list(walk_identities(root))
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("tree", "is_refused"),
    [
        ({("train", "ann", "0.jpg"), ("val", "ben", "0.jpg")}, True),
        ({("Test", "ann", "0.jpg"), ("ann", "0.jpg")}, True),
        ({("faces", name, "0.jpg") for name in "abc"}, True),  # one folder around them all
        ({("p1", name, "0.jpg") for name in "abcde"} | {("p2", name, "0.jpg") for name in "fghij"}, True),
        ({(name, session, "0.jpg") for name in "abcdef" for session in ("s1", "s2")}, False),  # sessions of an identity
        ({("train", "0.jpg"), ("val", "0.jpg")}, False),
        ({("train", "0.jpg"), ("train", "x", "0.jpg"), ("ann", "0.jpg")}, False),
    ],
)
def test_a_level_of_folders_that_are_parts_is_refused_alike(tmp_path: Path, tree: set, is_refused: bool) -> None:
    grow(tmp_path, tree)
    if not is_refused:
        assert (
            len(labelled_images(tmp_path)[0])
            == len(tree)
            == sum(bool(entry.path) for entry in walk_identities(tmp_path))
        )
        return
    for read in (labelled_images, lambda root: list(walk_identities(root))):
        with pytest.raises(UserError, match="level=2"):
            read(tmp_path)


def test_level_2_joins_the_parts_by_name(tmp_path: Path) -> None:
    grow(tmp_path, {("train", "ann", "0.jpg"), ("val", "ann", "1.jpg"), ("val", "ben", "0.jpg"), ("val", "x.txt")})
    found = list(walk_identities(tmp_path, level=2))
    images = {entry.path: entry.identity for entry in found if entry.path and not entry.reason}
    assert images == {"train/ann/0.jpg": "ann", "val/ann/1.jpg": "ann", "val/ben/0.jpg": "ben"}
    assert [entry.path for entry in found if entry.reason] == ["val/x.txt"]


def test_what_cannot_be_listed_is_an_error_and_a_link_is_counted(tmp_path: Path) -> None:
    grow(tmp_path, {("ann", "0.jpg"), ("elsewhere", "0.jpg")})
    (tmp_path / "ann" / "more").symlink_to(tmp_path / "elsewhere")
    assert [entry.path for entry in walk_identities(tmp_path) if entry.reason] == ["ann/more"]


def test_natural_order_is_total() -> None:
    names = ["1", "01", "2_a", "2_b", "10_a", "x", "x1", "x1²", "²"]
    expected = ["01", "1", *names[2:]]
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(names).tolist()
        assert sorted(shuffled, key=natural_key) == expected
