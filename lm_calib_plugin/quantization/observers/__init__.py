"""What range of an activation the levels span: one rule a file."""
