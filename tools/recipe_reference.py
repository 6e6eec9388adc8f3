"""Writes what is generated of two pages: all recipe keys (lvtrain/recipe/REFERENCE.md), and arcface_torch's keys.

python tools/recipe_reference.py            write them
python tools/recipe_reference.py --check    exit with 1 if one is out of date
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of recipe keys and of arcface_torch's keys.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    options = parser.parse_args(arguments)
    from lvtrain.recipe import arcface_torch, reference  # after parsing: they import every method

    is_current = True
    for page, text in ((reference.PAGE, reference.page()), (arcface_torch.PAGE, arcface_torch.page())):
        if page.is_file() and page.read_text() == text:
            continue
        is_current = False
        if options.check:
            print(f"{page} is out of date; run python tools/recipe_reference.py")
        else:
            page.write_text(text)
    return 1 if options.check and not is_current else 0


if __name__ == "__main__":
    sys.exit(main())
