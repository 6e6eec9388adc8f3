"""MXNet RecordIO (`train.rec`, `train.idx`), as insightface uses it."""

from lvtrain.datasets.recordio.layout import catalogue, count_list, read_index, read_property, write_index
from lvtrain.datasets.recordio.records import LARGEST_LABEL, MAGIC, RecordFile, RecordWriter, pack_record

__all__ = ["LARGEST_LABEL", "MAGIC", "RecordFile", "RecordWriter", "catalogue"]
__all__ += ["count_list", "pack_record", "read_index", "read_property", "write_index"]
