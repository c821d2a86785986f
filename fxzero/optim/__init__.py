"""Optimizers of one launch a step, with masters, moments and rounding as asked."""
