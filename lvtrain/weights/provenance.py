"""What weights were made from: licences that they inherit, data and code. It is saved with a model.

A run keeps it in `provenance.json`, an exported folder in `config.json`, an ONNX file in its metadata. Runs and files of
earlier versions, and others' files, have none: their licences are unknown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lvtrain.data.index import read_manifest
from lvtrain.data.subset import read_subset
from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.recipe import files as recipes
from lvtrain.weights.licences import Use, commercial_use, strictest
from lvtrain.weights.source import CONFIG

FILE = "provenance.json"  # in a run's folder
METADATA = "lvtrain.provenance"  # key of an ONNX file's metadata


@dataclass(frozen=True)
class Terms:
    """The licence of one source of the weights: `of` names the source; `licence` is None where it is not stated."""

    of: str
    licence: str | None = None

    @property
    def use(self) -> Use:
        """Whether it allows commercial use."""
        return commercial_use(self.licence)

    def __str__(self) -> str:
        return f"{self.of}: {self.licence or 'no licence stated'} ({self.use})"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from; empty fields are not known.

    Attributes:
        licences: of the data, and of all weights they began from or were taught by. The strictest counts.
        dataset: name of the data of the last training.
        fingerprint: of that data.
        recipe: 16 hexadecimal digits of the SHA-256 of the resolved recipe.
        commit: of lvtrain's repository, at the training's start.
        packages: versions by name.
    """

    licences: tuple[Terms, ...] = ()
    dataset: str = ""
    fingerprint: str = ""
    recipe: str = ""
    commit: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def commercial(self) -> Use:
        """Whether all licences allow commercial use: the strictest of them."""
        return strictest(terms.use for terms in self.licences)

    def check_commercial(self, name: str) -> None:
        """Refuses commercial use unless every licence allows it.

        Raises:
            UserError: it names each licence that does not, and its source.
        """
        if self.commercial == "yes":
            return
        against = [str(terms) for terms in self.licences if terms.use != "yes"] or ["nothing is known of its data"]
        raise UserError(
            f"{name} is not for commercial use: {'; '.join(against)}. Train on data and from weights whose licence allows it, "
            "or state a licence that was not stated (--licence of pack_dataset or import, init_from.licence, "
            "method.distill.licence)"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)


def from_json(values: Mapping[str, Any]) -> Provenance:
    """What `as_json` gave; keys of later versions are left out."""
    known = {name: value for name, value in values.items() if name in Provenance.__dataclass_fields__}
    terms = tuple(Terms(str(part["of"]), part.get("licence")) for part in known.pop("licences", ()))
    return Provenance(licences=terms, **known)


def recipe_digest(text: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a resolved recipe."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance_of(path: str | Path, *, stated: str | None = None) -> Provenance:
    """What is known of the weights at `path`: a run, a checkpoint, an exported folder, an ONNX file or others' file.

    Args:
        path: the file or folder.
        stated: the licence of their data, from the user, where they record none. A recorded licence counts all the same.

    Raises:
        UserError: a record that cannot be read.
    """
    path = Path(path)
    try:
        found = _recorded(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its provenance cannot be read ({type(error).__name__}: {error})") from error
    terms = found.licences or (Terms(f"weights {path.name}"),)
    if stated:
        filled = [replace(part, licence=stated) if part.use == "unknown" else part for part in terms]
        if commercial_use(stated) != "yes" and stated not in {part.licence for part in filled}:
            filled.append(Terms(f"weights {path.name}, as stated", stated))
        terms = tuple(filled)
    return replace(found, licences=terms)


def inherited(path: Path, how: str, *, stated: str | None = None) -> tuple[Terms, ...]:
    """The licences that a training takes over from weights at `path`; `how` is the recipe's key that names them.

    Weights that are gone or cannot be read leave an unknown licence.
    """
    try:
        found = provenance_of(path, stated=stated).licences if path.exists() else ()
    except (UserError, OSError):
        found = ()
    found = found or (Terms(f"weights {path.name}", stated),)
    return tuple(replace(terms, of=f"{terms.of}, by {how}") for terms in found)


def _recorded(path: Path) -> Provenance:
    if path.suffix == ".onnx" and path.is_file():
        from lvtrain.weights.space import read_metadata

        text = read_metadata(path)[0].get(METADATA)
        return from_json(parse_json(text)) if text else Provenance()
    path = path.absolute()
    if (path / CONFIG).is_file():
        section = parse_json((path / CONFIG).read_text()).get("lvtrain", {})
        return _of_card(section.get("card") or {}, path.name)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if (run / FILE).is_file():
        return from_json(parse_json((run / FILE).read_text()))
    return _of_old_run(run) if (run / "recipe.yaml").is_file() else Provenance()


def _of_card(card: Mapping[str, Any], name: str) -> Provenance:
    if card.get("provenance"):
        return from_json(card["provenance"])
    # version 0.1 recorded the data's licence, and only the paths of other weights
    parts = [Terms(str(part)) for part in card.get("made_from") or ()]
    return Provenance(licences=(Terms(f"data of {name}", card.get("data_licence")), *parts))


def _of_old_run(run: Path) -> Provenance:
    """The provenance of a run without a record, from its recipe and its `environment.json`."""
    text = (run / "recipe.yaml").read_text()
    values = recipes.of_run(text)
    noted = run / "environment.json"
    environment = parse_json(noted.read_text()) if noted.is_file() else {}
    data = Path(values["data"]["path"])
    terms = [Terms(f"data {data.name} of run {run.name}", data_licence(run, data))]
    method = values["method"]
    for how, section, key in (
        ("init_from", values.get("init_from"), "path"),
        ("distill", method.get("distill"), "teacher"),
    ):
        if section:
            terms.append(Terms(f"weights {Path(section[key]).name}, by {how}"))
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    return Provenance(tuple(terms), data.name, "", recipe_digest(text), environment.get("git") or "", packages)


def data_licence(run: Path, data: Path) -> str | None:
    """The licence that the run recorded at its start; without a record, the dataset's, if it still exists."""
    noted = run / "environment.json"
    if noted.is_file() and (licence := parse_json(noted.read_text()).get("data_licence")):
        return str(licence)
    try:
        is_subset = data.suffix == ".json" and data.name != "dataset.json"
        return read_manifest(read_subset(data)[0] if is_subset else data).licence
    except (UserError, OSError):
        return None
