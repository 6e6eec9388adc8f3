"""What a run's weights are made from, collected when the run begins; see `lvtrain.weights.provenance`."""

from __future__ import annotations

from typing import Any, cast

from lvtrain.data import ShardDataset
from lvtrain.methods.base import MethodSection
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.weights.provenance import Provenance, Terms, inherited, recipe_digest


def collect(recipe: Recipe, dataset: ShardDataset, environment: dict[str, Any]) -> Provenance:
    """The provenance of what `recipe` trains on `dataset`.

    It inherits the licences of the data, of `init_from`, and of all weights that the method names, such as a teacher.
    """
    terms = [Terms(f"data {dataset.path.name} of run {recipe.name}", dataset.manifest.licence)]
    if (start := recipe.init_from) is not None:
        terms += inherited(start.path, f"init_from of run {recipe.name}", stated=start.licence)
    method = cast(MethodSection, recipe.method)
    for key, path in method.sources().items():
        terms += inherited(path, f"method.{key} of run {recipe.name}", stated=method.stated_licences().get(key))
    return Provenance(
        licences=tuple(terms),
        dataset=dataset.path.name,
        fingerprint=dataset.fingerprint,
        recipe=recipe_digest(recipes.dump(recipe)),
        commit=environment["git"] or "",
        packages={name: version for name, version in environment["packages"].items() if version},
    )
