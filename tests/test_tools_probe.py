"""The probe of frozen networks: each of its measures on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lvtrain.backbones.fvit import FViT
from lvtrain.backbones.landmarks.patches import grid_landmarks
from lvtrain.backbones.part_fvit import PartFViT
from tools.studies import probe

SIZE = dict(embedding_dim=16, image_size=56, dim=16, depth=1, heads=1, head_dim=16, mlp_dim=16)


def test_unordered_colours_do_not_depend_on_the_order() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 49 * 3))
    turned = rows.reshape(3, 49, 3)[:, ::-1].reshape(3, -1)
    np.testing.assert_array_equal(probe.unordered(rows), probe.unordered(turned))
    assert not np.array_equal(probe.unordered(rows), probe.unordered(rows + 1))


def test_numbers_in_the_features_are_found_and_others_not() -> None:
    draws = np.random.default_rng(0)
    rows, labels = draws.normal(size=(600, 8)), np.arange(600) // 2
    numbers = {"inside": rows @ draws.normal(size=8), "outside": draws.normal(size=600)}
    found = probe.known(rows, numbers, labels)
    assert found["inside"] > 0.99 and found["outside"] < 0.1


def test_landmarks_that_follow_a_number_are_found() -> None:
    draws = np.random.default_rng(0)
    shift, other = draws.normal(size=600), draws.normal(size=600)
    points = grid_landmarks(2)[None] + torch.from_numpy(shift)[:, None, None]
    labels = np.arange(600) // 2
    assert probe.follows(points, [shift], labels) > 0.95 > 0.1 > probe.follows(points, [other], labels)


def test_grid_patches_show_the_whole_image() -> None:
    """The shares are those of the masks, and no hair is left out; the middle patch shows skin."""
    masks = probe.regions(11, [(0, 0), (1, 0), (2, 0)], "album", 56)
    assert masks.shape == (3, 2, 56, 56) and float(masks.sum(1).max()) <= 1
    grid = grid_landmarks(7).expand(3, -1, -1)
    shown = probe.seen(masks, grid)
    assert shown["hair"] == pytest.approx(float(masks[:, 0].mean()), abs=1e-3)
    assert shown["skin"] == pytest.approx(float(masks[:, 1].mean()), abs=1e-3)
    assert shown["hair"] > 0.02 and shown["skin"] > 0.1 and shown["of all hair"] == 1
    centre = probe.seen(masks, grid[:, 24:25])
    assert centre["skin"] > 0.9 and centre["of all hair"] < 0.01


@pytest.mark.parametrize("kind", [FViT, PartFViT])
def test_embeddings_at_the_own_places_are_the_networks(kind: type[FViT]) -> None:
    torch.manual_seed(0)
    network = kind(**SIZE).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        points = network.predict_landmarks(images) if isinstance(network, PartFViT) else grid_landmarks(7)[None]
        same = probe.at(network, images, points, torch.arange(49))
        other = probe.at(network, images, points, torch.arange(48, -1, -1))
        torch.testing.assert_close(same, network(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(same, other, atol=1e-5)
