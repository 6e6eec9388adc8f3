"""Backbone, classifier and their optimizers as in a step, without DeepSpeed: a digest of all their bits after some steps."""

from __future__ import annotations

import hashlib
import os
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used

import torch
from torch import Tensor

from lvtrain.backbones import create_backbone
from lvtrain.classifier import Numerics, ShardedClassifier
from lvtrain.classifier.margins import CosFace


class _Training:
    def __init__(self, name: str, classes: int) -> None:
        torch.manual_seed(0)
        self.backbone = create_backbone(name).to("cuda").train()
        self.optimizer = torch.optim.AdamW(self.backbone.parameters(), lr=1e-3, fused=True)
        dim: Any = self.backbone.embedding_dim
        numerics = Numerics("half")
        self.head = ShardedClassifier(classes, dim, margin=CosFace(), numerics=numerics, sample_rate=0.5, device="cuda")
        self.classes = classes

    def step(self, number: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(number)
        size = self.backbone.image_size
        images = torch.randn(batch, 3, size, size, generator=generator).to("cuda")
        labels = torch.randint(0, self.classes, (batch,), generator=generator)
        torch.manual_seed(number)  # drop path and masks
        self.head.begin_step(number, labels)
        with torch.autocast("cuda", torch.bfloat16):
            embeddings = self.backbone(images)
        self.head(embeddings.float(), labels.to("cuda"), step=number).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.head.end_step(lr=1e-3)

    def tensors(self) -> dict[str, Tensor]:
        """References to everything that is learned or averaged."""
        self.head.settle()
        found = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        rest = self.head.state()
        return found | {f"classifier.{name}": value.tensor for name, value in rest.items()}  # type: ignore[union-attr]

    @torch.no_grad()
    def moved(self, name: str) -> _Training:
        """New objects with the same numbers, by way of the host."""
        kept = {key: tensor.to("cpu", copy=True) for key, tensor in self.tensors().items()}
        other = _Training(name, self.classes)
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        for key, tensor in other.tensors().items():
            tensor.copy_(kept[key])
        return other


def digest(name: str, batch: int, classes: int, steps: int, moved_at: int = 0) -> str:
    """SHA-256 of all tensors after `steps` steps; `moved_at`: the step at which new objects take over."""
    torch.use_deterministic_algorithms(True)
    training = _Training(name, classes)
    for number in range(steps):
        if moved_at and number == moved_at:
            training = training.moved(name)
        training.step(number, batch)
    found = hashlib.sha256()
    for key, tensor in sorted(training.tensors().items()):
        found.update(key.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
