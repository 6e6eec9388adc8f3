"""How a file is written whole or not at all, and how a file system that fails is given time. The standard library alone."""
