"""Kernels, imported as ``fxzero.kernels``: one file a kernel family. Nothing but this docstring."""
