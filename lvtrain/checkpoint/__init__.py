"""The checkpoint format: what is saved, by whom, how it is committed, chosen and read."""
