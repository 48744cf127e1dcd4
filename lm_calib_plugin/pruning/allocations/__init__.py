"""How much is removed where: one rule a file."""
