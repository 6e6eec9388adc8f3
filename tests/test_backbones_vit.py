"""The ViT against the table of published shapes and against the same network written out in plain float64 torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lvtrain.backbones import BACKBONES, create_backbone
from lvtrain.backbones.vit import kept_tokens
from lvtrain.errors import UserError

# insightface's README and module, counted
PARAMETERS = {
    "vit_t": 19_137_792,
    "vit_s": 76_023_296,
    "vit_b": 113_833_472,
    "vit_l": 255_684_352,
    "vit_h": 756_393_984,
}
SMALL = {"dim": 48, "depth": 3, "heads": 4, "embedding_dim": 20, "image_size": 40}


def small(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone("vit_t", **{**SMALL, "drop_path": 0.0, **changes})
    with torch.no_grad():  # away from zero biases and unit norms, so that a forgotten one shows
        for parameter in backbone.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in backbone.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0))
    return backbone


def reference(state: dict[str, torch.Tensor], images: torch.Tensor, depth: int, heads: int, patch: int) -> torch.Tensor:
    """The network of METHODS in evaluation mode, from its published description: no library layer, float64."""
    w = {name: value.double() for name, value in state.items()}
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    x = images.double()[:, :, : rows * patch, : columns * patch]
    x = x.reshape(batch, 3, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    x = x @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"]

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        mean = y.mean(-1, keepdim=True)
        variance = ((y - mean) ** 2).mean(-1, keepdim=True)
        return (y - mean) / torch.sqrt(variance + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    for i in range(depth):
        y = norm(x, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn.qkv.weight"].T
        q, k, v = y.reshape(batch, -1, 3, heads, y.shape[-1] // 3 // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        y = (attention @ v).transpose(1, 2).reshape(x.shape)
        x = x + y @ w[f"blocks.{i}.attn.proj.weight"].T + w[f"blocks.{i}.attn.proj.bias"]
        y = norm(x, f"blocks.{i}.norm2") @ w[f"blocks.{i}.mlp.fc1.weight"].T + w[f"blocks.{i}.mlp.fc1.bias"]
        x = x + y.clamp(0, 6) @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"]
    x = norm(x, "norm").reshape(batch, -1)
    for linear, bn in (("feature.0", "feature.1"), ("feature.2", "feature.3")):
        x = x @ w[linear + ".weight"].T
        x = (x - w[bn + ".running_mean"]) / torch.sqrt(w[bn + ".running_var"] + 2e-5)
        x = x * w[bn + ".weight"] + w[bn + ".bias"]
    return x


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == PARAMETERS[name]
    keys = set(backbone.state_dict())
    block = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight", "attn.proj.weight"}
    block |= {"attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    assert {key.removeprefix("blocks.0.") for key in keys if key.startswith("blocks.0.")} == block
    rest = {key for key in keys if not key.startswith("blocks.")}
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head = {"feature.0.weight", "feature.2.weight"} | {f"feature.{i}.{name}" for i in (1, 3) for name in buffers}
    embed = {"pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert rest == head | embed | {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("image_size", [40, 36, 45])  # 9 divides 36 and 45; 4 pixels are left over of 40
def test_forward_equals_the_description_in_float64(image_size: int) -> None:
    backbone = small(image_size=image_size).double().eval()
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    expected = reference(backbone.state_dict(), images, SMALL["depth"], SMALL["heads"], 9)
    assert torch.allclose(backbone(images), expected, atol=1e-12)
    assert torch.allclose(backbone.float()(images.float()).double(), expected, atol=1e-4)


def test_initialisation_is_arcface_torchs() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_t", depth=2)
    for name, parameter in backbone.named_parameters():
        if name.endswith(".bias"):
            if not name.startswith("patch_embed"):  # the convolution keeps torch's own
                assert not parameter.any(), name
        elif "norm" in name or name in ("feature.1.weight", "feature.3.weight"):
            assert (parameter == 1).all(), name
        elif not name.startswith("patch_embed"):
            assert abs(parameter.std().item() - 0.02) < 0.003, name


def test_how_many_tokens_are_kept() -> None:
    assert [kept_tokens(144, ratio) for ratio in (0, 0.05, 0.1, 0.25, 0.75)] == [144, 128, 128, 96, 32]
    assert kept_tokens(49, 0.1) == 32 and kept_tokens(9, 0.5) == 4 and kept_tokens(4, 0.99) == 1


def test_dropped_tokens_are_replaced_by_the_mask_token_and_not_seen() -> None:
    backbone = small(image_size=54, mask_ratio=0.4).train()  # 36 tokens, 16 of them kept
    assert backbone.kept_tokens == 16
    seen = []
    backbone.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    images = torch.randn(5, 3, 54, 54, requires_grad=True)
    torch.manual_seed(3)
    tokens, _ = backbone.tokens(images)
    assert seen == [(5, 16, 48)]
    masked = (tokens == backbone.mask_token).all(dim=2)
    assert masked.sum(dim=1).tolist() == [20] * 5 and len({tuple(row.tolist()) for row in masked}) == 5
    tokens[0].sum().backward(retain_graph=True)
    touched = images.grad.abs().sum(1).unfold(1, 9, 9).unfold(2, 9, 9).sum((3, 4)).flatten(1) > 0
    assert torch.equal(touched[0], ~masked[0]) and not touched[1:].any()
    assert torch.equal(backbone.mask_token.grad, torch.full_like(backbone.mask_token, 20.0))

    torch.manual_seed(3)
    again, _ = backbone.tokens(images)
    assert torch.equal((again == backbone.mask_token).all(dim=2), masked)  # the seed decides, nothing else
    other, _ = backbone.tokens(images)
    assert not torch.equal((other == backbone.mask_token).all(dim=2), masked)
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))  # and nothing is dropped in evaluation


def test_kept_tokens_come_back_to_their_places() -> None:
    backbone = small(image_size=54, mask_ratio=0.4, depth=1)
    with torch.no_grad():  # a block that does nothing: each token must then be what the patch alone makes of it
        backbone.blocks[0].attn.proj.weight.zero_(), backbone.blocks[0].attn.proj.bias.zero_()
        backbone.blocks[0].mlp.fc2.weight.zero_(), backbone.blocks[0].mlp.fc2.bias.zero_()
    images = torch.randn(2, 3, 54, 54)
    whole, _ = backbone.eval().tokens(images)
    part, _ = backbone.train().tokens(images)
    kept = ~(part == backbone.mask_token).all(dim=2)
    assert kept.sum().item() == 32 and torch.allclose(part[kept], whole[kept], atol=1e-5)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'vit_b'"):
        create_backbone("vitb")
    with pytest.raises(UserError, match="'drop_path'"):
        create_backbone("vit_t", droppath=0.1)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("vit_t", {"checkpoint_blocks": "half"}, "checkpoint_blocks: .*'half'"),
        ("vit_t", {"dim": 100, "heads": 8}, "dim 100 .*heads 8"),
        ("dino_vit_tiny", {"heads": 5}, "dim 192 .*heads 5"),
        ("vit_t", {"depth": -1}, "depth: .*-1"),
        ("part_fvit_tiny", {"depth": 0}, "depth: .*0"),
        ("fvit_tiny", {"heads": 2.5}, "heads: "),
        ("vit_t", {"drop_path": 1}, "drop_path: .*1"),
        ("vit_t", {"mlp_ratio": 0}, "mlp_ratio: .*0"),
        ("iresnet18", {"layers": [2, 2, 2]}, "layers: "),
    ],
)
def test_values_that_make_no_network_are_refused(name: str, value: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^backbone.*: {named}"):
        create_backbone(name, **value)


@pytest.mark.parametrize("name", [name for name in BACKBONES.names() if name != "timm"])
def test_every_backbone_is_built_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name, checkpoint_blocks="block", checkpoint_every=2)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
