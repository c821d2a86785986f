"""Graph passes, imported as ``fxzero.passes``: one file a pass, the runner and the graph law."""
