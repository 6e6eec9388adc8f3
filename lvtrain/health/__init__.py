"""Is a run on track? What its loss should be, and what it means where it is not. See README.md."""
