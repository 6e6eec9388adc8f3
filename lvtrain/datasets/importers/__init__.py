"""Importers: each file holds one kind of source that can be packed. `lvtrain/datasets/importer.py` has the base class."""
