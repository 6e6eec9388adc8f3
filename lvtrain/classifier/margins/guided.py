"""ArcFace with one margin per class, which the method gives."""

from __future__ import annotations

import torch
from torch import Tensor

from lvtrain.classifier.margins.angular import angular_target
from lvtrain.classifier.margins.base import Margin
from lvtrain.recipe.classifier import MarginSection


class ClusterGuidedSection(MarginSection):
    """Scale and filter threshold, as of every margin. A recipe cannot choose it."""

    name: str = "cluster_guided"


class ClusterGuided(Margin):
    """Cluster-guided ArcFace (arXiv 2312.04029): T_i = s cos(theta_i + m_{y_i}).

    It is not registered, because a recipe cannot give the margins. Method `cluster` gives them as context: `classes`
    int64 [P], the sorted distinct labels of the step, and `margins` float [P], in radians. If all margins are m, it is
    ArcFace(m), bit for bit.
    """

    section = ClusterGuidedSection

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        classes, margins = context["classes"], context["margins"]
        if not len(classes):  # nothing but ignored samples
            return self.scale * cosine
        place = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)  # -1 reads some margin, at weight 0
        return self.scale * angular_target(cosine, 1.0, self.warmup_factor * margins[place].to(cosine.dtype))
