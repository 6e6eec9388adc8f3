"""`--help` answers at once: no command line imports a heavy library before it has parsed its arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT

# each of them takes a good part of a second or more to import
HEAVY = ["torch", "deepspeed", "timm", "nvidia.dali", "onnx", "onnxruntime", "cv2", "matplotlib", "scipy", "sklearn"]
FILES = sorted(path for path in (ROOT / "tools").glob("*.py") if '"__main__"' in path.read_text())
PACKAGES = sorted(path.parent for top in ("lvtrain", "tools") for path in (ROOT / top).rglob("__main__.py"))
SUBJECTS = sorted(path.stem for path in (ROOT / "tools/benchmarks").glob("*.py") if "\ndef run(" in path.read_text())

COMMANDS: dict[str, list[str]] = {
    **{f"tools/{path.name}": [str(path)] for path in FILES},
    **{
        f"-m {'.'.join(path.relative_to(ROOT).parts)}": ["-m", ".".join(path.relative_to(ROOT).parts)]
        for path in PACKAGES
    },
    **{f"benchmark {subject}": [str(ROOT / "tools/benchmark.py"), subject] for subject in SUBJECTS},
    "lvtrain/main.py": [str(ROOT / "lvtrain/main.py")],
    "launch submit": ["-m", "lvtrain.launch", "submit"],
    "launch attempt": ["-m", "lvtrain.launch", "attempt"],
    "recordio write": [str(ROOT / "tools/recordio.py"), "write"],
    "convert_checkpoint export": [str(ROOT / "tools/convert_checkpoint.py"), "export"],
}

# One Python runs all command lines, each in a forked child that has imported nothing but the standard library.
DRIVER = """
import json, os, runpy, sys

heavy, commands = json.load(sys.stdin)
found = {}
for name, command in commands.items():
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        printed = os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = None
        module = command[0] == "-m"
        target, *rest = command[module:]
        sys.argv = [target, *rest, "--help"]
        sys.path[0] = os.getcwd() if module else os.path.dirname(target)
        try:
            (runpy.run_module if module else runpy.run_path)(target, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
        os.write(writer, json.dumps([code, [one for one in heavy if one in sys.modules]]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found[name] = json.load(answer)
    os.waitpid(child, 0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[object, list[str]]]:
    """By command line: exit code of `--help`, and the heavy libraries that it had imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([HEAVY, COMMANDS]),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[object, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_a_heavy_library(command: str, answers: dict[str, tuple[object, list[str]]]) -> None:
    code, imported = answers[command]
    assert code in (0, None) and imported == []


def test_a_heavy_import_is_noticed() -> None:
    """A control: the same driver, and a command line that imports torch."""
    command = {"heavy": ["-m", "torch.distributed.run"]}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([HEAVY, command]), capture_output=True, text=True
    )
    assert "torch" in json.loads(done.stdout)["heavy"][1]


def test_every_command_line_is_asked() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lvtrain": "lvtrain.main:main"}  # asked as `-m lvtrain`
    assert {
        "-m lvtrain",
        "-m lvtrain.launch",
        "-m tools.faults",
        "tools/evaluate.py",
        "tools/benchmark.py",
    } <= COMMANDS.keys()
