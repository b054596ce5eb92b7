"""Describe this machine (hardware.json). The same machine always gives the same file."""

from pathlib import Path
from typing import Any

from pipeline import config, files, terminal
from pipeline.profiling import system_info


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Write `folder/hardware.json`: the facts that do not change between two runs on one machine."""
    facts = system_info.facts()
    files.write_json(folder / "hardware.json", facts)
    terminal.say(f"machine  {system_info.summary(facts)}")
    return facts


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
