"""Which network interface the ranks use: on this machine's own interfaces, and in the connections of real gloo ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lvtrain.distributed import network
from lvtrain.errors import UserError
from tests.conftest import ROOT
from tests.runs import free_port

CARDS = [one for one in network.interfaces() if one.leaves_the_host and "." in one.address]


def test_interfaces_are_those_of_the_kernel() -> None:
    """Against /sys/class/net."""
    names = {one.name for one in network.interfaces()}
    assert "lo" in names <= set(os.listdir("/sys/class/net"))
    loopback = network.of_address("127.0.0.1")
    assert loopback is not None and (loopback.name, loopback.gbit, loopback.leaves_the_host) == ("lo", None, False)
    assert network.of_address("127.0.1.1") == loopback, "Debian's address of the host's own name"
    assert network.of_address("::ffff:127.0.0.1") == loopback
    assert network.of_address("203.0.113.9") is None
    assert network.towards("127.0.0.1", 1) == loopback
    assert network.towards("no.such.host.invalid", 1) is None


@pytest.mark.skipif(not CARDS, reason="this machine has no interface but loopback")
def test_a_card_of_this_machine_is_found_by_its_address() -> None:
    assert network.of_address(CARDS[0].address) == CARDS[0] == network.towards(CARDS[0].address, 1)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("=eth", []),
        ("=eth0", ["eth0"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "docker0", "eth1", "ib0"]),
        ("wlan0", []),
    ],
)
def test_variables_name_interfaces_as_nccl_reads_them(value: str, names: list[str]) -> None:
    assert network.named(value, ["lo", "docker0", "eth0", "eth1", "ib0"]) == names


def test_a_variable_that_names_no_interface_is_refused() -> None:
    network.check_names({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(UserError, match="NCCL_SOCKET_IFNAME=nosuch"):
        network.check_names({"NCCL_SOCKET_IFNAME": "nosuch"})


def test_interfaces_inside_a_host_are_warned_of_where_there_are_several() -> None:
    def rank(host: str, name: str) -> dict[str, Any]:
        return {"host": host, "rendezvous": [network.Interface(name, "10.0.0.1")], "collectives": [], "variables": {}}

    assert network.warnings([rank("a", "lo"), rank("a", "lo")]) == []
    assert network.warnings([rank("a", "eth0"), rank("b", "enp3s0f0")]) == []
    for name in ("lo", "docker0", "br-1f2e", "virbr0"):
        (line,) = network.warnings([rank("a", "eth0"), rank("b", name), rank("b", name)])
        assert line.startswith("b ") and name in line
    assert len(network.lines([rank("a", "eth0"), rank("a", "eth0"), rank("b", "lo")])) == 2


@pytest.mark.parametrize("chosen", ["lo", *[CARDS[0].name] * bool(CARDS)])
def test_preflight_names_the_interface_that_gloo_uses(chosen: str, tmp_path: Path) -> None:
    """GLOO_SOCKET_IFNAME moves the collectives; the rendezvous stays where MASTER_ADDR is."""
    processes, port = [], free_port()
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": chosen}
        command = [sys.executable, "tools/preflight.py", "--shared", str(tmp_path), "--megabytes", "0.1"]
        command += ["--json", str(tmp_path / "found.json")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())["networks"]
    for one in found:
        assert [card["name"] for card in one["rendezvous"]] == ["lo"]
        assert [card["name"] for card in one["collectives"]] == [chosen]
        assert one["variables"] == {"NCCL_SOCKET_IFNAME": None, "GLOO_SOCKET_IFNAME": chosen}
    assert f"collectives over {chosen} (" in said[0] and socket.gethostname() in said[0]
