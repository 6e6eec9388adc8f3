"""The cards at the heads of the recipes: whose figures they hold, and where each is from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lvtrain.recipe import files as recipes

FOLDER = Path(recipes.__file__).parents[1] / "recipes"
# who may have measured a figure: a paper, a repository, a reference curve, or this code
SOURCE = re.compile(
    r"\bthe paper|'s paper\b|\bpaper's\b|arcface_torch|CVLface|curves/\w+\.json|measured with this code"
)
RESULTS = ("expected", "baseline", "curve")
PUBLISHED = [path for path in sorted(FOLDER.glob("*.yaml")) if not re.search("quickstart|ablation", path.stem)]


def card(path: Path) -> dict[str, str]:
    """The fields of a recipe's card."""
    fields: dict[str, str] = {}
    name = "title"
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if found := re.match(r"#   ([\w']+)  +(\S.*)", line):
            name = found[1]
            fields[name] = fields.get(name, "") + " " + found[2]
        else:
            fields[name] = fields.get(name, "") + " " + line.lstrip("# ")
    return {name: text.strip() for name, text in fields.items()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_result_on_a_card_has_its_source(path: Path) -> None:
    fields = card(path)
    for name in RESULTS:
        for sentence in re.split(r"(?<=\w)\. +", fields.get(name, "")):
            if re.search(r"\b\d\d\.\d|\d%", sentence):
                assert SOURCE.search(sentence), f"{path.name}, {name}: {sentence}"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_card_parts_the_source_from_what_is_ours(path: Path) -> None:
    fields = card(path)
    assert {"command", "hardware", "source", "ours", "expected"} <= fields.keys()
    assert re.search(r"paper|arcface_torch|CVLface|released code", fields["source"])


def test_a_figure_without_a_source_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# x\n#   expected  the paper: LFW 99.8. IJB-C 97.1\nname: x\n")
    with pytest.raises(AssertionError, match=r"IJB-C 97\.1"):
        test_every_result_on_a_card_has_its_source(path)


def test_the_published_batches_and_figures_of_pco() -> None:
    """LVFace, section 4: 64 GPUs with 384, then 128 images each; and its table on Glint360K."""
    for name in ("pco_vitb_glint360k", "pco_vitl_webface42m", "pco_vith_webface42m"):
        recipe = recipes.load(FOLDER / f"{name}.yaml")
        assert [phase.global_batch for phase in recipe.phases] == 3 * [64 * 384] + [64 * 128]
    expected = card(FOLDER / "pco_vitb_glint360k.yaml")["expected"]
    assert re.findall(r"\d\d\.\d\d", expected) == [
        "97.28",
        "97.70",
        "97.12",
        "97.44",
        "96.15",
        "97.00",
        "95.99",
        "96.51",
    ]
