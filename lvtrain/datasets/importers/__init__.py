"""One file, one kind of source that can be packed; see `lvtrain/datasets/importer.py` for what each of them says of itself."""
