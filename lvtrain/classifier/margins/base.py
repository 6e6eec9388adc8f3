"""The base class of all margins."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import Tensor, nn

from lvtrain.errors import UserError
from lvtrain.recipe.classifier import MarginSection


class Margin(nn.Module):
    """From the cosine of a sample to its own class centre to the target logit T.

    A margin is a section of the recipe (its parameters) and `target_logit`. The classifier passes it the target cosines
    of the gathered batch, and never asks which margin it is. A margin does not see the negatives.

    A subclass names its section of the recipe in `section`, and is registered under the name that recipes use:
    `@MARGINS.register("cosface")`.

    Args:
        settings: the parameters, as a recipe has them. Or give them by name: `CosFace(m=0.35)`.

    Attributes:
        section: the model of its part of a recipe.
        settings: the parameters.
        scale: s, the factor on every cosine.
        filter_threshold: negatives with a larger cosine are dropped; None = none are.
        warmup_factor: the share of the margin that applies, from 0 to 1; `ShardedClassifier.begin_step` sets it.
        reads_norms: whether `target_logit` needs `norms`.

    Raises:
        UserError: a parameter that does not exist or is out of range.
    """

    section: ClassVar[type[MarginSection]]
    reads_norms: ClassVar[bool] = False
    settings: MarginSection

    def __init_subclass__(cls) -> None:
        """`help()` shows a margin's parameters, which its section describes."""
        super().__init_subclass__()
        if "section" not in vars(cls):
            return
        fields = {name: field for name, field in cls.section.model_fields.items() if name not in ("name", "warmup")}
        lines = [f"    {name}: {field.description}; by default {field.default}." for name, field in fields.items()]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])

    def __init__(self, settings: MarginSection | None = None, **parameters: Any) -> None:
        super().__init__()
        self.settings = self._read(parameters) if settings is None else settings
        self.scale, self.filter_threshold = self.settings.scale, self.settings.filter_threshold
        self.warmup_factor = 1.0

    @classmethod
    def _read(cls, parameters: dict[str, Any]) -> MarginSection:
        try:
            return cls.section(**parameters)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise UserError(f"{cls.__name__} has {', '.join(sorted(cls.section.model_fields))}; {said}") from error

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        """T, already times the scale: [B].

        Args:
            cosine: [B], to the sample's own class centre.
            labels: int64 [B], -1 = ignored.
            norms: [B], of the embeddings before they were normalised.
            context: what the method gives, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define target_logit")

    def end_step(self, norms: Tensor, labels: Tensor) -> None:
        """Updates the margin's statistics once a step, from all samples of the global batch: norms [G], labels [G].

        The same on every rank. Samples labelled -1 do not count. Called only where `reads_norms`.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, the same on every rank. Most margins have nothing."""
        return dict(self.named_buffers())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UserError: the names differ.
        """
        own = dict(self.named_buffers())
        if own.keys() != state.keys():
            name = type(self).__name__
            raise UserError(
                f"margin {name} holds {sorted(own)}, but the checkpoint {sorted(state)}; use the same margin"
            )
        for name, buffer in own.items():
            buffer.copy_(state[name])
