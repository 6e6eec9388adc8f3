"""One file per protocol; each registers itself by name. To add one, write a file here: see ../README.md."""
