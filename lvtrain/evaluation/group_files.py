"""The file of groups: which identity, template or image belongs to which group.

A table of comma-separated values under a header line. One column says what is grouped, and `group` names the group:

- `identity,group` for labelled sets: the name of the identity (its folder), or its label where the set has no names;
- `template,group` for IJB;
- `image,group` for `.bin` files: the position of the image, from 0; pair k has the images 2k and 2k + 1.

Further columns are ignored. What is not in the table has no group.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lvtrain.errors import UserError


def read_groups(path: Path, key: str) -> dict[str, str]:
    """What is grouped -> its group.

    Args:
        path: the file.
        key: `identity`, `template` or `image`.

    Raises:
        UserError: no such file, another header, an empty field, or two groups for one key.
    """
    found: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = table.fieldnames or []
            if columns.count(key) != 1 or columns.count("group") != 1:
                raise UserError(f"{path} begins with {','.join(columns)}; this benchmark needs the columns {key},group")
            for row in table:
                name, group = (row[key] or "").strip(), (row["group"] or "").strip()
                if not name or not group:
                    raise UserError(
                        f"{path}, line {table.line_num}: {key} or group is empty; remove the line or fill it in"
                    )
                if found.setdefault(name, group) != group:
                    raise UserError(f"{path}, line {table.line_num}: {name} has two groups; keep one of its lines")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of {key},group: {error}") from error
    return found


def groups_of(path: Path, key: str, names: Sequence[str]) -> np.ndarray:
    """The group of each of `names`, object [N]; None for a name that is not in the file.

    Raises:
        UserError: as `read_groups`, or a file that names none of them.
    """
    found = read_groups(path, key)
    groups = np.array([found.get(name) for name in names], dtype=object)
    if not any(group is not None for group in groups):
        example = f"such as {next(iter(found))}, " if found else ""
        raise UserError(
            f"{path}: none of its {len(found)} names ({example}column {key}) is in the benchmark; "
            f"write them as the benchmark does, such as {names[0]}"
        )
    return groups
