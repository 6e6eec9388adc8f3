"""Recipes: every shipped one loads, overrides apply, and a mistake is one line with the nearest valid name."""

from pathlib import Path

import pytest
import yaml

from lvtrain.errors import UserError
from lvtrain.main import main
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import Duration
from lvtrain.recipe.registry import METHODS

FOLDER = Path(recipes.__file__).parents[1] / "recipes"
QUICKSTART = FOLDER / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path: Path) -> None:
    recipe = recipes.load(path)
    assert recipes.resolve(yaml.safe_load(recipes.dump(recipe))) == recipe
    assert recipe.name == path.stem


# of published runs: ranks, and millions of parameters that insightface's or CVLface's module of that size has
PUBLISHED = {
    "pco_vitb_glint360k": (64, "113.8"),
    "pco_vitl_webface42m": (64, "255.7"),
    "pco_vith_webface42m": (64, "756.4"),
    "arcface_r50_ms1mv3": (8, "43.6"),
    "arcface_r100_ms1mv3": (8, "65.2"),
    "arcface_mbf_ms1mv3": (8, "2.1"),
    **{
        f"cosface_{network}_{dataset}": (8, parameters)
        for network, parameters in {"r50": "43.6", "r100": "65.2", "mbf": "2.1"}.items()
        for dataset in ("glint360k", "webface4m", "webface12m")
    },
    "cosface_r50_webface42m": (8, "43.6"),
    "cosface_r100_webface42m": (16, "65.2"),
    "cosface_mbf_webface42m": (16, "2.1"),
    "cosface_vitt_webface42m": (64, "19.1"),
    "cosface_vits_webface42m": (64, "76.0"),
    "cosface_vitb_webface42m": (64, "113.8"),
    "cosface_vitl_webface42m": (64, "255.7"),
    "adaface_vitb_webface4m": (8, "114.9"),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_without_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dry-run` where nothing of the data is: with the dataset's figures from the recipe, or from overrides that the refusal asks for."""
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(path)
    arguments = [
        "--recipe",
        str(path),
        "--ds_config",
        str(FOLDER.parents[1] / "ds_configs" / "zero1.json"),
        "--dry-run",
    ]
    if recipe.data.num_samples is None:
        assert main(arguments) == 2 and "data.num_classes=N data.num_samples=N" in capsys.readouterr().err
        arguments += ["data.num_classes=500", "data.num_samples=12000"]
    ranks, parameters = PUBLISHED.get(path.stem, (1, ""))
    assert main([*arguments, "--ranks", str(ranks)] if parameters else arguments) == 0
    plan = capsys.readouterr().out
    assert str(recipe.data.path) in plan
    assert all(f"phase {phase.name}: up to " in plan for phase in recipe.phases)
    assert f"{parameters} M parameters" in plan and "GB of 141" in plan and "DOES NOT FIT" not in plan
    assert ("--ranks N" in plan) == (not parameters)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.lr=1e-4", lambda r: r.optimizer.lr == 1e-4),
        ("phases.0.sample_rate=0.25", lambda r: r.phases[0].sample_rate == 0.25),
        ("phases.refinement.global_batch=64", lambda r: r.phases[2].global_batch == 64),
        ("phases.1.expectation=off", lambda r: r.phases[1].expectation == "off"),
        ("schedule.total=100 steps", lambda r: r.schedule.total == Duration("100 steps")),
        ("checkpoint.keep_every=1e6 samples", lambda r: r.checkpoint.keep_every.amount == 1e6),
        ("backbone.overrides.depth=2", lambda r: r.backbone.overrides == {"depth": 2}),
        ("ema.decay=0.99", lambda r: r.ema.decay == 0.99),
        ("evaluation.benchmarks={}", lambda r: r.evaluation.benchmarks == {}),
        (
            "init_from=runs/before",
            lambda r: (r.init_from.path, r.init_from.classifier) == (Path("runs/before"), "fresh"),
        ),
    ],
)
def test_overrides(override: str, read) -> None:
    assert read(recipes.load(QUICKSTART, [override]))


def test_an_override_of_every_phase() -> None:
    recipe = recipes.load(QUICKSTART, ["phases.*.sample_rate=0.3", "phases.1.sample_rate=0.4"])
    assert [phase.sample_rate for phase in recipe.phases] == [0.3, 0.4, 0.3]
    assert [phase.name for phase in recipe.phases] == ["alignment", "stabilisation", "refinement"]
    for override, named in (("data.*.x=1", "data"), ("phases.*.sample_rat=1", "sample_rate"), ("x.*.y=1", "x")):
        with pytest.raises(UserError, match=named):
            recipes.load(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.cache=local", ["data: ", "cache_bytes"]),
        ("optimzer.lr=1", ["'optimzer'", "'optimizer'"]),
        ("optimizer.rl=1", ["'optimizer.rl'", "'lr'"]),
        ("method.windw=3", ["'method.windw'", "'window'"]),
        ("logging.every=5min", ["logging.every", "'5min'"]),
        ("evaluation.benchmarks={lfw:a.bin}", ["colon"]),
        ("name=a/b", ["name: "]),
        ("name=..", ["name: "]),
        ("phases.0.sample_rat=1", ["sample_rat'", "'sample_rate'"]),
        ("phases.nowhere.sample_rate=1", ["'nowhere'"]),
        # the multiples next to the batch, and the divisors next to 3
        ("phases.0.micro_batches=3", ["micro_batches 3", "126 or 129", "2 or 4"]),
        ("phases.alignment.global_batch=3", ["micro_batches 2", "2 or 4", "1 or 3"]),
        ("schedule.total=10 parsecs", ["schedule.total", "steps", "epochs", "samples"]),
        ("optimizer.lr=-1", ["optimizer.lr: ", "-1"]),
        ("optimizer.weight_decay_end=-0.1", ["optimizer.weight_decay_end: ", "-0.1"]),
        ("method.name=pca", ["method: ", "'pca'", "'pco'"]),
        ("lr", ["section.key=value"]),
        ("seed.x=3", ["seed"]),
        ("phases.1.name=alignment", ["phase names", "alignment"]),
    ],
)
def test_mistakes_are_one_line(override: str, named: list[str]) -> None:
    with pytest.raises(UserError, match=f"^override {override!r}") as caught:
        recipes.load(QUICKSTART, [override])
    answer = str(caught.value).partition(repr(override))[2]
    assert all(part in answer for part in named), answer
    assert "\n" not in answer


def test_an_unknown_key_lists_the_keys_of_this_method_only() -> None:
    """Another method's key would be refused next."""
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, ["method.qqqq=0.4"])
    known = set(METHODS.get("pco").section.model_fields)
    listed = str(caught.value).rpartition(": ")[2].split(", ")
    assert set(listed) == known and "prototypes" not in known


def test_each_mistake_names_the_file_or_the_override(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    values = yaml.safe_load(QUICKSTART.read_text())
    values["phases"][0]["micro_batches"], values["optimizer"]["rl"] = 3, 1
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        recipes.load(path, ["phases.0.sample_rate=0.5", "optimizer.lr=-1", "sed=1"])
    blamed = [
        mistake.partition(": ")[0]
        for mistake in str(caught.value).replace("; did you mean", ",").split("; ")
        if ": " in mistake
    ]
    assert blamed == [f"recipe {path}", "override 'optimizer.lr=-1'", f"recipe {path}", "override 'sed=1'"]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    for name, hint in (("nowhere.yaml", "recipes/README.md"), ("quickstart", "recipes/quickstart.yaml")):
        with pytest.raises(UserError, match=rf"{name} .*{hint}"):
            recipes.load(tmp_path / name)
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        recipes.load(tmp_path / "broken.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("10 steps", 640),
        ("1 step", 64),
        ("2 epochs", 2048),
        ("0.5 epochs", 512),
        ("100 samples", 128),
        ("1e3 samples", 1024),
        ("1_000 samples", 1024),
    ],
)
def test_durations_round_up_to_whole_steps(text: str, samples: int) -> None:
    assert Duration(text).samples(global_batch=64, samples_per_epoch=1000 + 24) == samples
