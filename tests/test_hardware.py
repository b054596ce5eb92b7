"""hardware.json: always the same on the same machine, and written without torch."""

import subprocess
import sys

import pytest

from pipeline import config, files, hardware
from pipeline.profiling import system_info


def test_the_same_machine_writes_the_same_file_without_torch_whatever_the_settings(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline import config, hardware; "
        f"hardware.run(config.load(), Path({str(tmp_path)!r})); print(sorted({{'torch', 'mlflow'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    facts = hardware.run(config.load(["label=desk", "seed=5", "recipe=blog"]), tmp_path / "again")
    assert (tmp_path / "hardware.json").read_bytes() == (tmp_path / "again" / "hardware.json").read_bytes()
    assert files.read_json(tmp_path / "hardware.json") == facts == system_info.facts()


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        (
            {
                "machine": "0123456789ab", "model": "LENOVO 20XW", "cpu": "AMD EPYC", "cores": 8, "memory_gib": 31.3,
                "os": "Debian GNU/Linux 12", "gpus": [{"name": "NVIDIA T4"}, {"name": "Intel UHD"}],
            },
            ["LENOVO 20XW", "AMD EPYC", "8 cores", "31.3 GiB", "NVIDIA T4, Intel UHD", "Debian GNU/Linux 12"],
        ),
        ({"machine": "0123456789ab", "gpus": []}, ["? cores", "? GiB", "GPU: none"]),
    ],
)  # fmt: skip
def test_the_machine_is_shown_on_one_line(monkeypatch, capsys, tmp_path, facts, shown):
    monkeypatch.setattr(system_info, "facts", lambda: facts)
    hardware.run(config.load(), tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert all(text in line for text in ("0123456789ab", *shown))
