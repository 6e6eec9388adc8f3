"""The frozen network that a recipe's `method.distill` names."""

from __future__ import annotations

from lvtrain.errors import UserError
from lvtrain.methods.distill import Distill, Teacher
from lvtrain.recipe.sections import Backbone
from lvtrain.weights.architecture import Architecture, fit
from lvtrain.weights.models import finite
from lvtrain.weights.source import Source, open_source
from lvtrain.weights.space import digest_of


def open_teacher(section: Distill, student: Backbone) -> tuple[Architecture, Source, str]:
    """The teacher's architecture, its weights, and what to call it.

    Raises:
        UserError: nothing usable at the path, or another embedding_dim or image_size than the student's.
    """
    try:
        source = open_source(section.teacher, takes=section.input)
        architecture = source.architecture()
        name = f"{architecture.name} from {section.teacher}, {source.kind}"
        if source.input_line:
            name += f", takes {source.input_line}"
        for what in ("embedding_dim", "image_size"):
            theirs, ours = getattr(architecture, what), getattr(student, what)
            if theirs != ours:
                raise UserError(
                    f"{name}, has {what} {theirs}, the student {ours}; set backbone.{what}={theirs}, or give another teacher"
                )
    except UserError as error:
        raise UserError(f"method.distill.teacher: {error}") from error
    return architecture, source, name


def load_teacher(section: Distill, student: Backbone) -> Teacher:
    """The teacher on the host, frozen. `student` is the recipe's backbone.

    Raises:
        UserError: as `open_teacher`, and weights that are not finite or do not fit.
    """
    architecture, source, name = open_teacher(section, student)
    try:
        state = source.state()
        finite(state, section.teacher)
        backbone = architecture.create()
        fit(backbone, state)
    except UserError as error:
        raise UserError(f"method.distill.teacher: {error}") from error
    given = {name: tensor for name, tensor in backbone.state_dict().items() if name in state}
    return Teacher(backbone.eval().requires_grad_(False), digest_of(given), name)
