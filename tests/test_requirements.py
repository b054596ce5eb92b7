"""requirements.lock: every package with its hashes, for each Python and system that requirements.txt names."""

import importlib.metadata
import re
import shutil
import subprocess
import sys

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.config import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
BLOCKS = re.split(r"\n(?=[a-zA-Z])", re.sub(r"^ *#.*\n", "", LOCK, flags=re.MULTILINE).strip())
"""A pin and its hashes."""

PINS = [Requirement(block.partition("\\\n")[0]) for block in BLOCKS]
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
REQUIREMENTS = [Requirement(line.partition("#")[0]) for line in LINES if not line.startswith("#")]
SYSTEMS = {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_machine": machine,
    }
    for python in ("3.11", "3.12", "3.13")
    for system, machine in SYSTEMS.items()
]


def versions(environment):
    """The pinned version of each package by its name."""
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names))
    return {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, pins, strict=True)}


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda env: f"{env['python_version']} {env['sys_platform']}")
def test_the_lock_satisfies_the_requirements(environment):
    pinned = versions(environment)
    for requirement in REQUIREMENTS:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_every_pin_has_hashes_and_no_place_is_named():
    for block in BLOCKS:
        assert re.search(r"(\\\n    --hash=sha256:[0-9a-f]{64} ?)+$", block)
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK


def test_what_the_pinned_packages_need_is_pinned():
    """By what those that are installed here say."""
    pinned = versions(default_environment())
    for name, version in pinned.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another build of torch, without CUDA's packages
        if installed.version != version:
            continue
        for need in map(Requirement, installed.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert need.specifier.contains(pinned[canonicalize_name(need.name)], prereleases=True), (name, need)


@pytest.mark.skipif(shutil.which("make") is None or sys.platform == "win32", reason="needs make and sh")
@pytest.mark.parametrize("build", ["default", "cu126"])
def test_make_installs_with_hashes_all_but_another_build_of_torch(tmp_path, build):
    for name in ("Makefile", "requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> log\n')
    python.chmod(0o755)
    subprocess.run(
        ["make", f".venv/.installed-{build}", f"TORCH={build}"], cwd=tmp_path, capture_output=True, check=True
    )
    *_, last = calls = (tmp_path / "log").read_text().splitlines()
    assert "--require-hashes" in last and last.endswith("-r .venv/requirements.lock")
    lock = (tmp_path / ".venv" / "requirements.lock").read_text()
    if build == "default":
        assert lock == LOCK and not any("--extra-index-url" in call for call in calls)
        return
    torch = next(requirement for requirement in REQUIREMENTS if requirement.name == "torch")
    assert any(f"{torch}+{build}" in call for call in calls)
    dropped = {pin.name for pin in PINS} - set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
    assert {"torch", "torchvision", "triton"} < dropped
    assert all(name.startswith(("nvidia-", "cuda-")) for name in dropped - {"torch", "torchvision", "triton"})
    assert "nvidia-ml-py" not in dropped
