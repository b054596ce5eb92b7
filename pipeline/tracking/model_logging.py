"""Imports what logs a checkpoint as a model. It takes seconds, and can be done before the checkpoint is there."""

from pipeline.models import checkpoints
from pipeline.tracking import store

store.preload()

__all__ = ["checkpoints"]
