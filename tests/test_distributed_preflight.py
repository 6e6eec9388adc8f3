"""`tools/preflight.py`: started as a training is, and what it says of ranks that cannot train together."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lvtrain.distributed.preflight import differences, facts, other_data, unshared
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import free_port


def test_two_ranks_that_can_train_together(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "tools/preflight.py",
    ]
    command += [
        "--shared",
        str(tmp_path / "runs"),
        "--data",
        str(tmp_path / "data"),
        "--megabytes",
        "0.1,1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["ranks"]) == 2 and found["problems"] == []
    assert [(row["collective"], row["mb"]) for row in found["collectives"]] == [
        (name, size) for size in (0.1, 1.0) for name in ("all-reduce", "all-gather", "reduce-scatter")
    ]
    sent = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5}  # of the size, that one of two ranks sends
    for row in found["collectives"]:
        size = int(row["mb"] * 2**20 / 8) * 8
        assert (
            abs(row["gb_per_s"] - sent[row["collective"]] * size / (row["ms"] * 1e6)) <= 0.06 * row["gb_per_s"] + 1e-3
        )  # both are rounded
    assert list((tmp_path / "runs").iterdir()) == []


def test_ranks_that_do_not_meet_are_told_where_they_waited() -> None:
    # training, in this process, has set torch's log level; preflight sets one of its own
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    environment = ours | {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "tools/preflight.py", "--timeout", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "2 ranks to meet at 127.0.0.1:" in line and "NCCL_SOCKET_IFNAME" in line


def on_two_nodes(rank: int, ranks: int, folder: str) -> tuple[list[str], list[str], list[str]]:
    """Each rank looks where only it looks, as on nodes that share nothing."""
    everybody = [{"host": f"node{number}"} for number in range(ranks)]
    data = Path(folder, f"data{rank}")
    data.mkdir()
    missing = other_data(data, everybody)
    (data / "dataset.json").write_text(str(rank))
    return unshared(Path(folder, f"runs{rank}"), everybody, seconds=0.5), missing, other_data(data, everybody)


def test_nodes_that_share_nothing_are_named(tmp_path: Path) -> None:
    (shared, missing, other), _ = run_ranks(2, on_two_nodes, str(tmp_path))
    assert len(shared) == 1 and "rank 1 (node1)" in shared[0]
    assert len(missing) == 1 and "ranks 0, 1 (node0, node1)" in missing[0] and "data0/dataset.json" in missing[0]
    assert len(other) == 1 and "data0/dataset.json" in other[0]
    assert [path.name for path in (tmp_path / "runs0").iterdir()] == []


def test_versions_that_differ_are_named() -> None:
    ours = facts()
    assert ours["torch"] != "absent" and differences([ours, ours | {"host": "elsewhere"}]) == []
    (line,) = differences([ours, ours | {"host": "elsewhere", "torch": "1.0"}])
    assert line.startswith("torch ") and "1.0 on rank 1 (elsewhere)" in line
