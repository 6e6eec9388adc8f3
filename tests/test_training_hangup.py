"""Runs in a real terminal: what happens when it closes, when Ctrl-C is typed, when the launcher is killed, and in a container."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.runs import free_port, metrics, recipe_file

DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"]
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc"]  # the program is process 1, as in a container


class Terminal:
    """A program that leads the session of a pseudo-terminal, as a shell's first command or `docker run -it` does."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()

        def lead() -> None:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lead, cwd=ROOT, close_fds=True
        )
        os.close(slave)
        self.text = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while part := os.read(self.master, 4096):
                self.text += part

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> None:
        os.close(self.master)


@pytest.fixture
def begin(tiny_faces: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts an endless run, and returns its terminal after three steps."""
    started: list[Terminal] = []

    def start(launcher: list[str], around: Callable[[list[str]], list[str]] = list) -> Terminal:
        recipe = recipe_file(
            tmp_path,
            tiny_faces / "train",
            phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
            schedule={"total": "1000000 steps", "warmup": "0 steps"},
            checkpoint={"every": "1000000 steps"},
        )
        words = [word.format(port=free_port()) for word in launcher]
        command = [*words, "lvtrain/main.py", "--recipe", str(recipe), "--ds_config", "ds_configs/zero1.json"]
        started.append(Terminal(around(command)))
        until = time.monotonic() + 180
        while len(rows(tmp_path)) < 3:
            assert time.monotonic() < until and started[0].process.poll() is None, started[0].text.decode()[-3000:]
            time.sleep(0.2)
        return started[0]

    yield start
    for terminal in started:
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)
        terminal.process.kill()


def rows(folder: Path) -> list[Any]:
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    return metrics(folder / "runs" / "tiny") if path.exists() else []


def stopped(folder: Path) -> dict[str, Any]:
    """`outcome.json`, once it is there, of a run whose last step is in a checkpoint."""
    run = folder / "runs" / "tiny"
    until = time.monotonic() + 120
    while not (run / "outcome.json").exists():
        assert time.monotonic() < until, "the ranks did not stop"
        time.sleep(0.2)
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    assert outcome["outcome"] == "requeue" and (run / "checkpoints" / f"step_{outcome['step']:09d}").is_dir()
    return outcome


def test_a_closed_terminal_is_a_request_to_stop(begin: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = begin([sys.executable])
    terminal.close()
    assert "SIGHUP" in stopped(tmp_path)["reason"]
    assert terminal.process.wait(60) == 75


@pytest.mark.slow
@LAUNCHERS
@pytest.mark.parametrize("how", ["close", "type", "interrupt", "terminate", "kill"])
def test_the_ranks_save_whatever_ends_their_launcher(
    begin: Callable[..., Terminal], tmp_path: Path, launcher: list[str], how: str
) -> None:
    terminal = begin(launcher)
    if how == "close":
        terminal.close()
    elif how == "type":
        terminal.type(b"\x03")
    else:
        number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[how]
        os.kill(terminal.process.pid, number)
    stopped(tmp_path)


@pytest.mark.slow
@LAUNCHERS
@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on this machine")
def test_a_session_of_tmux_that_is_ended_is_a_request_to_stop(
    begin: Callable[..., Terminal], tmp_path: Path, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", os.devnull]
    begin(launcher, lambda words: [*tmux, "new-session", "-s", "training", shlex.join(words)])
    subprocess.run([*tmux, "kill-session", "-t", "training"], check=True)
    stopped(tmp_path)


def may_unshare() -> bool:
    return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN], ids=["python", "torchrun"])  # deepspeed: stopping.md
@pytest.mark.skipif(not may_unshare(), reason="no process namespaces for this user")
def test_a_container_that_is_stopped_ends_by_itself(
    begin: Callable[..., Terminal], tmp_path: Path, launcher: list[str]
) -> None:
    """`docker stop` sends SIGTERM to process 1. What has not ended soon is killed with the whole container."""
    terminal = begin(launcher, lambda words: [*CONTAINER, *words])
    pid = terminal.process.pid
    os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text()), signal.SIGTERM)
    terminal.process.wait(120)
    stopped(tmp_path)
