"""DeepSpeed's JSON against the recipe, and which parameter lands in which group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lvtrain.backbones import Backbone, create_backbone
from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.engine.optimizers.adamw import AdamWSection
from lvtrain.engine.parameter_groups import parameter_groups
from lvtrain.errors import UserError
from lvtrain.recipe.sections import Phase

ROOT = Path(__file__).resolve().parent.parent
PHASE = Phase(name="one", global_batch=48, micro_batches=6)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_files_of_the_project_resolve(path: Path) -> None:
    config = resolve_ds_config(path, optimizer=AdamWSection(clip=2.0), phases=[PHASE], world_size=2)
    assert config["zero_optimization"]["stage"] == int(path.stem[4])
    assert config["gradient_clipping"] == 0.0 and config["timers"]["throughput"]["enabled"] is False
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def test_precision_is_the_recipes_and_communication_the_jsons() -> None:
    def resolve(precision: Any = "bfloat16", **says: Any) -> dict[str, Any]:
        return resolve_ds_config({"zero_optimization": {}} | says, optimizer=AdamWSection(precision=precision))

    assert "lower_precision_safe_modules" not in resolve(communication_data_type="bf16")["torch_autocast"]
    assert resolve(communication_data_type="auto") == resolve(communication_data_type="fp32") == resolve()
    assert "torch_autocast" not in resolve("float32")
    assert resolve("float32")["communication_data_type"] == "fp32"
    assert resolve("float32", communication_data_type="bf16")["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    ("says", "named"),
    [
        ({"train_batch_size": 64}, "train_batch_size: 64 .*'one' .*48 .*2 ranks"),
        ({"gradient_accumulation_steps": 6}, "gradient_accumulation_steps: 6 .*3"),
        ({"train_micro_batch_size_per_gpu": 9}, "train_micro_batch_size_per_gpu: 9 .*8"),
        ({"gradient_clipping": 1.0}, r"optimizer\.clip is 5\.0"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"torch_autocast": {"enabled": False}}, r"torch_autocast.*optimizer\.precision.*bfloat16"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"optimizer": {"type": "Lion"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimization'"),
        ({}, "zero_optimization"),
        ({"zero_optimization": {"stage": 4}}, "stage.*4"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param"),
    ],
)
def test_a_disagreement_is_refused(says: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve_ds_config(says, optimizer=AdamWSection(), phases=[PHASE], world_size=2)


def test_agreement_and_auto_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": 48,
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "bf16": {"enabled": False},
                "zero_optimization": {},
            }
        )
    )
    config = resolve_ds_config(path, optimizer=AdamWSection(), phases=[PHASE], world_size=2)
    assert not config.keys() & {"train_batch_size", "gradient_accumulation_steps", "bf16"}
    assert config["zero_optimization"]["stage"] == 1
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        resolve_ds_config(path, optimizer=AdamWSection())
    with pytest.raises(UserError, match=r"none\.json.*zero1\.json"):
        resolve_ds_config(tmp_path / "none.json", optimizer=AdamWSection())


class Tiny(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(4, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 8))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2, bias=False)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_decay_is_by_name() -> None:
    decay, rest = parameter_groups(Tiny(), AdamWSection(weight_decay=0.3))
    assert decay.parameters == ("patch_embed.weight", "blocks.0.weight", "blocks.1.weight", "head.weight")
    assert decay.decayed and not rest.decayed
    assert {"pos_embed", "mask_token", "norm.weight", "norm.bias", "blocks.0.bias"} <= set(rest.parameters)
    (everything,) = parameter_groups(Tiny(), AdamWSection(weight_decay=0.3, decay_norms=True))
    assert len(everything.parameters) == 11 and everything.decayed


def test_layer_decay_scales_with_depth() -> None:
    groups = parameter_groups(Tiny(), AdamWSection(layer_decay=0.5))
    scales = {name: group.lr_scale for group in groups for name in group.parameters}
    assert {scales[name] for name in ("patch_embed.weight", "patch_embed.bias", "pos_embed", "mask_token")} == {0.125}
    assert (scales["blocks.0.weight"], scales["blocks.1.bias"]) == (0.25, 0.5)
    assert (scales["norm.weight"], scales["head.weight"]) == (1.0, 1.0)


def test_layer_decay_of_part_fvit() -> None:
    """The powers of LAFS's released code: 12 blocks, the landmark CNN before them; wrapped as the anchored option wraps it."""
    with torch.device("meta"):
        backbone = nn.ModuleDict({"backbone": create_backbone("part_fvit_tiny", embedding_dim=512)})
    groups = parameter_groups(backbone, AdamWSection(layer_decay=0.58))
    scales = {name.removeprefix("backbone."): group.lr_scale for group in groups for name in group.parameters}
    first = {"cls_token", "pos_embedding"}
    for name, scale in scales.items():
        if name in first or name.startswith(("patch_to_embedding.", "stn.", "output_layer.")):
            power = 13
        elif name.startswith("transformer.layers."):
            power = 12 - int(name.split(".")[2])
        else:
            power = 0  # mlp_head
        assert scale == pytest.approx(0.58**power), name
    assert first <= scales.keys() and {"mlp_head.1.weight", "stn.blocks.3.1.conv_pw.weight"} <= scales.keys()


def test_layer_decay_counts_the_blocks_of_a_cnn_through_its_stages() -> None:
    with torch.device("meta"):
        backbone = create_backbone("iresnet18")
    scales = {
        name: g.lr_scale for g in parameter_groups(backbone, AdamWSection(layer_decay=0.5)) for name in g.parameters
    }
    expected = {
        "conv1.weight": 9,
        "layer1.0.conv1.weight": 8,
        "layer2.1.bn1.bias": 5,
        "layer4.1.prelu.weight": 1,
        "fc.bias": 0,
    }
    assert {name: scales[name] for name in expected} == {name: 0.5**power for name, power in expected.items()}


def test_layer_decay_sees_blocks_of_a_wrapped_backbone() -> None:
    groups = parameter_groups(nn.ModuleDict({"backbone": Tiny()}), AdamWSection(layer_decay=0.5))
    scales = {name: group.lr_scale for group in groups for name in group.parameters}
    assert scales["backbone.blocks.0.weight"] == 0.25 and scales["backbone.pos_embed"] == 0.125


def test_nothing_trainable_is_an_error() -> None:
    module = Tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(module, AdamWSection())
