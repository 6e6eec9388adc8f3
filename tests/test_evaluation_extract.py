"""Embeddings in order, the same number of forward calls on every rank, the same bits on 1, 2 and 4 ranks."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import Setting, run_benchmarks, verification
from lvtrain.evaluation.bins import write_bin
from lvtrain.weights import extract
from tests.ranks import run_ranks


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def pictures(count: int) -> list[bytes]:
    generator = np.random.default_rng(1)
    encoded = []
    for _ in range(count):
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, stride=3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(400, 7)
    ).eval()


def test_images_are_decoded_upright_and_by_name() -> None:
    """The EXIF rotation is applied; grey and transparent images become RGB; others are refused with their name."""
    picture = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(buffer, "PNG", exif=exif)
    assert np.array_equal(extract.decode(buffer.getvalue(), 8), np.rot90(np.asarray(picture), -1))
    for mode in ("L", "RGBA", "P", "1"):
        assert extract.decode(picture.convert(mode), 5).shape == (5, 5, 3)
    with pytest.raises(UserError, match="face 7"):
        extract.decode(b"no picture", 8, "face 7")


def embed_views(forward: extract.Forward, images: list[bytes], **setting: Any) -> np.ndarray:
    """Embeddings of the images and of their mirror images, [2, N, d]."""
    rows = Setting(**setting).run(forward, images, lambda views: views.transpose(1, 0, 2))
    return rows[: len(images)].transpose(1, 0, 2)


class Counting:
    def __init__(self) -> None:
        self.model, self.shapes = network(), []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(images.shape))
        return self.model(images)


def embed_on(rank: int, size: int, count: int, batch: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    forward = Counting()
    views = embed_views(forward, pictures(count), world=world(rank, size), batch=batch, device="cpu", image_size=32)
    return torch.from_numpy(views.copy()), forward.shapes


def test_against_one_image_at_a_time() -> None:
    images, model = pictures(11), network()
    views = embed_views(model, images, world=world(0, 1), batch=4, device="cpu", image_size=32)
    assert views.shape == (2, 11, 7) and views.dtype == np.float32
    with torch.no_grad():
        for position, image in enumerate(images):
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(np.float32)
            tensor = torch.from_numpy((pixels - 127.5) / 127.5).permute(2, 0, 1)[None]
            np.testing.assert_allclose(views[0, position], model(tensor)[0], atol=1e-6)
            np.testing.assert_allclose(views[1, position], model(tensor.flip(3))[0], atol=1e-6)
    summed = Setting(world(0, 1), "cpu", 4, 32).embed(model, images)
    np.testing.assert_allclose(summed, views.sum(0), rtol=1e-6)


def broken_on(rank: int, size: int) -> str:
    images = pictures(12)
    images[10] = images[10][:60]
    forward = Counting()
    try:
        Setting(world(rank, size), "cpu", 4, 32).embed(forward, images)
    except UserError as error:
        return f"{len(forward.shapes)} {error}"
    return "no error"


def benchmark_on(rank: int, size: int, path: str) -> dict:
    return run_benchmarks(network(), {"set": path}, Setting(world(rank, size), "cpu", 5, 32))


def all_on(rank: int, size: int, path: str) -> dict:
    return {
        "ragged": embed_on(rank, size, 13, 4),
        "few": embed_on(rank, size, 3, 4),
        "broken": broken_on(rank, size),
        "benchmark": benchmark_on(rank, size, path),
    }


@pytest.fixture(scope="module")
def verification_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[bool]]:
    images = pictures(30)
    generator = np.random.default_rng(0)
    chosen, issame = [], []
    for pair in range(60):
        same = pair % 6 < 3
        first = int(generator.integers(30))
        second = first if same else (first + 1 + int(generator.integers(28))) % 30
        chosen += [images[first], images[second]]
        issame.append(same)
    path = tmp_path_factory.mktemp("sets") / "set.bin"
    write_bin(path, chosen, issame)
    return path, chosen, issame


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_to_the_bit(size: int, verification_set: tuple[Path, list[bytes], list[bool]]) -> None:
    path = str(verification_set[0])
    alone = all_on(0, 1, path)
    ranks = run_ranks(size, all_on, path)
    for count, name in ((13, "ragged"), (3, "few")):
        calls = [result[name][1] for result in ranks]
        # ZeRO-3 forwards are collectives: equally many everywhere, also on a rank without an image
        assert all(shapes == calls[0] for shapes in calls)
        batches = math.ceil(count / 4)
        assert calls[0] == [(4, 3, 32, 32)] * 2 * math.ceil(batches / size)
        for result in ranks:
            assert torch.equal(result[name][0], alone[name][0])
    for result in ranks:
        assert result["benchmark"] == alone["benchmark"]
        assert "cannot be decoded" in result["broken"] or "cut short" in result["broken"]
        assert result["broken"] == ranks[0]["broken"]


def test_benchmark_against_embeddings_taken_the_long_way(
    verification_set: tuple[Path, list[bytes], list[bool]],
) -> None:
    path, chosen, issame = verification_set
    result = benchmark_on(0, 1, str(path))["set"]
    views = embed_views(network(), chosen, world=world(0, 1), batch=6, device="cpu", image_size=32).astype(np.float64)
    embeddings = views.sum(0)
    expected = verification.summary(
        verification.squared_distances(embeddings[0::2], embeddings[1::2]), np.array(issame)
    )
    assert result["accuracy"] == expected["accuracy"]
    # a forward of another batch size differs in the last float32 bits
    assert result["positive_mean"] == pytest.approx(expected["positive_mean"], abs=1e-6)
    assert result["xnorm"] == pytest.approx(np.linalg.norm(views, axis=2).mean(), rel=1e-6)


def test_diverged_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.bin"
    write_bin(path, pictures(20) * 2, [i % 2 == 0 for i in range(20)])
    with pytest.raises(UserError, match="20 of 20 pairs are NaN"):
        run_benchmarks(lambda images: images.mean((2, 3)) * float("nan"), {"set": path}, Setting(world(0, 1), "cpu", 8))


def test_raw_pixels(tmp_path: Path) -> None:
    images = pictures(20)
    path = tmp_path / "set.bin"
    chosen = [image for i in range(20) for image in (images[i], images[i if i % 2 else (i + 1) % 20])]
    write_bin(path, chosen, [i % 2 == 1 for i in range(20)])
    result = run_benchmarks(extract.raw_pixels, {"set": path}, Setting(world(0, 1), "cpu", 8, 32))
    assert result["set"]["positive_mean"] == pytest.approx(1.0)
    assert result["set"]["accuracy"] == 1.0
