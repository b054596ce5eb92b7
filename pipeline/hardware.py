"""Describe this machine (hardware.json). The same machine always gives the same file."""

from pathlib import Path
from typing import Any

from pipeline import config, files, terminal
from pipeline.profiling import system_info


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Write `folder/hardware.json`: the facts that do not change between two runs on one machine."""
    facts = system_info.facts()
    files.write_json(folder / "hardware.json", facts)
    gpus = ", ".join(gpu["name"] for gpu in facts["gpus"]) or "none"
    terminal.say(
        f"machine  {facts['machine']}: {facts.get('model', 'model not known')}, {facts.get('cpu', 'CPU not known')}, "
        f"{facts.get('cores', '?')} cores, {facts.get('memory_gib', '?')} GiB, GPU: {gpus}, {facts.get('os', '')}"
    )
    return facts


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
