"""Published benchmarks as they are distributed: one file reads each layout."""
