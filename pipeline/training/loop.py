"""The training and evaluation loops. They yield figures and know nothing of files, YAML or MLflow."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data import batching
from pipeline.devices import Backend
from pipeline.errors import StageError
from pipeline.profiling.clock import Clock, StepTimes
from pipeline.training import optimizers

Batches = Iterable[tuple[Tensor, Tensor]]
Prepare = Callable[[Tensor], Tensor]
"""Turns a batch, as it lies in memory, into the network's input."""
Schedule = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
Progress = Callable[[int], None]
"""Receives the number of samples whose work was queued since the last call."""


def silent(count: int) -> None:
    """Show no progress."""


def unchanged(inputs: Tensor) -> Tensor:
    """The preparation of inputs that need none."""
    return inputs


class NonFiniteLossError(StageError):
    """The loss became NaN or infinite, and training on would be pointless."""


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is the label's."""
    return logits.argmax(1) == labels


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"accuracy": is_correct}
"""Metrics of an epoch besides the loss, by name. Each maps logits (B, classes) float32 and labels (B,) to one value per
sample, (B,); the epoch's figure is the mean. CONTRIBUTING.md says how to add one."""


class RunningMetrics:
    """Sums of the loss and of `METRICS` over samples, on the device. Read them rarely: reading synchronizes."""

    def __init__(self, device: torch.device):
        # float32, since mps has no float64. It counts correct answers exactly up to 2**24 samples.
        self._sums = {name: torch.zeros((), device=device) for name in ("loss", *METRICS)}

    def reset(self) -> None:
        """Set the sums to 0 in place, where a captured step adds to them."""
        for total in self._sums.values():
            total.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: `loss` is its mean, a scalar; `logits` (B, classes); `labels` (B,)."""
        self._sums["loss"].add_(loss.detach(), alpha=len(labels))
        for name, metric in METRICS.items():
            self._sums[name].add_(metric(logits.detach(), labels).sum())

    def read(self, count: int) -> dict[str, float]:
        """The means over the `count` samples added, by name. Accuracies are fractions."""
        return {name: total.item() / count for name, total in self._sums.items()}


@dataclass(frozen=True)
class LoopOptions:
    """How a `TrainLoop` trains. `schedule_per_batch`: the schedule moves with each batch, else with each epoch.
    `on_features`: the network is a head on features computed before, so that no image passes it."""

    epochs: int = 1
    precision: str = "fp32"
    schedule_per_batch: bool = True
    on_features: bool = False
    use_cuda_graph: bool = False


class TrainLoop:
    """What training on one device needs, except the samples.

    `network` maps what `prepare` returns to logits; it is the whole model on images, or its head on features.
    `step(inputs, labels)` is one training step on a batch: `_train_step`, or its CUDA graph.
    """

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: Callable[[], Schedule],
        backend: Backend,
        clock: Clock,
        options: LoopOptions,
        *,
        prepare: Prepare = unchanged,
        set_train_mode: Callable[[], object],
    ):
        self.network, self.backend, self.clock, self.options = network, backend, clock, options
        self.set_train_mode = set_train_mode
        self.times = StepTimes(backend, clock.now)
        self.metrics = RunningMetrics(backend.device)
        self._prepare, self._make_optimizer = prepare, make_optimizer
        self.optimizer, self.scheduler = make_optimizer()
        # fp16 alone has so little range that gradients would vanish; a disabled scaler changes nothing.
        self.scaler = torch.amp.GradScaler(backend.device.type, enabled=options.precision == "fp16")
        self._initial_scaler = self.scaler.state_dict()
        self.eval_step = make_eval_step(
            network, prepare, backend, options.precision, self.metrics, use_cuda_graph=options.use_cuda_graph
        )
        self.step: Callable[[Tensor, Tensor], None] = self._train_step
        self._backward: Callable[[Tensor, Tensor], None] = self._compute_gradients
        self.captures_optimizer = (
            options.use_cuda_graph
            and not self.scaler.is_enabled()
            and optimizers.capturable(self.optimizer, self.scheduler)
        )
        if self.captures_optimizer:
            self.step = backend.capture_graph(self._train_step, optimizer=self.optimizer)
        elif options.use_cuda_graph:
            trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
            self._backward = backend.capture_graph(self._compute_gradients, parameters=trainable)

    def _train_step(self, inputs: Tensor, labels: Tensor) -> None:
        """Train on one batch on the device: inputs (B, ...) as `prepare` takes them, labels (B,) int64."""
        self._backward(inputs, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _compute_gradients(self, inputs: Tensor, labels: Tensor) -> None:
        """The forward and backward pass of `_train_step`."""
        self.optimizer.zero_grad()
        inputs = self._prepare(inputs)
        with self.backend.autocast(self.options.precision):
            logits: Tensor = self.network(inputs)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.metrics.add(loss, logits, labels)

    def restart(self) -> None:
        """Reset the optimizer, its schedule, the loss scale and the step times. The caller resets the network."""
        optimizer, scheduler = self._make_optimizer()
        if self.captures_optimizer:  # the graphs use this optimizer's memory
            optimizers.reset_state(self.optimizer)
            for group, fresh in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = fresh["lr"]
            self.scheduler.load_state_dict(scheduler.state_dict())
        else:
            self.optimizer, self.scheduler = optimizer, scheduler
        self.scaler.load_state_dict(self._initial_scaler)
        self.optimizer.zero_grad()
        self.times = StepTimes(self.backend, self.clock.now)


def make_eval_step(
    network: nn.Module,
    prepare: Prepare,
    backend: Backend,
    precision: str,
    metrics: RunningMetrics,
    *,
    use_cuda_graph: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that passes a batch through `network`, adds its loss and correct answers to `metrics`, and returns the
    predicted labels, (B,) int64, which are valid until the next call."""

    @torch.no_grad()
    def eval_step(inputs: Tensor, labels: Tensor) -> Tensor:
        inputs = prepare(inputs)
        with backend.autocast(precision):
            logits: Tensor = network(inputs)
        logits = logits.float()
        metrics.add(F.cross_entropy(logits, labels), logits, labels)
        return logits.argmax(1)

    return backend.capture_graph(eval_step) if use_cuda_graph else eval_step


def make_feature_step(
    backbone: Callable[[Tensor], Tensor],
    prepare: Prepare,
    backend: Backend,
    precision: str,
    *,
    use_cuda_graph: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A function that computes the head's input, (B, D) float32, for a batch; it is valid until the next call."""

    @torch.no_grad()
    def feature_step(inputs: Tensor) -> Tensor:
        inputs = prepare(inputs)
        with backend.autocast(precision):
            return backbone(inputs).float()

    return backend.capture_graph(feature_step) if use_cuda_graph else feature_step


def train(
    loop: TrainLoop,
    train_batches: Callable[[int], Batches],
    val_batches: Callable[[], Batches],
    progress: Progress = silent,
    first_epoch: int = 1,
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's figures, by the names that MLflow shows, after its validation.

    `train_batches` returns the batches of an epoch, counted from 1. A resumed training starts at `first_epoch`. The
    clock stops while the caller handles what was yielded. Raises NonFiniteLossError.
    """
    for epoch in range(first_epoch, loop.options.epochs + 1):
        loop.backend.reset_peak_memory()
        loop.set_train_mode()
        loop.metrics.reset()
        images = 0
        with loop.clock.span("train") as train_span:
            for inputs, labels in train_batches(epoch):
                lr = loop.scheduler.get_last_lr()[0]
                with loop.times.step():
                    loop.step(inputs, labels)
                    if loop.options.schedule_per_batch:
                        loop.scheduler.step()
                images += len(labels)
                progress(len(labels))
            train_means = loop.metrics.read(images)
        loop.times.collect()
        _require_finite("training", train_means["loss"], epoch)
        if not loop.options.schedule_per_batch:
            loop.scheduler.step()
        with loop.clock.span("validate") as val_span:
            val_means = evaluate(loop.network, loop.eval_step, loop.metrics, val_batches(), progress=progress)
        _require_finite("validation", val_means["loss"], epoch)
        figures = {
            "epoch": epoch,
            **{f"train/{name}": mean for name, mean in train_means.items()},
            **{f"val/{name}": mean for name, mean in val_means.items()},
            "train/lr": float(lr),
            "train/lr_applied": optimizers.applied_lr(loop.optimizer),
            "time/train_seconds": train_span.seconds,
            "time/val_seconds": val_span.seconds,
            "speed/train_images_per_second": None if loop.options.on_features else images / train_span.seconds,
            **_memory_figures(loop.backend),
        }
        yield {name: value for name, value in figures.items() if value is not None}


def _memory_figures(backend: Backend) -> dict[str, float]:
    memory, capacity = backend.memory_mib(), backend.capacity_mib()
    figures = {f"memory/{name}_mib": mib for name, mib in memory.items()}
    if capacity and "peak" in memory:
        figures["memory/peak_share"] = memory["peak"] / capacity
    return figures


def _require_finite(which: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the {which} loss is {loss} in epoch {epoch}: lower lr, or look at the data")


def evaluate(
    network: nn.Module,
    eval_step: Callable[[Tensor, Tensor], Tensor],
    metrics: RunningMetrics,
    batches: Batches,
    predictions: list[Tensor] | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """The mean loss and `METRICS` of `network` over `batches`. `eval_step` is a `make_eval_step` of `network` and
    `metrics`. Appends each batch's predicted labels, (B,) int64 on the device, to `predictions`, if given."""
    network.eval()
    metrics.reset()
    images = 0
    for inputs, labels in batches:
        predicted = eval_step(inputs, labels)
        if predictions is not None:
            predictions.append(predicted.clone())
        images += len(labels)
        progress(len(labels))
    return metrics.read(images)


@torch.no_grad()
def compute_features(
    feature_step: Callable[[Tensor], Tensor], split: batching.Split, batches: Batches, progress: Progress = silent
) -> batching.Split:
    """The head's input for each sample of `split`, (N, D) float32, in the order of `batches`, on `split`'s device."""
    inputs = labels = torch.empty(0)
    done = 0
    for batch, batch_labels in batches:
        features = feature_step(batch)
        if not done:
            inputs = torch.empty((len(split), *features.shape[1:]), device=split.inputs.device)
            labels = torch.empty(len(split), dtype=batch_labels.dtype, device=split.inputs.device)
        inputs[done : done + len(features)] = features
        labels[done : done + len(features)] = batch_labels
        done += len(features)
        progress(len(features))
    return batching.Split(inputs, labels)


def warm_up(loop: TrainLoop, training: Batches, validation: Batches) -> None:
    """Run every batch shape once, so that allocation, autotuning, compilation and graph capture are not timed. The
    network learns from these steps: reset it and `loop.restart()` afterwards."""
    loop.set_train_mode()
    for inputs, labels in training:
        loop.step(inputs, labels)
    loop.network.eval()
    for inputs, labels in validation:
        loop.eval_step(inputs, labels)
    loop.backend.synchronize()
