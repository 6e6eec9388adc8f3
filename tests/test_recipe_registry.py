"""A registry imports its room when a name is first asked for, also when several threads ask at once."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import threading
from concurrent.futures import ThreadPoolExecutor
from lvtrain.backbones.registry import BACKBONES
start = threading.Barrier(4)
def ask(number):
    start.wait()
    return BACKBONES.get("vit_nano") is not None
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(ask, range(4))))
"""


def test_threads_that_ask_at_once_all_get_the_entry() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * 4), done.stderr[-2000:]
