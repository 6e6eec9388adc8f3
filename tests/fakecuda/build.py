"""Builds the CUDA runtime without a device for the torch that is installed here: libraries to preload.

python -m tests.fakecuda.build FOLDER
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = Path(sysconfig.get_paths()["purelib"])
SOURCES = ("trace", "device", "runtime", "libraries")
# the names that we must answer, of all that torch's libraries import; cuDNN, cuSPARSE and others are never called
OURS = re.compile(r"__cuda|cuda[A-Z]|cublas|nccl|cu(?!File)[A-Z]")


class Unsupported(Exception):
    """Why the fake device cannot be built here."""


def build(folder: Path) -> list[Path]:
    """Returns the libraries to preload, built in `folder`: CUDA, and an NVRTC that stops a process that compiles with it.

    Raises:
        Unsupported: no compiler, a torch without CUDA, or one that imports names that are neither in the C files nor in
            symbols.txt.
    """
    import torch

    if torch.version.cuda is None:
        raise Unsupported(f"torch {torch.__version__} is built without CUDA")
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unsupported(f"there is no {tool} (Debian: apt-get install gcc)")
    folder.mkdir(parents=True, exist_ok=True)
    objects = [_compile(HERE / f"{name}.c", folder / f"{name}.o") for name in SOURCES]
    written = set().union(*(_names(path, "--defined-only") for path in objects))
    does_nothing, never_called = _listed()
    imported = {
        name
        for path in _torch_libraries()
        for name in _names(path, "--dynamic", "--undefined-only")
        if OURS.match(name)
    }
    if missing := sorted(imported - written - does_nothing - never_called):
        raise Unsupported(
            f"torch {torch.__version__} imports names that tests/fakecuda does not know: {' '.join(missing)}"
        )
    rest = folder / "rest.c"
    rest.write_text(_generated(does_nothing - written, never_called - written))
    objects.append(_compile(rest, folder / "rest.o"))
    library = folder / "libcuda.so.1"
    _run("gcc", "-shared", f"-Wl,-soname,{library.name}", *map(str, objects), "-o", str(library), "-ldl", "-lpthread")
    return [library, _nvrtc(folder)]


def _nvrtc(folder: Path) -> Path:
    """Torch looks its functions up in the library of that name, with the versions it was linked against."""
    found = [line.split()[-1] for path in _torch_libraries() for line in _run("nm", "-D", "-u", str(path)).splitlines()]
    names = {name.partition("@")[::2] for name in found if name.startswith("nvrtc")}
    (version,) = {version for _, version in names}
    source, versions = folder / "nvrtc.c", folder / "nvrtc.map"
    source.write_text(_generated(set(), {name for name, _ in names}))
    versions.write_text(f"{version} {{ global: nvrtc*; }};")
    library = folder / version
    script = f"-Wl,--version-script={versions}"
    _run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{version}", script, str(source), "-o", str(library))
    return library


def _listed() -> tuple[set[str], set[str]]:
    lines = [line for line in (HERE / "symbols.txt").read_text().splitlines() if not line.startswith("#")]
    _, does_nothing, never_called = re.split(r"\[.*\]", "\n".join(lines))
    return set(does_nothing.split()), set(never_called.split())


def _generated(does_nothing: set[str], never_called: set[str]) -> str:
    export = '__attribute__((visibility("default")))'
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    lines += [f"{export} long {name}(void) {{ return 0; }}" for name in sorted(does_nothing)]
    lines += ["static void stop(const char *name) {"]
    lines += ['    fprintf(stderr, "fakecuda: %s is called, and not written\\n", name);', "    abort();", "}"]
    lines += [f'{export} void {name}(void) {{ stop("{name}"); }}' for name in sorted(never_called)]
    return "\n".join(lines) + "\n"


def _torch_libraries() -> list[Path]:
    return sorted((PACKAGES / "torch" / "lib").glob("lib*torch*.so")) + [
        PACKAGES / "torch" / "lib" / f"lib{name}.so" for name in ("c10_cuda", "caffe2_nvrtc")
    ]


def _names(path: Path, *options: str) -> set[str]:
    lines = _run("nm", *options, str(path)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def _compile(source: Path, target: Path) -> Path:
    # the wheels' own headers: the compiler holds our functions against theirs
    includes = [PACKAGES / "triton" / "backends" / "nvidia" / "include"]
    includes = [*PACKAGES.glob("nvidia/*/include"), *includes]
    options = ["-O1", "-Wall", "-fPIC", "-fvisibility=hidden", f"-I{HERE}"]
    _run("gcc", *options, *(f"-I{path}" for path in includes), "-c", str(source), "-o", str(target))
    return target


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unsupported(f"{' '.join(command[:1])} failed: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    print(*build(Path(sys.argv[1])), sep=":")
