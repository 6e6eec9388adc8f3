"""Can these ranks train together? Run it as the training would be started, before a long run.

    torchrun --nproc_per_node 8 tools/preflight.py --shared runs --data /data/glint360k         # on every node, with --nnodes, --rdzv-endpoint …
    deepspeed --hostfile hosts tools/preflight.py …          srun python tools/preflight.py …

Meets, compares what the ranks run on, looks whether they share the run folder's file system and see the same data, and measures the collectives a
step is made of. --timeout begins when python does. torchrun waits for its nodes before that, ten minutes, and starts no rank until they are there:
`torchrun --rdzv-conf timeout=120,join_timeout=120 …` makes it two. Exit status 0: nothing found; 2: something that would stop or spoil a run, one
line each.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "FATAL"
)  # read by torch's import: its own words on ranks that do not meet are forty lines

from lvtrain.errors import EXIT_ERROR, one_line_errors


def sizes(text: str) -> list[float]:
    return [float(size) for size in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path("runs"),
        help="folder of the runs, which all nodes must share (default: runs)",
    )
    parser.add_argument("--data", type=Path, help="dataset folder or subset manifest")
    parser.add_argument(
        "--megabytes", type=sizes, default="1,16,256", help="sizes of the collectives (default: 1,16,256)"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds that started ranks wait for each other (default: 120)"
    )
    parser.add_argument("--json", type=Path, help="write what was found to this file, too")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args()


def main() -> int:
    options = parse()
    from lvtrain.training.preflight import preflight  # imports torch: not before --help has answered

    with one_line_errors("preflight", options.shared):
        problems = preflight(
            shared=options.shared,
            data=options.data,
            megabytes=options.megabytes,
            repeats=options.repeats,
            timeout=options.timeout,
            report=options.json,
        )
    return EXIT_ERROR if problems else 0


if __name__ == "__main__":
    sys.exit(main())
