"""hardware.json: the same on the same machine, and written without torch."""

import json
import subprocess
import sys

import pytest

from pipeline import config, files, hardware
from pipeline.profiling import system_info


@pytest.fixture
def settings():
    return config.load()


def test_the_file_is_the_same_each_time(settings, tmp_path):
    path = tmp_path / "outputs" / "hardware.json"
    facts = hardware.run(settings, path.parent)
    before = path.read_bytes()
    system_info.facts.cache_clear()
    system_info.gpus.cache_clear()
    hardware.run(settings, path.parent)
    assert path.read_bytes() == before
    assert json.loads(before) == facts
    assert len(facts["machine"]) == 12 and int(facts["machine"], 16) >= 0
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))


def test_settings_are_not_in_it(settings, tmp_path):
    hardware.run(settings, tmp_path / "a")
    hardware.run(config.load(["label=desk", "seed=5", "recipe=blog"]), tmp_path / "b")
    assert (tmp_path / "a" / "hardware.json").read_bytes() == (tmp_path / "b" / "hardware.json").read_bytes()


def test_it_is_written_without_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline import config, hardware; "
        f"hardware.run(config.load(), Path({str(tmp_path)!r})); print(sorted({{'torch', 'mlflow'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    hardware.run(config.load(), tmp_path / "here")
    assert (tmp_path / "hardware.json").read_bytes() == (tmp_path / "here" / "hardware.json").read_bytes()


def said(monkeypatch, capsys, settings, tmp_path, facts):
    monkeypatch.setattr(system_info, "facts", lambda: facts)
    hardware.run(settings, tmp_path)
    assert files.read_json(tmp_path / "hardware.json") == facts
    (text,) = capsys.readouterr().out.splitlines()
    return text


def test_the_machine_is_said_on_one_line(monkeypatch, capsys, settings, tmp_path):
    facts = {
        "machine": "0123456789ab", "model": "LENOVO 20XW", "cpu": "AMD EPYC", "cores": 8, "memory_gib": 31.3,
        "os": "Debian GNU/Linux 12", "gpus": [{"name": "NVIDIA T4"}, {"name": "Intel UHD"}],
    }  # fmt: skip
    assert said(monkeypatch, capsys, settings, tmp_path, facts) == (
        "machine  0123456789ab: LENOVO 20XW, AMD EPYC, 8 cores, 31.3 GiB, GPU: NVIDIA T4, Intel UHD, "
        "Debian GNU/Linux 12"
    )


def test_a_machine_that_tells_little_is_said_too(monkeypatch, capsys, settings, tmp_path):
    text = said(monkeypatch, capsys, settings, tmp_path, {"machine": "0123456789ab", "gpus": []})
    assert text.startswith("machine  0123456789ab: model not known, CPU not known, ? cores, ? GiB, GPU: none")
