"""Pipelines: a model cut into stages that run on different ranks, micro-batch after micro-batch."""
