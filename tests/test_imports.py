"""What a process that measures imports, and how."""

import gc
import subprocess
import sys

import pytest

from pipeline.imports import without_garbage_collection


def test_a_process_that_measures_imports_only_what_it_needs():
    code = "import sys, pipeline.train, pipeline.evaluate, pipeline.sustain; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unneeded = {"mlflow", "matplotlib", "pandas", "scipy", "requests", "torch_optimizer", "pytorch_optimizer"}
    assert "torch" in modules and unneeded.isdisjoint(modules)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_pauses_and_goes_on_as_before(enabled):
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ImportError), without_garbage_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == frozen
    finally:
        gc.enable() if was_enabled else gc.disable()
