"""How weights are brought to levels of a grid: one file per method."""
