"""How much of the range of a group of weights the levels span: one file per rule."""
