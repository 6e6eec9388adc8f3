"""Protocols of face recognition: embeddings in, figures out. See README.md."""

from lvtrain.evaluation.benchmarks import run_benchmarks
from lvtrain.evaluation.bins import read_bin, write_bin
from lvtrain.evaluation.extract import embed, raw_pixels

__all__ = ["embed", "raw_pixels", "read_bin", "run_benchmarks", "write_bin"]
