"""dvc.yaml names every file that a stage's result depends on."""

from pathlib import Path

import grimp
import pytest
import yaml

from pipeline.config import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
CACHED = [name for name, stage in STAGES.items() if not stage.get("always_changed")]


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("pipeline", cache_dir=None)


def source(module):
    """The path that stands for a module in dvc.yaml: a room's folder, or a file."""
    path = Path("pipeline", module.split(".")[1])
    return path.as_posix() if (ROOT / path).is_dir() else path.with_suffix(".py").as_posix()


@pytest.mark.parametrize("stage", CACHED)
def test_a_stage_depends_on_all_that_it_imports(imports, stage):
    module = f"pipeline.{stage}"
    needed = {source(name) for name in {module, *imports.find_upstream_modules(module)} - {"pipeline"}}
    listed = {path for path in STAGES[stage]["deps"] if path.startswith("pipeline/")}
    assert listed == needed


def test_all_stages_that_train_or_measure_are_cached():
    assert CACHED == ["train", "evaluate", "sustain"]
