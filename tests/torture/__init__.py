"""What `make torture` does to the programs: kills, power cuts, other layouts, damaged files."""
