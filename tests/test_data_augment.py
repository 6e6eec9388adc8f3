"""Draws: pure, in range, at the stated rates, shared by twins; both backends do the same with them; each operation against another library."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import functional

from lvtrain.data import Loader, ShardDataset
from lvtrain.data.augment import SETS, Draws, View, augmentation, draw
from lvtrain.data.decoding.torch_backend import apply
from tests.shard_data import jpeg, make_dataset

K = 4000
EPOCHS, IDS = np.arange(K) % 3, np.arange(K) * 7


@pytest.mark.parametrize("name", SETS)
def test_draws_are_a_function_of_seed_epoch_and_sample(name):
    for view in augmentation(name):
        whole = draw(view, 1, EPOCHS, IDS).arrays()
        rows = np.random.default_rng(0).permutation(K)[:17]
        part = draw(view, 1, EPOCHS[rows], IDS[rows]).arrays()
        assert whole.keys() == part.keys()
        for key, values in whole.items():
            assert np.array_equal(values[rows], part[key]), (view.name, key)
        if view.ops:
            other = draw(view, 2, EPOCHS, IDS).arrays()
            assert any(not np.array_equal(values, other[key]) for key, values in whole.items())


@pytest.mark.parametrize("name", SETS)
def test_draws_are_in_range(name):
    for view in augmentation(name):
        draws = draw(view, 1, EPOCHS, IDS)
        if draws.crop is not None:
            assert (draws.crop >= 0).all() and (draws.crop <= 1 + 1e-6).all()
            assert (draws.crop[:, 2:] > draws.crop[:, :2]).all()
        if draws.erase is not None:
            assert (draws.erase[:, :2] + draws.erase[:, 2:] <= 1 + 1e-6).all()
        if draws.flip is not None:
            assert stats.binomtest(int(draws.flip.sum()), K, 0.5).pvalue > 1e-4
        if draws.colour is not None:
            assert (draws.colour[:, :3] >= 0).all()


def test_rates_are_those_of_the_set():
    draws = draw(augmentation("dino")[1], 5, EPOCHS, IDS)
    for count, p in (
        ((draws.blur > 0).sum(), 0.1),
        ((draws.solarise < 256).sum(), 0.2),
        ((draws.colour[:, 2] == 0).sum(), 0.2),
        ((draws.colour[:, 0] != 1).sum(), 0.8),
    ):
        assert stats.binomtest(int(count), K, p).pvalue > 1e-4
    area = np.prod(draws.crop[:, 2:] - draws.crop[:, :2], axis=1)
    assert area.min() > 0.35 and area.max() <= 1.0 + 1e-6


def test_landmark_twins_share_crop_and_flip_and_nothing_else():
    views = {view.name: view for view in augmentation("lafs")}
    assert len(views) == 20
    for name, view in views.items():
        if name.endswith("_landmarks"):
            twin, colour = draw(view, 1, EPOCHS, IDS), draw(views[name.removesuffix("_landmarks")], 1, EPOCHS, IDS)
            assert set(twin.arrays()) == {"crop", "flip"} and view.size == views[view.twin].size
            assert np.array_equal(twin.crop, colour.crop) and np.array_equal(twin.flip, colour.flip)
    assert not np.array_equal(
        draw(views["global_0"], 1, EPOCHS, IDS).crop, draw(views["global_1"], 1, EPOCHS, IDS).crop
    )


@pytest.mark.parametrize("name", SETS)
def test_both_backends_give_the_same_picture(tmp_path_factory, name):
    """To a rounding of the resampling, a mean below 0.6 of 255 levels on noisy images; bit for bit with no more than a mirror."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=24)
    views = {}
    for backend in ("dali", "torch"):
        with Loader(
            ShardDataset(folder), seed=3, micro_batch=24, micro_batches=1, augmentation=name, backend=backend
        ) as loader:
            views[backend] = next(loader).views
    assert views["dali"].keys() == views["torch"].keys()
    for view, images in views["dali"].items():
        if name in ("none", "flip"):
            assert torch.equal(images, views["torch"][view])
        difference = (images - views["torch"][view]).abs() * 127.5
        assert difference.mean((1, 2, 3)).max() < 1.5 and difference.mean() < 0.6, view


def one(**parameters):
    """The parameters of one sample."""
    return {
        name: value[0] for name, value in Draws(**{k: np.array([v]) for k, v in parameters.items()}).arrays().items()
    }


IMAGE = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg(5))))).permute(2, 0, 1).contiguous()


def test_neutral_parameters_change_nothing():
    neutral = one(
        flip=0, affine=np.eye(2, 3, dtype=np.float32), colour=[1.0, 1.0, 1.0, 0.0], posterise=255, solarise=256,
        down=0.0, blur=0.0, erase=[0.2, 0.2, 0.0, 0.0], crop=[0.0, 0.0, 1.0, 1.0],
    )  # fmt: skip
    assert torch.equal(apply(IMAGE, 112, neutral), IMAGE)


def test_operations_are_torchvisions():
    def near(ours, theirs, levels):
        assert (ours.float() - theirs.float()).abs().mean() <= levels

    assert torch.equal(apply(IMAGE, 112, one(flip=1)), functional.horizontal_flip(IMAGE))
    assert torch.equal(apply(IMAGE, 112, one(solarise=128)), functional.solarize(IMAGE, 128))
    assert torch.equal(apply(IMAGE, 112, one(posterise=0xF0)), functional.posterize(IMAGE, 4))
    near(apply(IMAGE, 112, one(colour=[1.3, 1.0, 1.0, 0.0])), functional.adjust_brightness(IMAGE, 1.3), 0.6)
    near(apply(IMAGE, 112, one(colour=[1.0, 1.0, 0.0, 0.0])), functional.rgb_to_grayscale(IMAGE, 3), 1.0)
    for sigma, side in ((0.3, 3), (1.0, 7), (2.0, 13)):
        theirs = functional.gaussian_blur(IMAGE, [side, side], [sigma, sigma])
        assert (apply(IMAGE, 112, one(blur=sigma)).int() - theirs.int()).abs().max() <= 1
        near(apply(IMAGE, 112, one(blur=sigma)), theirs, 0.01)
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]], dtype=np.float32)
    theirs = functional.rotate(IMAGE, 20, functional.InterpolationMode.BILINEAR, fill=[128] * 3)
    ours = apply(IMAGE, 112, one(affine=turn))
    near(ours[:, 8:-8, 8:-8], theirs[:, 8:-8, 8:-8], 2.0)
    shift = np.array([[1, 0, 0.25], [0, 1, 0]], dtype=np.float32)  # from a quarter further right
    assert torch.equal(apply(IMAGE, 112, one(affine=shift))[:, :, :80], IMAGE[:, :, 28:108])


def test_an_unused_view_has_no_draws():
    assert draw(View("image"), 0, EPOCHS, IDS).arrays() == {}
