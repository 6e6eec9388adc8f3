"""Writes the page of all recipe keys, lvtrain/recipe/REFERENCE.md, from the recipe's fields.

python tools/recipe_reference.py            write it
python tools/recipe_reference.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write lvtrain/recipe/REFERENCE.md from the recipe's fields.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args(arguments)
    from lvtrain.recipe.reference import PAGE, page  # after parsing: it imports every method

    text = page()
    is_current = PAGE.is_file() and PAGE.read_text() == text
    if options.check:
        print(f"{PAGE} is {'up to date' if is_current else 'out of date; run python tools/recipe_reference.py'}")
        return 0 if is_current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
