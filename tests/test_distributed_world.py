"""The launch environment: deepspeed, torchrun and srun are understood, contradictions refused."""

import socket

import pytest

from lvtrain.distributed import world
from lvtrain.errors import UserError


def test_plain_python_is_a_world_of_one() -> None:
    assert (world.launch({}).size, world.launch({}).launcher) == (1, "python")
    assert world.broadcast_object("x") == "x" and world.gather_objects(3) == [3]


def test_torch_variables() -> None:
    found = world.launch(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n7", "MASTER_PORT": "1234"}
    )
    assert (found.rank, found.size, found.local_rank, found.address, found.port) == (3, 4, 1, "n7", 1234)


def test_srun_variables() -> None:
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "77",
    }
    found = world.launch(environment)
    assert (found.rank, found.size, found.local_rank, found.address, found.launcher) == (5, 8, 1, "gpu003", "srun")
    assert found.port == 20077
    with pytest.raises(UserError, match="contradicts"):
        world.launch(environment | {"WORLD_SIZE": "1"})


def test_a_batch_script_without_srun_is_one_rank() -> None:
    assert world.launch({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}).size == 1


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_world_smaller_than_the_slurm_step_is_refused(world_size: str) -> None:
    step = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "3",
        "RANK": "0",
        "WORLD_SIZE": world_size,
    }
    with pytest.raises(UserError, match=f"WORLD_SIZE={world_size}.* 3 tasks"):
        world.launch(step)
    assert world.launch(step | {"TORCHELASTIC_RUN_ID": "x"}).size == int(world_size)
    assert world.launch(step | {"WORLD_SIZE": "6"}).size == 6, "one launcher a node, two ranks each"


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "two"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "0"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "٢"}),
        ("RANK", {"RANK": "2", "WORLD_SIZE": "2"}),
        ("RANK", {"RANK": "-1", "WORLD_SIZE": "2"}),
        ("LOCAL_RANK", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "cuda:0"}),
        ("MASTER_PORT", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}),
        ("MASTER_PORT", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}),
        ("SLURM_NTASKS", {"SLURM_NTASKS": "4(x2)", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}),
        ("SLURM_PROCID", {"SLURM_NTASKS": "2", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}),
        ("WORLD_SIZE", {"WORLD_SIZE": "2"}),
        ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}),
        ("PMI_SIZE", {"PMI_SIZE": "4", "PMI_RANK": "1"}),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(name: str, environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"^{name}="):
        world.launch(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],x1", "gpu003"),
        ("a[1,3]-ib", "a1-ib"),
        ("rack2-node[17]", "rack2-node17"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert world.first_host(nodes) == first


def test_a_port_that_is_taken_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        places = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"port {port}"):
            world.start(20)
