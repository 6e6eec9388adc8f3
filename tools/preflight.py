"""Can these ranks train together? Start it as you would start the training, before a long run.

    torchrun --nproc_per_node 8 tools/preflight.py --shared runs --data /data/glint360k         # on every node, with --nnodes, --rdzv-endpoint …
    deepspeed --hostfile hosts tools/preflight.py …          srun python tools/preflight.py …

The ranks meet and compare their software. They check that they share the run folder's file system and see the same data,
name the network interfaces in use, and measure the collectives of a training step.

--timeout begins when python starts. Before that, torchrun waits ten minutes for its nodes and starts no rank until they
are there; `torchrun --rdzv-conf timeout=120,join_timeout=120 …` makes it two.

Exit code 0: no problem. 2: something that would stop or spoil a run; one line each.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# read when torch is imported: torch prints forty lines when ranks do not meet
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

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
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args()


def main() -> int:
    options = parse()
    from lvtrain.distributed.preflight import preflight  # here, because it imports torch: --help answers at once
    from lvtrain.planning import H200

    with one_line_errors("preflight", options.shared):
        problems = preflight(
            shared=options.shared,
            data=options.data,
            megabytes=options.megabytes,
            repeats=options.repeats,
            timeout=options.timeout,
            planned=H200.link / 1e9,
            report=options.json,
        )
    return EXIT_ERROR if problems else 0


if __name__ == "__main__":
    sys.exit(main())
