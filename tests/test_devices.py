"""On a real GPU: the same work gives the CPU's figures, and the clock waits for the device."""

import time

import pytest
import torch

from pipeline import backends, download, hardware, train
from pipeline.clock import Clock

DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]


@pytest.mark.parametrize("device", DEVICES)
def test_trains_as_the_cpu_does(device, settings_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'store.db').as_posix()}")
    figures = {}
    for name in ("cpu", device):
        settings = settings_of("recipe=finetune", "weights=random", "model=test_resnet.r160_in1k", "image_size=32",
                               "epochs=2", "batch_size=16", "lr=1e-4", f"device={name}")  # fmt: skip
        for stage in (hardware, download):
            stage.run(settings, tmp_path / name)
        record = train.run(settings, tmp_path / name)
        figures[name] = [epoch["figures"] for epoch in record["epochs"]]
        assert record["tags"]["device"] == name
        assert figures[name][-1]["memory/peak_mib"] > 0
    for ours, theirs in zip(figures["cpu"], figures[device], strict=True):
        assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-3)
        assert theirs["val/loss"] == pytest.approx(ours["val/loss"], rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_span_lasts_as_long_as_the_work_it_queued(device):
    backend = backends.select(device)
    matrix = torch.randn(4096, 4096, device=backend.device)
    matrix @ matrix
    clock = Clock(backend.synchronise)
    with clock.span("work") as span:
        start = time.perf_counter()
        for _ in range(50):
            matrix @ matrix
        queued = time.perf_counter() - start
    assert span.seconds > 2 * queued  # the clock waited for more than the queueing took


@pytest.mark.cuda
def test_fp32_is_fp32():
    backend = backends.select("cuda")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()

    def error():
        return ((left.cuda() @ right.cuda()).cpu().double() - exact).norm() / exact.norm()

    backend.set_precision("fp32")
    assert error() < 1e-6
    if "tf32" in backend.precisions:
        backend.set_precision("tf32")
        assert 1e-5 < error() < 1e-2
        backend.set_precision("fp32")
