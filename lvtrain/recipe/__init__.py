"""What a run is: typed sections, read from YAML and overrides, written back resolved."""
