"""Work beside a step's own stream: on a GPU the class rows are updated while the backbone is updated, too, and goes forward again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Aside:
    """A second stream of a CUDA device; on any other device the work is done at once.

    Between `run` and `join` nobody else may write what the work reads, nor touch what it writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: tuple[Any, ...] | None = None

    def follow(self) -> None:
        """Work run from now on begins no sooner than what the current stream has been given so far is done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def run(self, work: Callable[[], None], *reads: Any) -> None:
        """Does `work`, which reads `reads`: they are kept until `join`, because memory that is let go of belongs to the current stream again, which
        does not know that another one is still reading it. What `work` allocates itself belongs to the second stream."""
        self.join()
        if self._stream is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            work()
        self._held = reads

    def join(self) -> None:
        """What the current stream is given from now on begins after the work is done. The host does not wait."""
        if self._stream is not None and self._held is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._held = None
