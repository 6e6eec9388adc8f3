"""Batches: the same pixels, labels and ids for every number of ranks, restart, batch size, thread count and read-ahead."""

from __future__ import annotations

import importlib.util
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lvtrain.data import Loader, SampleOrder, ShardDataset
from lvtrain.errors import UserError
from tests.shard_data import jpeg, make_dataset

BACKENDS = ["dali", "torch"]
V, M = 4, 16  # 64 samples a step; 41 samples an epoch, so every step crosses an epoch's end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def stream(folder, *, ranks=1, steps=3, start=0, micro_batch=M, micro_batches=V, **options):
    """What all ranks together see, in stream order: views, labels, ids."""
    options = {"seed": 1, "block": 8, "augmentation": "strong", **options}
    loaders = [
        Loader(
            ShardDataset(folder),
            micro_batch=micro_batch,
            micro_batches=micro_batches,
            rank=rank,
            size=ranks,
            start=start,
            **options,
        )
        for rank in range(ranks)
    ]
    batches = []
    for _ in range(steps):
        for loader in loaders:
            batches += [next(loader) for _ in range(micro_batches // ranks)]
    for loader in loaders:
        loader.close()
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.sample_ids for batch in batches]),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_do_not_depend_on_how_they_are_made(folder, backend):
    whole = stream(folder, backend=backend)
    assert whole[0].shape == (192, 3, 112, 112) and whole[0].dtype == torch.float32
    assert same(whole, stream(folder, backend=backend, ranks=4))  # 1 rank x 64 and 4 ranks x 16
    assert same(whole, stream(folder, backend=backend, micro_batch=64, micro_batches=1, threads=1, prefetch=1))
    assert same(whole, stream(folder, backend=backend, micro_batch=4, micro_batches=16, ranks=2, threads=3, prefetch=5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [1, 37, 41, 64, 100])
def test_restart_at_any_position(folder, backend, position):
    whole = stream(folder, backend=backend)
    again = stream(folder, backend=backend, start=position, steps=1, ranks=2)
    assert same([part[position : position + 64] for part in whole], again)


def test_ids_and_labels_are_the_orders(folder):
    dataset = ShardDataset(folder)
    _, labels, ids = stream(folder, start=17)
    expected = SampleOrder(len(dataset), 1, 8).at(range(17, 17 + 192))
    assert np.array_equal(ids.numpy(), expected)
    assert np.array_equal(labels.numpy(), expected * 5 // 41)  # as make_dataset gave them
    with Loader(dataset, seed=1, block=8, micro_batch=M, micro_batches=V) as loader:
        assert np.array_equal(loader.global_labels(17 + 64, 64), labels[64:128].numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_those_of_pillow(folder, backend):
    """Decoding, channel order, layout, normalisation and flip, against Pillow."""
    plain, _, ids = stream(folder, backend=backend, augmentation="none")
    flipped, _, _ = stream(folder, backend=backend, augmentation="flip")
    mirrored = 0
    for row, sample in enumerate(ids.tolist()):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(sample))).convert("RGB")).astype(np.float32)
        expected = torch.from_numpy((pixels - 127.5) / 127.5).permute(2, 0, 1)
        torch.testing.assert_close(plain[row], expected, atol=1e-6, rtol=0)
        is_mirrored = not torch.equal(flipped[row], plain[row])
        torch.testing.assert_close(flipped[row], expected.flip(2) if is_mirrored else expected, atol=1e-6, rtol=0)
        mirrored += is_mirrored
    assert 70 < mirrored < 122  # of 192


def test_a_sample_is_augmented_anew_each_epoch(folder):
    images, _, ids = stream(folder, steps=2)
    first, second = (ids == 5).nonzero().flatten()[:2].tolist()
    assert not torch.equal(images[first], images[second])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_self_supervision(folder, backend):
    with Loader(
        ShardDataset(folder), seed=1, micro_batch=3, micro_batches=1, augmentation="dino", backend=backend
    ) as loader:
        views = next(loader).views
    assert {name: tuple(images.shape) for name, images in views.items()} == {
        **{f"global_{i}": (3, 3, 112, 112) for i in range(2)},
        **{f"local_{i}": (3, 3, 48, 48) for i in range(8)},
    }
    assert all(bool(torch.isfinite(images).all()) and images.abs().max() <= 1 for images in views.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_another_size_are_resized(tmp_path, backend):
    folder = make_dataset(tmp_path, samples=6, shards=1, size=(96, 80))
    images, labels, _ = stream(folder, backend=backend, micro_batch=3, micro_batches=2, augmentation="flip")
    assert images.shape == (18, 3, 112, 112) and (labels >= 0).all()
    assert images.std() > 0.2


def test_ranks_must_divide_the_micro_batches(folder):
    with pytest.raises(UserError, match=r"3 ranks.*micro_batches=4.*1, 2, 4"):
        Loader(ShardDataset(folder), seed=1, micro_batch=M, micro_batches=V, rank=0, size=3)


def test_unknown_names_are_refused(folder):
    with pytest.raises(UserError, match="flip"):
        Loader(ShardDataset(folder), seed=1, micro_batch=1, micro_batches=1, augmentation="flop")
    with pytest.raises(UserError, match="torch"):
        next(Loader(ShardDataset(folder), seed=1, micro_batch=1, micro_batches=1, backend="pil"))


def test_reading_ahead_is_not_counted(folder):
    with Loader(ShardDataset(folder), seed=1, micro_batch=4, micro_batches=1, prefetch=8) as loader:
        for number in range(1, 4):
            next(loader)
            assert loader.seen_count == 4 * number
        assert loader.wait_seconds > 0
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_an_unused_or_busy_loader_returns(folder):
    Loader(ShardDataset(folder), seed=1, micro_batch=4, micro_batches=1).close()
    loader = Loader(ShardDataset(folder), seed=1, micro_batch=4, micro_batches=1)
    next(loader)
    loader.close()
    assert loader._thread is None


def test_every_value_is_normalised_alike_by_every_kind_of_cpu():
    """Fused or not, multiplying and subtracting give the same float32, so neither the CPU nor a pixel's place matters."""
    from lvtrain.data.decoding.pixels import _STEP, normalise

    values, found = np.arange(256, dtype=np.uint8), torch.empty(2, 3, 16, 16)
    normalise(np.broadcast_to(values.reshape(16, 16), found.shape).copy(), found)
    apart = values * np.float32(_STEP) - np.float32(1)
    fused = (values.astype(np.float64) * float(np.float32(_STEP)) - 1).astype(np.float32)
    assert np.array_equal(apart, fused) and (found.numpy().reshape(6, 256) == fused).all()
    assert np.abs(fused - (values.astype(np.float64) - 127.5) / 127.5).max() < 1.3e-7 and np.abs(fused).max() <= 1


@pytest.mark.parametrize("augmentation", ["flip", "strong", "dino"])
def test_what_leaves_the_host_as_bytes_is_the_same(folder, augmentation, monkeypatch):
    """For a GPU the torch backend hands bytes over and normalises them there: here on a device that is none, and in torch on the CPU."""
    from lvtrain.data.decoding import pixels, torch_backend

    travelled = []

    def normalise_here(planes, device):
        travelled.append((planes.dtype, device.type))
        return pixels.normalise_on(planes.clone(), torch.device("cpu"))

    def batches(device):
        options = {"micro_batch": 41, "micro_batches": 1, "augmentation": augmentation, "backend": "torch"}
        with Loader(ShardDataset(folder), seed=1, device=device, **options) as loader:
            return [next(loader).views for _ in range(3)]

    here = batches("cpu")
    monkeypatch.setattr(torch_backend, "normalise_on", normalise_here)
    for expected, found in zip(here, batches("meta")):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert set(travelled) == {(torch.uint8, "meta")}


def test_the_torch_backend_needs_no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name in ("pixels", "torch_backend"):
        spec = importlib.util.find_spec(f"lvtrain.data.decoding.{name}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_memory_is_lent_again_only_when_nobody_holds_it():
    from lvtrain.data.decoding.pixels import Memory

    memory = Memory(keep=2)
    batch = memory.lend(4, 3)
    address, row = batch.data_ptr(), batch[2]
    del batch
    other = memory.lend(4, 3)
    assert other.data_ptr() != address and row.shape == (3,)
    del row
    assert memory.lend(4, 3).data_ptr() == address


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_over_epochs(folder, backend):
    """20 epochs after the first five leave the resident memory where it was."""
    import psutil

    process = psutil.Process()
    with Loader(
        ShardDataset(folder), seed=1, micro_batch=41, micro_batches=1, augmentation="strong", backend=backend
    ) as loader:
        for _ in range(5):
            next(loader)
        before = process.memory_info().rss
        for _ in range(20):
            next(loader)
        assert process.memory_info().rss - before < 30e6


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["flip", "strong"])
def test_the_torch_backend_for_a_gpu_makes_the_pictures_it_makes_for_the_cpu(folder, augmentation):
    on_gpu, on_cpu = (
        stream(folder, steps=4, backend="torch", device=device, augmentation=augmentation) for device in ("cuda", "cpu")
    )
    assert on_gpu[0].is_cuda and torch.equal(on_gpu[0].cpu(), on_cpu[0])


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["flip", "strong", "randaugment", "lafs"])
def test_on_a_gpu(folder, augmentation):
    """`mixed` decoding: the same for any number of ranks, and the CPU's image up to the decoder's rounding."""

    def views(device, micro_batch, batches):
        with Loader(
            ShardDataset(folder),
            seed=1,
            micro_batch=micro_batch,
            micro_batches=1,
            augmentation=augmentation,
            backend="dali",
            device=device,
        ) as loader:
            found = [next(loader) for _ in range(batches)]
        assert all(batch.labels.device.type == device for batch in found)
        return {name: torch.cat([batch.views[name] for batch in found]).cpu() for name in found[0].views}

    whole, parts, on_cpu = views("cuda", 64, 1), views("cuda", 16, 4), views("cpu", 64, 1)
    for name, images in whole.items():
        assert torch.equal(images, parts[name])
        assert (images - on_cpu[name]).abs().mean() * 127.5 < 3.0
