"""fViT and Part fViT: the grid as a special case of landmarks, gradients to landmarks, subsets and orders; IResNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lvtrain.backbones import create_backbone
from lvtrain.backbones.landmarks.patches import grid_landmarks, sample_patches
from lvtrain.errors import UserError

SHAPE = {"dim": 40, "depth": 2, "heads": 3, "head_dim": 8, "mlp_dim": 56, "embedding_dim": 24}


def pair(**overrides: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    part = create_backbone("part_fvit_tiny", **SHAPE, **overrides).eval()
    with torch.no_grad():  # fresh weights are so small that nothing depends on anything
        for name, parameter in part.named_parameters():
            if not name.startswith(("stn", "output_layer")):
                parameter += 0.1 * torch.randn_like(parameter)
    plain = create_backbone("fvit_tiny", **SHAPE).eval()
    plain.load_state_dict({key: value for key, value in part.state_dict().items() if key in plain.state_dict()})
    return part, plain


def test_published_sizes() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in create_backbone(name, embedding_dim=dim).parameters()) / 1e6
            for name, dim in (("part_fvit_tiny", 256), ("part_fvit_base", 768), ("fvit_base", 768), ("iresnet100", 512))
        }
    assert counts["part_fvit_tiny"] == pytest.approx(15.28, rel=0.025)  # the text gives 15.28 M and no shape
    assert counts["part_fvit_base"] - counts["fvit_base"] == pytest.approx(2.88, abs=0.01)  # the landmark CNN
    assert counts["iresnet100"] == pytest.approx(65.15, abs=0.01)


def test_names_are_the_released_codes() -> None:
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape)
            for key, value in create_backbone("part_fvit_base", embedding_dim=768).state_dict().items()
        }
    assert shapes["pos_embedding"] == (1, 197, 768) and shapes["cls_token"] == (1, 1, 768)
    assert shapes["patch_to_embedding.weight"] == (768, 192)
    assert shapes["transformer.layers.11.0.fn.fn.to_qkv.weight"] == (3 * 704, 768)
    assert shapes["transformer.layers.0.0.fn.fn.to_out.0.bias"] == (768,)
    assert shapes["transformer.layers.0.1.fn.norm.weight"] == (768,)
    assert shapes["transformer.layers.0.1.fn.fn.net.0.weight"] == (2048, 768)
    assert shapes["transformer.layers.0.1.fn.fn.net.3.weight"] == (768, 2048)
    assert shapes["mlp_head.0.weight"] == (768,) and shapes["output_layer.1.weight"] == (392, 160)
    assert "transformer.layers.0.0.fn.fn.to_qkv.bias" not in shapes


def test_landmarks_on_the_grid_are_fvit() -> None:
    part, plain = pair()
    images = torch.randn(3, 3, 112, 112)
    grid = grid_landmarks(14).expand(3, -1, -1)
    assert torch.allclose(part(images, grid), plain(images), atol=1e-5)
    tokens, embedding = part(images, grid, return_tokens=True)
    assert torch.allclose(tokens, plain.tokens(images)[0], atol=1e-4) and torch.equal(embedding, part(images, grid))


def test_a_fresh_landmark_cnn_starts_near_the_grid() -> None:
    part, _ = pair()
    _, landmarks = part(torch.randn(2, 3, 112, 112), return_landmarks=True)
    assert (landmarks - grid_landmarks(14)).abs().max() < 2
    assert landmarks.amin(1).tolist() == [[3.5, 3.5]] * 2 and landmarks.amax(1).tolist() == [[107.5, 107.5]] * 2


def test_landmarks_lie_in_the_picture_given() -> None:
    for released, low, high in ((False, 3.5, 43.5), (True, -1.0, 46.0)):
        part, _ = pair(released=released)
        points = part.predict_landmarks(torch.randn(2, 3, 48, 48))
        assert float(points.min()) == pytest.approx(low, abs=1e-4) and float(points.max()) == pytest.approx(
            high, abs=1e-4
        )


def test_order_and_subsets_of_landmarks() -> None:
    part, _ = pair()
    images = torch.randn(2, 3, 112, 112)
    landmarks = torch.rand(2, 196, 2) * 111
    whole = part(images, landmarks)
    order = torch.randperm(196)
    assert torch.allclose(part(images, landmarks[:, order], positions=order), whole, atol=1e-5)
    assert not torch.allclose(part(images, landmarks[:, order]), whole, atol=1e-3)  # a shuffle changes positions
    chosen = torch.stack([torch.randperm(196)[:36] for _ in range(2)])
    few = landmarks.gather(1, chosen[..., None].expand(-1, -1, 2))
    one_by_one = torch.cat([part(images[i : i + 1], few[i : i + 1], positions=chosen[i]) for i in range(2)])
    assert torch.allclose(part(images, few, positions=chosen), one_by_one, atol=1e-5)
    with pytest.raises(UserError, match=r"200 .*196"):
        part(images, torch.rand(2, 200, 2))
    more = part(images, torch.rand(2, 200, 2) * 111, positions=torch.arange(200) % 196)
    assert more.shape == (2, 24)


def test_patches_are_what_a_loop_over_landmarks_samples() -> None:
    images = torch.randn(2, 3, 30, 41, dtype=torch.float64)
    landmarks = torch.rand(2, 7, 2, dtype=torch.float64) * torch.tensor([40.0, 29.0])
    patches = sample_patches(images, landmarks, 4).reshape(2, 7, 4, 4, 3)
    padded = F.pad(images, (4, 4, 4, 4))
    for b in range(2):
        for n in range(7):
            for i in range(4):
                for j in range(4):
                    x, y = (landmarks[b, n] + torch.tensor([j - 1.5, i - 1.5]) + 4).tolist()
                    x0, y0 = int(x), int(y)
                    a, c = x - x0, y - y0
                    corner = padded[b, :, y0 : y0 + 2, x0 : x0 + 2]
                    expected = (1 - c) * ((1 - a) * corner[:, 0, 0] + a * corner[:, 0, 1])
                    expected = expected + c * ((1 - a) * corner[:, 1, 0] + a * corner[:, 1, 1])
                    assert torch.allclose(patches[b, n, i, j], expected, atol=1e-12)


def test_gradients_reach_landmarks() -> None:
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    points = (torch.rand(1, 3, 2, dtype=torch.float64) * 8 + 1.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sample_patches(images, p, 4), (points,), eps=1e-7)
    part, _ = pair()
    part.train()
    part(torch.randn(2, 3, 112, 112)).square().mean().backward()
    assert part.output_layer[1].weight.grad.abs().sum() > 0 and part.stn.conv_stem.weight.grad.abs().sum() > 0


def test_the_deterministic_gradient_of_points_is_torchs() -> None:
    images = torch.randn(2, 3, 9, 11)
    found = []
    for with_images in (False, True):  # with them, torch's own backward is used
        pixels = images.clone().requires_grad_(with_images)
        points = (torch.linspace(-2, 12, 20).reshape(2, 5, 2)).requires_grad_()
        patches = sample_patches(pixels, points, 3)
        patches.square().sum().backward()
        found.append((patches, points.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))
    assert found[0][1].abs().sum() > 0


def test_frozen_landmarks() -> None:
    part, _ = pair(freeze_landmarks=True)
    part.train()
    before = {key: value.clone() for key, value in part.stn.state_dict().items()}
    part(torch.randn(2, 3, 112, 112)).sum().backward()
    assert all(parameter.grad is None for parameter in [*part.stn.parameters(), *part.output_layer.parameters()])
    assert all(torch.equal(value, before[key]) for key, value in part.stn.state_dict().items())
    assert part.patch_to_embedding.weight.grad is not None


def test_landmarks_do_not_lose_precision_under_autocast() -> None:
    part, _ = pair()
    images = torch.randn(2, 3, 112, 112)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample_patches(images.bfloat16(), grid_landmarks(14).expand(2, -1, -1))
        landmarks = part.predict_landmarks(images)
    assert sampled.dtype == torch.float32 and landmarks.dtype == torch.float32
    cut = images.bfloat16().float().unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 196, -1)
    assert torch.allclose(sampled, cut, atol=1e-4)


def test_small_views_take_the_position_grid_resized() -> None:
    _, plain = pair()
    images = torch.randn(2, 3, 48, 48)
    tokens, embedding = plain.tokens(images)
    assert tokens.shape == (2, 36, 40) and embedding.shape == (2, 24)
    with torch.no_grad():  # a constant position grid stays constant when resized
        plain.pos_embedding[:, 1:] = plain.pos_embedding[:, 1:2]
    alone = create_backbone("fvit_tiny", **SHAPE, image_size=48).eval()
    state = {key: value for key, value in plain.state_dict().items()}
    state["pos_embedding"] = plain.pos_embedding[:, :37]
    alone.load_state_dict(state)
    assert torch.allclose(plain(images), alone(images), atol=1e-5)

    torch.manual_seed(0)  # and DINO's own transformer: constant positions again, so that the grid's size says nothing
    dino, alone = (create_backbone("dino_vit_tiny", dim=24, depth=2, image_size=size).eval() for size in (112, 48))
    with torch.no_grad():
        dino.pos_embed[:, 1:] = dino.pos_embed[:, 1:2]
    alone.load_state_dict(dino.state_dict() | {"pos_embed": dino.pos_embed[:, :10]})
    assert torch.allclose(dino(images), alone(images), atol=1e-5)


def test_iresnet_layout() -> None:
    with torch.device("meta"):
        backbone = create_backbone("iresnet50")
    state = backbone.state_dict()
    assert tuple(state["fc.weight"].shape) == (512, 512 * 7 * 7)
    expected = {
        "conv1.weight",
        "bn1.running_mean",
        "prelu.weight",
        "layer1.0.bn1.weight",
        "layer1.0.downsample.0.weight",
    }
    expected |= {"layer1.0.downsample.1.running_var", "layer3.13.conv2.weight", "layer4.2.bn3.bias", "bn2.weight"}
    assert expected | {"fc.bias", "features.weight", "features.running_mean"} <= set(state)
    assert "layer1.1.downsample.0.weight" not in state and "layer3.14.conv1.weight" not in state
    assert not backbone.features.weight.requires_grad


def test_iresnet_block_in_plain_functions() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("iresnet18", image_size=24, embedding_dim=8).double().eval()
    w = backbone.state_dict()
    for key, value in w.items():
        if key.endswith("running_mean"):
            value.normal_()
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)

    def bn(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = w[name + ".weight"] / torch.sqrt(w[name + ".running_var"] + 1e-5)
        return (x - w[name + ".running_mean"].view(shape)) * scale.view(shape) + w[name + ".bias"].view(shape)

    def prelu(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.where(x > 0, x, x * w[name + ".weight"].view(1, -1, 1, 1))

    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    x = prelu(bn(F.conv2d(images, w["conv1.weight"], padding=1), "bn1"), "prelu")
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"layer{layer}.{block}.", 2 if block == 0 else 1
            y = F.conv2d(bn(x, name + "bn1"), w[name + "conv1.weight"], padding=1)
            y = F.conv2d(prelu(bn(y, name + "bn2"), name + "prelu"), w[name + "conv2.weight"], padding=1, stride=stride)
            if block == 0:
                x = bn(F.conv2d(x, w[name + "downsample.0.weight"], stride=2), name + "downsample.1")
            x = bn(y, name + "bn3") + x
    x = bn(bn(x, "bn2").flatten(1) @ w["fc.weight"].T + w["fc.bias"], "features")
    assert torch.allclose(backbone(images), x, atol=1e-9)
    tokens, embedding = backbone.tokens(images)
    assert tokens.shape == (2, 4, 512) and torch.equal(embedding, backbone(images))


def test_drop_path_of_every_block_and_dropout_of_the_landmark_head() -> None:
    shape: dict[str, Any] = {"embedding_dim": 32, "image_size": 56, "dim": 32, "depth": 3, "heads": 2, "mlp_dim": 32}

    def rates(network: Any) -> list[float]:
        return [module.drop_path.drop_prob for layer in network.transformer.layers for module in layer]

    ramp = create_backbone("fvit_tiny", **shape, drop_path=0.1)
    every = create_backbone("fvit_tiny", **shape, drop_path=0.1, drop_path_in="all")
    assert rates(ramp) == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1]) and rates(every) == [0.1] * 6
    plain = create_backbone("part_fvit_tiny", **shape)
    dropping = create_backbone("part_fvit_tiny", **shape, landmark_dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 56, 56)
    for network in (plain, dropping):
        network.stn.eval()
        with torch.no_grad():
            network.output_layer[1].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    whole = plain.predict_landmarks(images)
    assert not torch.equal(dropping.predict_landmarks(images), whole)
    dropping.eval()
    assert torch.equal(dropping.predict_landmarks(images), whole)
    dropping.freeze_landmarks = True  # what is frozen drops nothing
    dropping.train()
    dropping.stn.eval()
    assert torch.equal(dropping.predict_landmarks(images), whole)
