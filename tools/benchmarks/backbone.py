"""Images/s of a backbone's training step (forward, backward, fused AdamW), against the machine's matmul rate and arcface_torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lvtrain.backbones import BACKBONES, create_backbone
from lvtrain.backbones.vit import VisionTransformer as OurViT
from lvtrain.errors import UserError
from tools.benchmarks.measure import Clock, describe, machine_rates, median, peak_memory, pick_device, profile

SMALL: dict[str, Any] = {"name": "vit_nano", "batch": 8, "steps": 2, "precision": "float32"}


def run(
    name: str = "vit_nano",
    batch: int = 32,
    steps: int = 5,
    device: str = "auto",
    precision: str = "bfloat16",
    compile: bool = False,
    checkpoint_blocks: str = "none",
    checkpoint_every: int = 1,
    mask_ratio: float | None = None,
    peer: Path | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """Images per second, TFLOP/s (three forwards, nothing recomputed), MFU, breakdown in ms, peak memory.

    peer: measure the same of arcface_torch. mask_ratio: None = the backbone's. Flops are counted for the tokens that go
    through the blocks.
    """
    place = pick_device(device)
    overrides: dict[str, Any] = {} if mask_ratio is None else {"mask_ratio": mask_ratio}
    torch.manual_seed(0)
    backbone = create_backbone(
        name, checkpoint_blocks=checkpoint_blocks, checkpoint_every=checkpoint_every, **overrides
    ).to(place)
    images = torch.randn(batch, 3, backbone.image_size, backbone.image_size, device=place)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(place.type, torch.bfloat16, enabled=precision == "bfloat16")

    result: dict[str, Any] = {
        "subject": "backbone",
        "name": name,
        "batch": batch,
        "precision": precision,
        "compile": compile,
        "checkpoint_blocks": checkpoint_blocks,
        "checkpoint_every": checkpoint_every,
        "device": describe(place),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        **machine_rates(place, precision),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.train()(images[:2])
    flops = 3 * counter.get_total_flops() / 2
    result["train_gflop_per_image"] = round(flops / 1e9, 3)
    if compile:
        result["compile_difference"] = _compile_difference(backbone, images[: min(batch, 8)], autocast)
        backbone.compile()
    variants = {"lvtrain": _step(backbone, images, autocast)}
    result["peak_memory_gb"] = peak_memory(variants["lvtrain"], place)
    if peer:
        variants["arcface_torch"] = _step(_peer(peer, name, backbone).to(place), images, autocast, foreach=True)
        variants["arcface_torch"](None), variants["arcface_torch"](None)
    clocks: dict[str, list[Clock]] = {variant: [] for variant in variants}
    for _ in range(steps):  # interleaved, so that other load on the machine affects both
        for variant, step in variants.items():
            clock = Clock(place)
            clock.mark("start")
            step(clock)
            clocks[variant].append(clock)
    # read at the end: reading after every step would let the device wait
    for variant, taken in clocks.items():
        found = [clock.seconds() for clock in taken]
        total = median([sum(parts.values()) for parts in found])
        figures = {
            "images_per_second": round(batch / total, 2),
            "tflops": float(f"{flops * batch / total / 1e12:.4g}"),
            "mfu": round(flops * batch / total / 1e12 / result["matmul_tflops"], 4),
            "ms": {part: round(median([parts[part] for parts in found]) * 1e3, 3) for part in found[0]},
        }
        result |= figures if variant == "lvtrain" else {variant: figures}
    if peer:
        result["times_arcface_torch"] = round(
            result["images_per_second"] / result["arcface_torch"]["images_per_second"], 3
        )
    if profiled:
        result["profile"] = profile(lambda: variants["lvtrain"](None), place)
    return result


def _step(
    module: nn.Module, images: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]], foreach: bool = False
) -> Callable[[Clock | None], None]:
    """A training step that marks the ends of forward, backward and optimizer.

    foreach: use torch's default AdamW, as arcface_torch does.
    """
    module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=foreach or None, fused=not foreach or None)

    def step(clock: Clock | None) -> None:
        with autocast():
            embedding = module(images)
        loss = embedding.float().square().mean()
        if clock:
            clock.mark("forward")
        loss.backward()
        if clock:
            clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if clock:
            clock.mark("optimizer")

    return step


def _compile_difference(
    backbone: nn.Module, images: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, float]:
    """Largest relative difference (of norms) that torch.compile makes to embeddings and gradients, in evaluation mode.

    `bfloat16` is the same measure between autocast and float32 in eager mode, to compare with.
    """
    backbone.eval()
    direction = torch.randn(len(images), cast(int, backbone.embedding_dim), device=images.device)

    def gradients(module: Callable[..., torch.Tensor], half: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        backbone.zero_grad()
        with autocast() if half else torch.autocast(images.device.type, enabled=False):
            embedding = module(images)
        (embedding * direction).sum().backward()
        return embedding.detach(), {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}

    def difference(a: Any, b: Any) -> tuple[float, float]:
        rows = float(((a[0] - b[0]).norm(dim=1) / b[0].norm(dim=1)).max())
        return rows, max(float((a[1][key] - b[1][key]).norm() / b[1][key].norm().clamp_min(1e-12)) for key in b[1])

    eager, full = gradients(backbone, True), gradients(backbone, False)
    compiled = gradients(torch.compile(backbone), True)
    backbone.zero_grad()
    (embedding, gradient), (half_embedding, half_gradient) = difference(compiled, eager), difference(eager, full)
    return {
        "embedding": embedding,
        "gradient": gradient,
        "bfloat16_embedding": half_embedding,
        "bfloat16_gradient": half_gradient,
    }


def _peer(path: Path, name: str, like: Any) -> nn.Module:
    """arcface_torch's module of the same shape with our weights, without gradient checkpointing."""
    import timm.layers

    if not (path / "backbones" / "vit.py").is_file():
        raise UserError(
            f"--peer {path} has no backbones/vit.py; give the folder recognition/arcface_torch of an insightface checkout"
        )
    sys.modules.setdefault("timm.models.layers", timm.layers)  # the name older timm had for it
    sys.path.insert(0, str(path))
    try:
        import backbones  # type: ignore[import-not-found]
        from backbones.vit import VisionTransformer  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(path))
    if isinstance(like, OurViT):
        shape = BACKBONES.get(name).keywords
        module = VisionTransformer(
            img_size=like.image_size,
            patch_size=shape.get("patch", 9),
            num_classes=like.embedding_dim,
            embed_dim=shape["dim"],
            depth=len(like.blocks),
            num_heads=shape["heads"],
            drop_path_rate=shape.get("drop_path", 0.0),
            norm_layer="ln",
            mask_ratio=0.1 if like.kept_tokens < like.num_tokens else 0,
        )
    elif name.startswith("iresnet"):
        module = backbones.get_model("r" + name.removeprefix("iresnet"), fp16=False, num_features=like.embedding_dim)
    else:
        raise UserError(f"arcface_torch has no {name}; leave --peer out")
    module.load_state_dict(like.state_dict())
    return module
