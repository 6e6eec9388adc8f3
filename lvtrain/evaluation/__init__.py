"""Protocols of face recognition: embeddings in, figures out. See README.md."""

from lvtrain.evaluation.bins import read_bin, write_bin
from lvtrain.evaluation.protocol import Setting
from lvtrain.evaluation.suite import run_benchmarks
from lvtrain.weights.extract import raw_pixels

__all__ = ["Setting", "raw_pixels", "read_bin", "run_benchmarks", "write_bin"]
