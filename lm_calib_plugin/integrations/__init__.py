"""The habits of other libraries: Optimum classes and commands, quantizers of transformers."""
