"""Where the error of a compressed model arises, how it travels, and why layers are bad."""
