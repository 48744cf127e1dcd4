"""Which weights matter: one score a file."""
