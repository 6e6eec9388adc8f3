"""Bytes that the classifier's passes read and write in the GPU's memory, operation by operation.

`tests/test_planning_passes.py` counts the operations of `lvtrain.classifier.passes` and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from lvtrain.planning.setup import ClassCentres


@dataclass(frozen=True)
class PassBytes:
    """Bytes for one element of what a pass goes over.

    Attributes:
        logit: for each pair of image and class.
        row: for each number of the class centres that take part.
        image: for each number of the batch's embeddings, in every chunk of classes.
    """

    logit: float
    row: float
    image: float

    def of(self, batch: int, part: int, dim: int, chunk: int) -> float:
        """Bytes for `batch` images and `part` classes of `dim` numbers, `chunk` classes at a time."""
        return self.logit * batch * part + self.row * part * dim + self.image * batch * dim * (part / chunk)


def first_pass(classes: ClassCentres, *, unit: bool = False) -> PassBytes:
    """The sums over the negatives, and the embeddings' gradient. `unit`: of unit vectors, as a bank has them."""
    operand, running = classes.operand_bytes, classes.follows_maximum
    fused = classes.kernel == "triton"
    logit = 4.0 + operand  # written by one matmul, read by another
    if fused:
        logit += 4 + operand  # one kernel; what the running maximum reads twice comes from the cache
    else:
        logit += 8 + 4 + _rounded(operand)  # exponentiated, summed, lifted out of float16's subnormals while rounded
        logit += 4 + 8 if running else 0  # the largest found, and subtracted
        logit += 14 if classes.filtered else 0  # compared, and filled
    row = 2.0 * operand  # both matmuls
    if unit:
        row += _rounded(operand)
    else:
        row += (0 if fused else 4) + 4 + operand  # norms, unit vectors
    summed = 4 + 12 if operand == 2 else 8  # the product written and added, or added by the matmul
    return PassBytes(logit, row + _gathered(classes), operand + summed + (8 if running else 0))


def both_passes(classes: ClassCentres, kept: float) -> PassBytes:
    """Returns the bytes of the first pass and of the class centres' gradient together.

    Args:
        classes: sizes and settings of the class centres.
        kept: share of the classes whose exponentials the second pass finds; the others are computed again.
    """
    first, operand, fused = first_pass(classes), classes.operand_bytes, classes.kernel == "triton"
    logit = 4.0 + operand
    if fused:
        logit += 4 + operand
    else:
        logit += 4 + operand + (8 if classes.follows_maximum else 0) + (14 if classes.filtered else 0)
    again = 1 - kept
    row = 16.0 if fused else 44.0  # the product written, and taken through the normalisation
    row += again * (4 + 2 * operand) + _gathered(classes)
    row += 8 if classes.sample_rate < 1 else 0  # written where the classes that take part belong
    image = (1 + again) * operand
    if classes.follows_maximum:  # each chunk was kept with another maximum, which goes into the embeddings
        image += kept * (8 + _rounded(operand))
    return PassBytes(first.logit + kept * operand + again * logit, first.row + row, first.image + image)


def _rounded(operand: int) -> int:
    """Float32 numbers brought into the format of the matmul."""
    return 4 + operand if operand == 2 else 0


def _gathered(classes: ClassCentres) -> int:
    """Sampled class centres are copied out, chunk by chunk."""
    return 8 if classes.sample_rate < 1 else 0
