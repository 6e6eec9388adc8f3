"""Mixup's loss: an image that was mixed from two has two targets (Zhang et al., 2018, arXiv 1710.09412).

With the share q of the own class a, and 1 - q of the other image's class b, the logits and the loss are those of LAFS's
released code (`CosFace` with soft labels, and timm's `SoftTargetCrossEntropy`):

    T_a = q T(cos_a) + (1 - q) s cos_a      T: the margin's target logit
    T_b = (1 - q) T(cos_b) + q s cos_b
    L = log(exp(N) + exp(T_a) + exp(T_b)) - q T_a - (1 - q) T_b      N: over the classes other than a and b

For CosFace T_a is s (cos_a - q m). If both images have one class, it is the plain loss of that class.

Which images are mixed: each with the one at the same place of its rank's micro-batch in reverse order. An image that could
not be decoded is not mixed, and neither is its partner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvtrain.classifier.margins.base import Margin


def partner_labels(labels: Tensor, ranks: int) -> Tensor:
    """The class of the image that each image is mixed with: int64 [B], for `labels` [B] of the gathered micro-batch.

    The own label where one of the two could not be decoded.
    """
    other = labels.view(ranks, -1).flip(1).reshape(-1)
    return torch.where((labels >= 0) & (other >= 0), other, labels)


def mix(images: Tensor, labels: Tensor, share: float) -> Tensor:
    """`share` of each image and the rest of its partner: a new float tensor [m, 3, H, W].

    Args:
        images: [m, 3, H, W] of one rank's micro-batch.
        labels: int64 [m]; -1 could not be decoded.
        share: of the own image, in [0, 1].
    """
    both = ((labels >= 0) & (labels.flip(0) >= 0)).view(-1, 1, 1, 1)
    return torch.where(both, torch.lerp(images.flip(0), images, share), images)


def mixed_loss(
    margin: Margin, share: float, negatives: Tensor, cosines: list[Tensor], labels: list[Tensor], norms: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The mean loss of a gathered micro-batch, and its derivatives by N [B] and by both cosines [B].

    Args:
        margin: on the class centres.
        share: q.
        negatives: N [B].
        cosines: to the own and to the other class, [B] each.
        labels: of the own and of the other class, int64 [B] each; -1 has no loss, but counts in the mean.
        norms: [B], of the embeddings.
    """
    alone = labels[0] == labels[1]
    with torch.enable_grad():
        n, first, second = leaves = [tensor.detach().requires_grad_() for tensor in (negatives, *cosines)]
        q = torch.full_like(first, share).masked_fill(alone, 1.0)

        def target(cosine: Tensor, part: Tensor, label: Tensor) -> Tensor:
            return part * margin.target_logit(cosine, label, norms) + (1 - part) * margin.scale * cosine

        own, other = target(first, q, labels[0]), target(second, 1 - q, labels[1])
        terms = [n, own, other.masked_fill(alone, -torch.inf)]
        each = torch.logsumexp(torch.stack(terms), dim=0) - q * own - (1 - q) * other
        loss = torch.where(labels[0] >= 0, each, 0.0).sum() / max(len(labels[0]), 1)
        by_n, by_own, by_other = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), by_n, (by_own, by_other)
