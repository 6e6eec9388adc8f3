"""Networks of timm as backbones: against timm itself; trained, loaded back, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import save_file

from lvtrain.backbones import create_backbone
from lvtrain.engine.optimizers.adamw import AdamWSection
from lvtrain.engine.parameter_groups import parameter_groups
from lvtrain.errors import UserError
from lvtrain.planning import measure_network
from lvtrain.weights.models import load_model
from tests.runs import metrics, output, recipe_file, run, tool

# timm's own small networks for tests: plain, convolutional, and one with tokens and registers
NAMES = (
    "test_vit",
    "test_resnet",
    "test_convnext",
    "test_vit3",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_small_050",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_is_timms_pooled_features_through_the_head(name: str) -> None:
    backbone = create_backbone(f"timm:{name}", embedding_dim=16).eval()
    network = backbone.network
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        linear, norm = backbone.feature
        expected = torch.nn.functional.batch_norm(
            network(images) @ linear.weight.T, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=2e-5
        )
        tokens, embedding = backbone.tokens(images)
        torch.testing.assert_close(backbone(images), expected)
    torch.testing.assert_close(embedding, expected)
    assert tokens.shape == (2, backbone.num_tokens, backbone.dim) and embedding.dtype == torch.float32


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_layer_decay_and_weight_decay_are_timms(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(f"timm:{name}", embedding_dim=16)
        groups = parameter_groups(backbone, AdamWSection(layer_decay=0.5))
    ours = {n: (group.lr_scale, group.decayed) for group in groups for n in group.parameters}
    network: Any = backbone.network
    undecayed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_layer_decay(network, 0.05, no_weight_decay_list=undecayed, layer_decay=0.5)
    names = {id(parameter): n for n, parameter in network.named_parameters()}
    for group in theirs:
        for parameter in group["params"]:
            # our head stands behind timm's last layer, so that timm's layers are one step lower
            n = f"network.{names[id(parameter)]}"
            assert ours[n] == (pytest.approx(group["lr_scale"] * 0.5), group["weight_decay"] > 0), n
    assert ours["feature.0.weight"] == (1.0, True) and ours["feature.1.weight"] == (1.0, False)


def test_recomputation_changes_memory_and_not_gradients() -> None:
    def gradients(mode: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        backbone = create_backbone("timm:test_vit", embedding_dim=8, checkpoint_blocks=mode).train()
        backbone(torch.ones(4, 3, 112, 112)).square().mean().backward()
        return [p.grad for p in backbone.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients("none"), gradients("block"), strict=True))
    whole, block = (
        measure_network(mode, lambda mode=mode: create_backbone("timm:test_vit", checkpoint_blocks=mode))
        for mode in ("none", "block")
    )
    assert block.saved + block.recomputed < whole.saved == block.unrecomputed
    assert block.train_flops > whole.train_flops


@pytest.mark.parametrize(
    ("name", "overrides", "part"),
    [
        ("timm:resnet5O", {}, "timm:resnet50"),
        ("timm", {}, "timm:resnet50"),
        ("timm:test_vit", {"arguments": {"dept": 3}}, "dept"),
        ("timm:test_vit", {"checkpoint_blocks": "activation"}, "checkpoint_blocks"),
        ("timm:vgg11", {"image_size": 16}, "16 pixels"),
        ("vit_b:large", {}, "vit_b"),
    ],
)
def test_what_timm_does_not_know_is_refused(name: str, overrides: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=r"^backbone ") as caught:
        create_backbone(name, **overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_timm_network_is_trained_from_a_file_loaded_back_and_exported(tiny_faces: Path, tmp_path: Path) -> None:
    """The file is timm's own state dict, of another image size and with its classifier."""
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", img_size=160, num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        backbone={"name": "timm:test_vit", "embedding_dim": 16, "overrides": {}},
        method="classification",
        phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
        optimizer={"lr": 1e-9, "precision": "float32", "layer_decay": 0.7},  # stays what it was
        schedule={"total": "3 steps"},
        init_from=str(tmp_path / "theirs.safetensors"),
    )
    assert run(recipe, zero=3) == 0, output(recipe)
    folder = tmp_path / "runs" / "tiny"
    assert len(metrics(folder)) == 3
    model = load_model(folder)
    assert model.backbone is not None
    trained, first = model.backbone.state_dict(), theirs.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token"):
        torch.testing.assert_close(trained[f"network.{name}"], first[name], rtol=1e-4, atol=1e-6)
    assert trained["network.pos_embed"].shape != first["pos_embed"].shape  # 7 x 7 patches of 16 pixels, theirs 10 x 10

    done = tool("convert_checkpoint", "export", folder, tmp_path / "exported", "--to", "folder")
    assert done.exit_code == 0, done.output
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(load_model(tmp_path / "exported").forward(images), model.forward(images))
