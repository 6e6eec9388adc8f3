"""Registries of what a recipe or a command can name: methods, margins, backbones, importers, protocols, trackers.

Each kind has one `Registry`. A class or function registers itself by a decorator in its own file, and the registry
imports the files of its room when a name is first asked for. So one new file is enough to add one more, and nothing on
a lower floor has to know it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

from pydantic import SerializeAsAny, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lvtrain.errors import UserError
from lvtrain.recipe.base import Section

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind.

    Args:
        kind: what they are called in messages, such as "margin".
        room: the package whose modules register them, such as "lvtrain.classifier.margins".
    """

    def __init__(self, kind: str, room: str) -> None:
        self.kind, self.room = kind, room
        self._entries: dict[str, T] = {}
        self._loaded = False
        self._loading = threading.RLock()  # a thread that asks while another one imports waits for the end

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that enters a class or function under one name or more.

        Raises:
            ValueError: a name is taken by something else.
        """

        def enter(entry: T) -> T:
            for name in names:
                if self._entries.setdefault(name, entry) is not entry:
                    raise ValueError(f"there are two {self.kind}s named {name!r}")
            return entry

        return enter

    def unregister(self, name: str) -> None:
        """Removes an entry (for tests that define one)."""
        self._entries.pop(name, None)

    def names(self) -> list[str]:
        self._load()
        return sorted(self._entries)

    def entries(self) -> dict[str, T]:
        """Every entry by name, in order of names."""
        return {name: self._entries[name] for name in self.names()}

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UserError: there is none; says the nearest name, and all of them.
        """
        if name not in self._entries:
            self._load_module(name)
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self.names())}")
        return self._entries[name]

    def _load_module(self, name: str) -> None:
        """Imports the file that has the entry's own name, if there is one: most have, and the others need not be read."""
        room = importlib.import_module(self.room)
        if hasattr(room, "__path__") and name.isidentifier() and importlib.util.find_spec(f"{self.room}.{name}"):
            importlib.import_module(f"{self.room}.{name}")

    def _load(self) -> None:
        with self._loading:
            if self._loaded:
                return
            self._loaded = True  # before the imports: what they import may ask for a name, too
            room = importlib.import_module(self.room)
            for module in pkgutil.iter_modules(getattr(room, "__path__", ())):
                importlib.import_module(f"{self.room}.{module.name}")


@dataclass(frozen=True)
class SectionByName:
    """A mark on a field made by `named_section`. It says which keys the field takes.

    `has_own_name`: the field's own `name` chooses its section.
    """

    has_own_name: ClassVar[bool] = True

    registry: Registry[Any]
    default: str | None = None

    def of(self, value: Any, recipe: Any) -> type[Section] | None:
        """The section's class for the field's `value` in the plain values `recipe`; None where none is named."""
        name = value.get("name", self.default) if isinstance(value, dict) else value
        try:
            return self.registry.get(name).section if isinstance(name, str) else None
        except UserError:
            return None

    def sections(self) -> dict[str, type[Section]]:
        """The section's class by the name that chooses it."""
        return {name: entry.section for name, entry in self.registry.entries().items()}


def section_by_name(field: FieldInfo) -> SectionByName | None:
    """The mark that `named_section` left on a field, or on the elements of its list; None for any other field."""
    marks = [*field.metadata, *_inner_marks(field.annotation)]
    return next((mark for mark in marks if isinstance(mark, SectionByName)), None)


def _inner_marks(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [*getattr(annotation, "__metadata__", ()), *(mark for part in inner for mark in _inner_marks(part))]


def named_section(registry: Registry[Any], default: str | None = None) -> Any:
    """The type of a recipe field whose section depends on its own `name` (a method, a margin).

    Args:
        registry: its entries have an attribute `section`, a subclass of `NamedSection`.
        default: the name where none is given.

    A bare string is short for `{name: string}`.
    """

    def validate(value: Any, handler: Any) -> Section:
        if isinstance(value, Section):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name", default), str):
            raise PydanticCustomError("unnamed", "needs a name")
        value = {"name": value.get("name", default), **value}
        try:
            section: type[Section] = registry.get(value["name"]).section
        except UserError as error:
            raise PydanticCustomError("unknown_name", "{line}", {"line": str(error)}) from error
        # a ValidationError raised in a validator keeps the places of its mistakes below this field
        return section.model_validate(value)

    return Annotated[SerializeAsAny[Section], WrapValidator(validate), SectionByName(registry, default)]


METHODS: Registry[Any] = Registry("method", "lvtrain.methods")
MARGINS: Registry[Any] = Registry("margin", "lvtrain.classifier.margins")
AUGMENTATIONS: Registry[Any] = Registry("augmentation", "lvtrain.data.augment")
