"""Banks: one direction per class that follows the features and gets no gradient.

A bank is split over the ranks like the class centres. It is updated once a step, from all samples of the global batch.
The result has the same bits whatever the order of the samples and the number of ranks: the samples of a class are added
up as fixed-point integers, and a sum of integers does not depend on the order.

An update also takes the step's labels from the host, which reads them from the index. So the host knows how many samples
and classes this rank has, and does not wait for the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lvtrain.distributed.world import to_device
from lvtrain.errors import UserError

_FIXED_POINT = 2.0**40  # unit vectors in int64: resolution 1e-12, room for 4 million samples of one class in a step
_ZERO = 1e-6  # a shorter sum of unit vectors has no direction (its samples cancel), and moves nothing


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their L2 norm, float64; a zero row stays zero."""
    vectors = vectors.detach().to(torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)


class _ClassMeans:
    """The samples of a step that belong to this rank, summed up by class.

    Attributes:
        classes: int64 [k], the classes of this rank that the step has, as local rows; sorted, unique.
        segment: int64 [g], for each local sample the position of its class in `classes`.
        counted: bool [g]; False for a sample that is ignored here although the index gives it a label, because its
            image cannot be decoded.
        samples: float64 [g, d], unit vectors.
        direction: float64 [k, d], unit mean directions.
        present: bool [k]; False where no sample is counted.
        defined: bool [k]; False where none is counted, or the samples cancel.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, rows: tuple[int, int], expected: Tensor | None) -> None:
        expected = labels.cpu() if expected is None else expected
        here = expected[(expected >= rows[0]) & (expected < rows[1])] - rows[0]
        self.classes = to_device(torch.unique(here), labels.device)
        local = (labels >= rows[0]) & (labels < rows[1])  # -1 is never in range
        chosen = torch.sort(local.to(torch.uint8), descending=True, stable=True).indices[: len(here)]
        self.counted = local[chosen]
        inside = (labels[chosen] - rows[0]).clamp(0, max(rows[1] - rows[0] - 1, 0))
        self.segment = torch.searchsorted(self.classes, inside).clamp_max(max(len(self.classes) - 1, 0))
        self.samples = unit(embeddings[chosen])
        total = self.sum(self.samples)
        self.direction = unit(total)
        self.present = self.count() > 0
        self.defined = total.norm(dim=1) > _ZERO

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the counted samples by class, independent of their order: float64 [g, ...] -> float64 [k, ...].

        The values may be a few units in size.
        """
        fixed = (values * _FIXED_POINT).round().to(torch.int64)
        fixed *= self.counted.view(-1, *[1] * (values.ndim - 1))
        total = torch.zeros((len(self.classes), *values.shape[1:]), dtype=torch.int64, device=values.device)
        return total.index_add_(0, self.segment, fixed).to(torch.float64) / _FIXED_POINT

    def count(self) -> Tensor:
        """Number of counted samples of each class, int64 [k]."""
        return torch.zeros_like(self.classes).index_add_(0, self.segment, self.counted.to(torch.int64))


class _Bank(ABC):
    """Directions of the classes `rows` out of `num_classes`: float32 [n_local, d].

    They have unit length, or are zero where nothing is known yet.
    """

    _prefix: str

    def __init__(
        self, num_classes: int, dim: int, rows: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes, self.dim, self.rows = num_classes, dim, rows
        n = rows[1] - rows[0]
        self.rows_tensor = torch.zeros(n, dim, dtype=torch.float32, device=device)
        self.valid = torch.zeros(n, dtype=torch.bool, device=device)

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Starts every direction at the class centre `weight` [n_local, d], of any length."""
        if weight.shape != self.rows_tensor.shape:
            raise ValueError(f"the bank has rows {tuple(self.rows_tensor.shape)}, the weight {tuple(weight.shape)}")
        for first in range(0, len(weight), 8192):
            part = unit(weight[first : first + 8192])
            self.rows_tensor[first : first + 8192] = part.to(torch.float32)
        self.valid.fill_(True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: tensors whose dimension 0 is the local classes. References, not copies."""
        return {self._prefix: self.rows_tensor, f"{self._prefix}_valid": self.valid}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave, this rank's rows of it.

        Raises:
            UserError: names or shapes differ.
        """
        own = self.state()
        if own.keys() != state.keys():
            raise UserError(
                f"bank {self._prefix} holds {sorted(own)}, but the checkpoint has {sorted(state)}; "
                "resume with the recipe that wrote it"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"bank {self._prefix}: {name} has shape {tuple(tensor.shape)}, the checkpoint's is "
                    f"{tuple(state[name].shape)}"
                )
            tensor.copy_(state[name])

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor, expected: Tensor | None = None) -> None:
        """One update, once a step, on every rank.

        Args:
            embeddings: float [G, d], of the whole global batch, of any length.
            labels: int64 [G], -1 = ignored.
            expected: int64 [G], on the host: the same labels in any order, where -1 may still be a class. Without them
                the host waits for `labels`.
        """
        batch = _ClassMeans(embeddings, labels, self.rows, expected)
        old = self.rows_tensor[batch.classes].to(torch.float64)
        known = self.valid[batch.classes]
        new = torch.where(known.unsqueeze(1), self._moved(batch, old, known), batch.direction)
        new = unit(torch.where(batch.defined.unsqueeze(1), new, old)).to(torch.float32)
        rows = torch.where(batch.present.unsqueeze(1), new, self.rows_tensor[batch.classes])
        self.rows_tensor.index_copy_(0, batch.classes, rows)
        self.valid[batch.classes] |= batch.defined

    @abstractmethod
    def _moved(self, batch: _ClassMeans, old: Tensor, known: Tensor) -> Tensor:
        """The new directions [k, d], of any length, of classes whose direction was `old`; used where `known` (bool [k])."""


class ExpectationBank(_Bank):
    """Feature expectations of PCO (LVFace, phase 2).

        e <- alpha e + (1 - alpha) x,  alpha = sigmoid(cos(e, x)),  x of unit length

    Where the paper is silent (our reading):

    - Several samples of one class in a step count as their mean direction.
    - e is normalised after each update, because only its direction enters the loss. Without that, a class whose features
      scatter would follow them faster and faster.
    - Without `start_from`, a class is unknown until its first sample, and then takes that sample's direction. While it is
      unknown, `valid` is False, and it is left out of the sum over negatives.
    """

    _prefix = "expectation"

    def _moved(self, batch: _ClassMeans, old: Tensor, known: Tensor) -> Tensor:
        alpha = torch.sigmoid((old * batch.direction).sum(1, keepdim=True))
        return alpha * old + (1 - alpha) * batch.direction


class CentreBank(_Bank):
    """Cluster centres and their concentration (arXiv 2312.04029).

        c <- m c + (1 - m) x,  m = 0.9

    once a step, where x is the mean direction of the class's samples. The centre is normalised after each update, so that
    x.c is a cosine (our reading). A class takes its first mean direction as its centre, unless `start_from` gave it one.

    The concentration is that of PCL (arXiv 2005.04966); smaller is tighter:

        phi = sum_z |x_z - c| / (Z log(Z + alpha)),  over the Z most recent features

    It is kept as a running mean distance and a count, so no feature is stored (our reading):

    - A distance is to the centre before the step that brought the feature. A centre that already contains the feature
      would make small classes look too tight.
    - The mean is exact up to `window` features. Beyond that, the older distances are weighted down by the share that the
      new ones take.
    """

    _prefix = "centre"

    def __init__(
        self,
        num_classes: int,
        dim: int,
        rows: tuple[int, int],
        *,
        momentum: float = 0.9,
        window: int = 100,
        alpha: float = 10.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_classes, dim, rows, device=device)
        if not 0 <= momentum < 1 or window < 1 or alpha <= 0:
            raise UserError(
                f"centre bank needs 0 <= momentum < 1, window >= 1, alpha > 0, got {momentum}, {window}, {alpha}"
            )
        self.momentum, self.window, self.alpha = momentum, window, alpha
        self.mean_distance = torch.zeros(rows[1] - rows[0], dtype=torch.float64, device=device)
        self.count = torch.zeros(rows[1] - rows[0], dtype=torch.int64, device=device)

    def _moved(self, batch: _ClassMeans, old: Tensor, known: Tensor) -> Tensor:
        distance = batch.sum((batch.samples - old[batch.segment]).norm(dim=1))
        self._follow(batch.classes, torch.where(known, batch.count(), 0), torch.where(known, distance, 0.0))
        return self.momentum * old + (1 - self.momentum) * batch.direction

    def _follow(self, classes: Tensor, added: Tensor, distance: Tensor) -> None:
        kept = torch.minimum(self.count[classes], (self.window - added).clamp_min(0))
        total = (self.mean_distance[classes] * kept + distance) / (kept + added).clamp_min(1)
        self.mean_distance[classes] = torch.where(added > 0, total, self.mean_distance[classes])
        self.count[classes] = torch.where(added > 0, (kept + added).clamp_max(self.window), self.count[classes])

    def concentration(self) -> Tensor:
        """Concentration phi of each class, float64 [n_local]; 0 while `measured` is False."""
        return self.mean_distance / torch.log(self.count + self.alpha)

    @property
    def measured(self) -> Tensor:
        """Classes with at least one measured distance, bool [n_local]."""
        return self.count > 0

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "centre_mean_distance": self.mean_distance, "centre_count": self.count}
