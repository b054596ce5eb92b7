"""A training with what is measured around it: memory, roofline, energy, and whether its speed is plausible."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from pipeline import config, terminal
from pipeline.errors import OutOfMemoryError
from pipeline.profiling import energy, roofline
from pipeline.training import loop, setup, state
from pipeline.training.setup import Splits, TrainingSetup

MIN_ENERGY_SECONDS = 1.0
"""Shorter trainings get no energy: NVML's counter moves ten to fifty times a second."""

PEAK_RETRIES = 2
"""How often the roofline is measured again before the clock is doubted: a machine's speed may change in seconds."""

Record = dict[str, Any]


class Limits(NamedTuple):
    """What is measured before a training."""

    step_bytes: float
    """Device memory that a step takes."""
    peaks: roofline.Peaks


class EnergyMeter:
    """Adds up the energy of timed spans, by its source."""

    def __init__(self, reading: energy.Reading):
        self._reading = reading
        self._joules: dict[str, list[float]] = {}

    @contextmanager
    def span(self) -> Iterator[None]:
        """Add the energy spent inside; nothing is added if either reading is missing."""
        before = self._reading()
        yield
        after = self._reading()
        if before and after:
            self._joules.setdefault(before[0], []).append(after[1] - before[1])

    def total(self, spans: int) -> tuple[str, float] | None:
        """The source and its joules over so many spans; None if one of them is missing or the counter stood still."""
        totals = {source: sum(joules) for source, joules in self._joules.items() if len(joules) == spans}
        return next(((source, joules) for source, joules in totals.items() if joules > 0), None)

    @property
    def has_readings(self) -> bool:
        """Whether any span was measured."""
        return bool(self._joules)


def measure_limits(training: TrainingSetup, splits: Splits) -> Limits:
    """Warm up, then measure what this machine can do at most. The model learns from it: call `restart` afterwards."""
    clock = training.loop.clock
    with clock.span("setup"):
        step_bytes = setup.warm_up(training, splits)
    with clock.span("ceilings"):
        return Limits(step_bytes, setup.measure_peaks(training, splits))


def train(
    training: TrainingSetup,
    splits: Splits,
    settings: config.Settings,
    record: Record,
    limits: Limits,
    saved: state.State | None = None,
) -> Iterator[dict[str, float]]:
    """Train from the beginning, or from a `saved` state, and yield each epoch's figures. Completes `record` with what
    was measured."""
    clock, backend = training.loop.clock, training.loop.backend
    with clock.span("setup"):
        training.restart(settings.seed)
    if training.tuning_stopped and setup.TUNING_STOPPED not in record["warnings"]:  # it may have been resumed
        record["warnings"].append(setup.TUNING_STOPPED)
    if backend.capture_error and saved is None:
        record["warnings"].append(f"not every step could be captured in a CUDA graph: {backend.capture_error}")
    with energy.source(settings.energy.source, backend.energy) as reading:
        meter = EnergyMeter(reading)
        with clock.span("upload"):
            samples, placement = setup.place_splits(training, splits, limits.step_bytes, settings.data.device_gib)
        record["tags"]["data.placement"] = placement
        terminal.say(f"images   trained from {'the device' if placement == 'device' else 'host memory'}")
        if training.on_features:
            _compute_features(training, samples, meter, record)
        if saved is not None:
            state.restore(training, saved)
        yield from _epochs(training, samples, settings.seed, meter, len(record["epochs"]) + 1)
    _record_energy(record, meter, settings, training, splits)
    _record_efficiency(record, training, splits, limits)


def _compute_features(training: TrainingSetup, samples: Splits, meter: EnergyMeter, record: Record) -> None:
    """Replace the images of `samples` by their features."""
    images = sum(map(len, samples.values()))
    with (
        terminal.progress("features", images) as advance,
        meter.span(),
        training.loop.clock.span("features") as span,
    ):
        for name, split in samples.items():
            samples[name] = training.compute_features(split, advance)
    record["metrics"].setdefault("speed/feature_images_per_second", images / span.seconds)  # else it was resumed


def _epochs(
    training: TrainingSetup, samples: Splits, seed: int, meter: EnergyMeter, first_epoch: int
) -> Iterator[dict[str, float]]:
    train, validation = samples["train"], setup.val_split(samples)
    with terminal.epochs_progress(training.recipe.epochs, len(train) + len(validation)) as (advance, finish):
        epochs = loop.train(
            training.loop,
            lambda epoch: training.train_batches(train, seed, epoch),
            lambda: training.val_batches(validation),
            advance,
            first_epoch,
        )
        while True:
            with meter.span():
                figures = next(epochs, None)
            if figures is None:
                return
            finish(figures)
            yield figures


def _record_energy(
    record: Record, meter: EnergyMeter, settings: config.Settings, training: TrainingSetup, splits: Splits
) -> None:
    spans = len(record["epochs"]) + 1 + training.on_features  # each epoch, the loop's end, and the features
    total = meter.total(spans)
    if total and training.loop.clock.total("features", "train", "validate") > MIN_ENERGY_SECONDS:
        source, joules = total
        passes = 1 if training.on_features else training.recipe.epochs
        record["tags"]["energy.source"] = source
        record["metrics"]["energy/joules"] = joules
        record["metrics"]["energy/images_per_joule"] = sum(map(len, splits.values())) * passes / joules
        return
    has_counter = meter.has_readings or settings.energy.source != "auto"
    reason = "too short, or a reading was missed" if has_counter else "this machine has no counter that may be read"
    terminal.say(f"energy   not measured: {reason}")


def _record_efficiency(record: Record, training: TrainingSetup, splits: Splits, limits: Limits) -> None:
    """Compare the speed with the machine's own peaks. A speed far above them taints the record: its clock is wrong."""
    clock, peaks = training.loop.clock, limits.peaks
    seconds = clock.total("features" if training.on_features else "train")
    speed = record["metrics"].get("speed/feature_images_per_second")
    if speed is None:
        speed = len(splits["train"]) * training.recipe.epochs / seconds
    # A clock that does not wait for the device makes any training short, so the peaks count, too.
    expected_seconds = speed * seconds / peaks.images_per_second
    if max(seconds, expected_seconds) < roofline.STEP_SECONDS:
        metrics = roofline.peak_metrics(peaks)
        verdict = f"not judged: {seconds:.2f} s are too short to compare with the machine's peaks"
    else:
        with clock.span("ceilings"):
            flops = setup.flops_per_image(training)
        metrics = roofline.efficiency_metrics(speed, peaks, flops)
        for _ in range(PEAK_RETRIES):
            if not roofline.implausible_reason(metrics):
                break
            peaks = _remeasure_peaks(training, splits, peaks)
            metrics = roofline.efficiency_metrics(speed, peaks, flops)
        if reason := roofline.implausible_reason(metrics):
            record["tags"]["taints"] = "clock"
            record["warnings"].append(reason)
            terminal.say(f"note     {reason}")
        verdict = roofline.describe(metrics)
    record["metrics"] |= metrics
    record["facts"]["verdict"] = verdict
    terminal.say(f"machine  {verdict}")


def _remeasure_peaks(training: TrainingSetup, splits: Splits, peaks: roofline.Peaks) -> roofline.Peaks:
    """Measure the peaks again, since other load may have slowed the machine down before."""
    with suppress(OutOfMemoryError), training.loop.clock.span("ceilings"), training.loop.backend.memory_errors():
        return roofline.combine([peaks, setup.measure_peaks(training, splits)])
    return peaks
