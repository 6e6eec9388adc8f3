"""The cluster paper's ablation as one resumable batch: baseline, settings 1 to 6 and the comparisons, several seeds each.

    python tools/ablation.py [--data data/ablation] [--seeds 0 1 2] [--settings baseline 1 2 3 4 5 6] [--ranks 1] \\
        [--out runs/cluster_ablation] [section.key=value ...]

The data are generated faces with strong pose and occlusion (tools/synth_faces.py --difficulty hard), made where --data has none. Every run
is one of lvtrain/recipes/cluster_ablation.yaml under --out; a finished one is not run again, an interrupted one goes on. Afterwards each is
evaluated on people never trained on: 10-fold verification, TAR over all pairs, the paper's gap between the mean cosines of positive and negative
pairs, and clustering by K-means, DBSCAN and agglomeration. Table and `ablation.json`: mean and standard deviation over seeds. What a step of each
setting costs: `python tools/benchmark.py cluster`. --table only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lvtrain.errors import EXIT_ERROR, EXIT_STOPPED, UserError
from lvtrain.evaluation import allpairs, clustering, suite
from lvtrain.evaluation.sources import labelled_images
from lvtrain.interop import load_model
from lvtrain.world import World

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "lvtrain" / "recipes" / "cluster_ablation.yaml"

OFF = ["method.alpha=0", "method.beta=0"]
SETTINGS: dict[str, list[str]] = {
    "baseline": ["method.guided=false", *OFF],
    "1": ["method.guided=true", *OFF],
    "2": ["method.guided=false", "method.beta=0"],
    "3": ["method.guided=false", "method.alpha=0"],
    "4": ["method.guided=true", "method.beta=0"],
    "5": ["method.guided=true", "method.alpha=0"],
    "6": ["method.guided=true"],
    "learnable": ["method.guided=true", "method.temperature=learnable"],
    "centre": ["method.guided=true", "method.clustering=centre"],
    "triplet": ["method.guided=true", "method.clustering=triplet"],
}
# the table's, the files have others; and DBSCAN and agglomeration join at the cosine that this share of pairs of different people
# reaches, since losses differ in the cosines they lead to
FAR = "1e-02"
TITLES = {
    "accuracy": "accuracy %",
    "tar": f"TAR@FAR={FAR} %",
    "gap": "pos - neg cosine",
    "kmeans": "K-means B³F %",
    "dbscan": "DBSCAN B³F %",
    "agglomerative": "agglomerative B³F %",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ablation"))
    parser.add_argument("--identities", type=int, default=800, help="people to train on, where the data are made")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=["baseline", *"123456"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--ds-config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--out", type=Path, default=Path("runs/cluster_ablation"))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    return parser.parse_intermixed_args(arguments)


def run_name(setting: str, seed: int) -> str:
    return f"{'setting' if setting.isdigit() else ''}{setting}_seed{seed}"


def _command(command: list[str]) -> None:
    code = subprocess.run(command, cwd=ROOT).returncode
    if code == EXIT_STOPPED:
        sys.exit(EXIT_STOPPED)
    if code:
        raise UserError(
            f"`{' '.join(command[:4])} ...` failed with status {code}; mend it and start again, finished runs are kept"
        )


def make_data(options: argparse.Namespace) -> None:
    if (options.data / "heldout.bin").exists():
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("identities", "images", "heldout", "pairs")]
    _command([sys.executable, "tools/synth_faces.py", str(options.data.resolve()), *sizes, "--difficulty", "hard"])


def train(options: argparse.Namespace, setting: str, seed: int) -> None:
    folder = options.out.resolve() / run_name(setting, seed)
    data = options.data.resolve()
    if not (folder / "evaluation" / "final.json").exists():
        starter = [sys.executable]
        if options.ranks > 1:
            starter = ["torchrun", "--standalone", f"--nproc_per_node={options.ranks}"]
        names = [f"name={folder.name}", f"runs={folder.parent}", f"seed={seed}", f"data.path={data / 'train'}"]
        benchmark = f"evaluation.benchmarks.heldout={data / 'heldout.bin'}"
        recipe = ["--recipe", str(options.recipe.resolve()), "--ds_config", str(options.ds_config.resolve())]
        print(f"== {folder.name}", flush=True)
        _command([*starter, "lvtrain/main.py", *recipe, *names, benchmark, *SETTINGS[setting], *options.overrides])
    out = folder / "clustering" / "evaluation.json"
    if not out.exists():
        results = evaluate(folder, data / "heldout")
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"model": folder.name, "benchmarks": results}, indent=1) + "\n")


def evaluate(folder: Path, heldout: Path) -> dict[str, Any]:
    """All pairs and clusterings of the people never trained on, from one pass over their pictures; as tools/evaluate.py writes them."""
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, device=world.device)
    setting = suite.Setting(world=world, device=world.device, image_size=model.image_size)
    images, labels = labelled_images(heldout)
    embeddings = setting.embed(model.forward, images)
    pairs = allpairs.all_pairs(embeddings, labels, device=world.device)
    cosine = pairs["tar_at_far"][FAR]["threshold"]
    return {
        "heldout": {"kind": "clustering", **clustering.run(embeddings, labels, cosine=cosine)},
        "heldout pairs": {"kind": "all_pairs", **pairs},
    }


def figures(folder: Path) -> dict[str, float] | None:
    """What one finished run reached: percentages, and the gap of the mean cosines."""
    final, people = folder / "evaluation" / "final.json", folder / "clustering" / "evaluation.json"
    if not (final.exists() and people.exists()):
        return None
    pairs = json.loads(final.read_text())["benchmarks"]["heldout"]
    found = json.loads(people.read_text())["benchmarks"]
    return {
        "accuracy": 100 * pairs["accuracy"],
        "tar": 100 * found["heldout pairs"]["tar_at_far"][FAR]["tar"],
        "gap": pairs["positive_mean"] - pairs["negative_mean"],
        **{name: 100 * found["heldout"][name]["bcubed_f"] for name in clustering.ALGORITHMS},
    }


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """{setting: {"seeds": [...], figure: {"mean", "std", "values"}}}, of what is finished."""
    table: dict[str, Any] = {}
    for setting in options.settings:
        found = {seed: figures(options.out / run_name(setting, seed)) for seed in options.seeds}
        done = {seed: values for seed, values in sorted(found.items()) if values is not None}
        if not done:
            continue
        table[setting] = {"seeds": list(done)}
        for name in TITLES:
            values = [round(figure[name], 4) for figure in done.values()]
            spread = statistics.stdev(values) if len(values) > 1 else None
            table[setting][name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return table


def show(table: dict[str, Any]) -> None:
    printed = Table("setting", "seeds", *TITLES.values())
    for setting, row in table.items():
        cells = []
        for name in TITLES:
            figure, digits = row[name], 3 if name == "gap" else 2
            spread = "" if figure["std"] is None else f" ± {figure['std']:.{digits}f}"
            cells.append(f"{figure['mean']:.{digits}f}{spread}")
        printed.add_row(setting, str(len(row["seeds"])), *cells)
    Console().print(printed)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        if not options.table:
            make_data(options)
            for seed in options.seeds:  # a seed at a time, so that an interrupted table is a fair one
                for setting in options.settings:
                    train(options, setting, seed)
        table = collect(options)
        if not table:
            raise UserError(f"nothing is finished under {options.out}")
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ablation.json").write_text(json.dumps(table, indent=1) + "\n")
        show(table)
    except UserError as error:
        print(f"ablation: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
