"""Which network interface do the ranks use? It is looked up in this process's open connections, not guessed.

Between the ranks there are two kinds of connections: to the rendezvous (torch's store at MASTER_ADDR) and those of the
collectives (gloo's; NCCL's own sockets, over which it sets up InfiniBand where there is some). On Linux gloo takes the
interface that the host's name resolves to, and NCCL the first that is neither loopback nor docker's, unless
GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from lvtrain.errors import UserError

VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_INSIDE_A_HOST = re.compile(r"lo\d*$|docker|br-|virbr|veth|podman|cni|flannel|dummy")


@dataclass(frozen=True)
class Interface:
    """One address of a network interface.

    Attributes:
        gbit: its speed in Gbit/s, None where the system does not say.
    """

    name: str
    address: str
    gbit: float | None = None

    @property
    def leaves_the_host(self) -> bool:
        """False for loopback and for the bridges of containers and virtual machines."""
        return _INSIDE_A_HOST.match(self.name) is None

    def __str__(self) -> str:
        speed = f", {self.gbit:g} Gbit/s" if self.gbit else ""
        return f"{self.name} ({self.address}{speed})"


def interfaces() -> list[Interface]:
    """Every IPv4 and IPv6 address of this host."""
    speeds = {name: facts.speed / 1000 or None for name, facts in psutil.net_if_stats().items()}
    return [
        Interface(name, one.address.partition("%")[0], speeds.get(name))
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family in (socket.AF_INET, socket.AF_INET6)
    ]


def of_address(address: str) -> Interface | None:
    """The interface that has this address; None if none of this host has."""
    address = address.removeprefix("::ffff:").partition("%")[0]
    loopback = address.startswith("127.")
    for one in interfaces():
        if one.address == address or (loopback and one.address == "127.0.0.1"):
            return one
    return None


def towards(host: str, port: int) -> Interface | None:
    """The interface from which this host would reach another, None without a route. Nothing is sent."""
    for family, kind, protocol, _, place in _resolved(host, port):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(place)
                return of_address(str(probe.getsockname()[0]))
            except OSError:
                continue
    return None


def in_use(store_port: int) -> dict[str, list[Interface]]:
    """The interfaces of this process's open TCP connections: `rendezvous` (the store at `store_port`) and `collectives`."""
    found: dict[str, dict[str, Interface]] = {"rendezvous": {}, "collectives": {}}
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status != psutil.CONN_ESTABLISHED:
            continue
        purpose = "rendezvous" if store_port in (connection.laddr.port, connection.raddr.port) else "collectives"
        if (one := of_address(connection.laddr.ip)) is not None:
            found[purpose][one.name] = one
    return {purpose: list(names.values()) for purpose, names in found.items()}


def named(value: str, names: Sequence[str]) -> list[str]:
    """The interfaces that an NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME allows.

    Names with commas between; NCCL reads a name as a beginning, `=` before the list asks for whole names, and `^` for all
    others (NCCL's documentation of its environment variables). A name of gloo is a whole name, and so a beginning.
    """
    without = value.startswith("^")
    whole = value.lstrip("^").startswith("=")
    wanted = tuple(filter(None, value.lstrip("^=").split(",")))
    matches = [name for name in names if (name in wanted if whole else name.startswith(wanted))]
    return [name for name in names if name not in matches] if without else matches


def check_names(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names no interface of this host."""
    names = list(dict.fromkeys(one.name for one in interfaces()))
    for variable in VARIABLES:
        value = environment.get(variable)
        if value and not named(value, names):
            raise UserError(
                f"{variable}={value} names no network interface of {socket.gethostname()}, which has {', '.join(names)}; "
                "name one of them, or unset it"
            )


def facts(store_port: int) -> dict[str, Any]:
    """This rank's host, the interfaces that it uses (`in_use`), and what its environment says about them."""
    used = in_use(store_port)
    return {"host": socket.gethostname(), **used, "variables": {name: os.environ.get(name) for name in VARIABLES}}


def lines(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each host: interfaces, addresses, speeds, and the variables that choose them."""
    first = {one["host"]: one for one in reversed(ranks)}
    return [
        f"network of {host}: "
        + ", ".join(
            f"{purpose} over {' and '.join(map(str, one[purpose])) or 'no TCP connection'}"
            for purpose in ("rendezvous", "collectives")
        )
        + "; "
        + ", ".join(f"{name} {value or 'is not set'}" for name, value in one["variables"].items())
        for host, one in sorted(first.items())
    ]


def warnings(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each host that uses, among several hosts, an interface that does not leave it."""
    if len({one["host"] for one in ranks}) < 2:
        return []
    found: dict[str, str] = {}
    for one in ranks:
        for interface in (*one["rendezvous"], *one["collectives"]):
            if not interface.leaves_the_host:
                found.setdefault(f"{one['host']} {interface}", f"{one['host']} uses {interface}")
    return [
        f"{text}, which does not lead to other hosts; name the network card with NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        for text in found.values()
    ]


def _resolved(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return []
