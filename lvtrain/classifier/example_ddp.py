"""`ShardedClassifier` in a training loop of your own: DDP averages the backbone's gradients, the class centres stay divided over the ranks.

    torchrun --nproc-per-node 2 lvtrain/classifier/example_ddp.py

`tests/test_classifier_example.py` compares `train` with one process, materialised logits and `torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lvtrain


def train(
    backbone: torch.nn.Module,
    classifier: lvtrain.ShardedClassifier,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    lr: float,
) -> list[float]:
    """Trains on this rank's batches, of images and labels int64 [b]; every rank has equally many. Returns the loss of each step."""
    model = DistributedDataParallel(backbone)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)  # the class centres have their own
    losses = []
    for step, (images, labels) in enumerate(batches):
        of_all_ranks = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all_ranks, labels)
        classifier.begin_step(step, torch.cat(of_all_ranks))  # chooses the negatives, where sample_rate is below 1
        loss = classifier(model(images), labels, step=step).loss  # of the samples of all ranks, and the same on each
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        classifier.end_step(lr=lr)
        losses.append(loss.item())
    return losses


def main() -> list[float]:
    """Ten steps on random images."""
    if not dist.is_initialized():
        dist.init_process_group()
    rank = dist.get_rank()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    backbone = lvtrain.create_backbone("mobilefacenet", embedding_dim=128).to(device)
    classifier = lvtrain.ShardedClassifier(1000, 128, margin=lvtrain.CosFace(m=0.4), sample_rate=0.5, device=device)
    draws = torch.Generator().manual_seed(rank)
    images = torch.rand(8, 3, 112, 112, generator=draws).to(device) * 2 - 1
    labels = torch.randint(1000, (8,), generator=draws).to(device)
    return train(backbone, classifier, [(images, labels)] * 10, lr=0.1)


if __name__ == "__main__":
    for step, loss in enumerate(main()):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.3f}")
    dist.destroy_process_group()
