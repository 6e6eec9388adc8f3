"""Writing files whole or not at all, and retrying when a file system fails. Needs only the standard library."""
