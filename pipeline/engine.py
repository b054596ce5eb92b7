"""The training and evaluation loops. They yield figures; they know nothing of files, YAML or MLflow."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import data, optim
from pipeline.backends import Backend
from pipeline.clock import Clock
from pipeline.errors import StageError

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None]
"""Told each batch's size, once its work is queued."""


def _silent(count: int) -> None:
    """No progress shown."""


class NonFiniteLossError(StageError):
    """The loss became NaN or infinite: what follows would be noise."""


class Totals:
    """Loss and correct answers summed over samples on the device; read once, since reading waits for it."""

    def __init__(self, device: torch.device):
        # float32, since mps has no float64; a float64 sum would differ in the seventh digit at 50,000 samples.
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0
        """Samples so far."""

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss`: the batch's mean, a scalar; `logits` (B, classes); `labels` (B,)."""
        self._loss += loss.detach() * len(labels)
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self.count += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss, and accuracy as a fraction, over all samples added."""
        return self._loss.item() / self.count, self._correct.item() / self.count


@dataclass(frozen=True)
class Job:
    """All that the loop needs beside the samples. `network` maps a batch's inputs to logits: the whole model on
    prepared images, or its head alone on features computed before."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    set_mode: Callable[[], None]
    """Puts the network into training mode, frozen layers as the recipe says."""
    epochs: int
    per_batch: bool
    """Whether the schedule moves with each batch, or with each epoch."""
    precision: str
    backend: Backend
    clock: Clock
    on_features: bool
    """Whether the inputs are features: images then never pass the network, and none count as trained."""
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss where gradients would vanish (fp16)."""


def train(
    job: Job, train_batches: Callable[[int], Batches], val_batches: Callable[[], Batches], progress: Progress = _silent
) -> Iterator[dict[str, float]]:
    """Trains, and yields an epoch's figures, by the names that MLflow shows, when its validation is done.

    `train_batches` gives an epoch's batches, counted from 1. The clock stands still while the caller handles
    what was yielded. Raises NonFiniteLossError.
    """
    for epoch in range(1, job.epochs + 1):
        job.backend.reset_peak_memory()
        job.set_mode()
        totals = Totals(job.backend.device)
        with job.clock.span("train") as train_span:
            for inputs, labels in train_batches(epoch):
                loss, logits = step(job, inputs, labels)
                lr, applied = job.optimizer.param_groups[0]["lr"], optim.applied_lr(job.optimizer)
                if job.per_batch:
                    job.scheduler.step()
                totals.add(loss, logits, labels)
                progress(len(labels))
            train_loss, train_accuracy = totals.read()
        _refuse_non_finite("training", train_loss, epoch)
        if not job.per_batch:
            job.scheduler.step()
        with job.clock.span("validate") as val_span:
            val_loss, val_accuracy = evaluate(job.network, val_batches(), job.backend, job.precision, progress=progress)
        _refuse_non_finite("validation", val_loss, epoch)
        speed = {} if job.on_features else {"speed/train_images_per_second": totals.count / train_span.seconds}
        peak = job.backend.peak_memory_mib()
        yield {
            "epoch": epoch,
            "train/loss": train_loss,
            "train/accuracy": train_accuracy,
            "val/loss": val_loss,
            "val/accuracy": val_accuracy,
            "train/lr": float(lr),
            **({} if applied is None else {"train/lr_applied": float(applied)}),
            "time/train_seconds": train_span.seconds,
            "time/val_seconds": val_span.seconds,
            **speed,
            **({} if peak is None else {"memory/peak_mib": peak}),
        }


def step(job: Job, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of training. Gives the batch's mean loss, a scalar, and its logits (B, classes)."""
    with job.backend.autocast(job.precision):
        logits = job.network(inputs)
    loss = F.cross_entropy(logits.float(), labels)
    job.optimizer.zero_grad(set_to_none=True)
    if job.scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]
        job.optimizer.step()
    else:
        job.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        job.scaler.step(job.optimizer)
        job.scaler.update()
    return loss, logits


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Batches,
    backend: Backend,
    precision: str,
    predictions: list[Tensor] | None = None,
    progress: Progress = _silent,
) -> tuple[float, float]:
    """Mean loss and accuracy (a fraction) over `batches`; appends each batch's predicted labels, (B,) int64 on
    the device, to `predictions` where given."""
    network.eval()
    totals = Totals(backend.device)
    for inputs, labels in batches:
        with backend.autocast(precision):
            logits = network(inputs)
        logits = logits.float()
        totals.add(F.cross_entropy(logits, labels), logits, labels)
        if predictions is not None:
            predictions.append(logits.argmax(1))
        progress(len(labels))
    return totals.read()


@torch.no_grad()
def compute_features(
    features: Callable[[Tensor], Tensor],
    batches: Batches,
    backend: Backend,
    precision: str,
    progress: Progress = _silent,
) -> data.Split:
    """What the head takes of each sample, float32, in the order of `batches`, on the device."""
    parts, labels = [], []
    for inputs, answers in batches:
        with backend.autocast(precision):
            parts.append(features(inputs).float())
        labels.append(answers)
        progress(len(answers))
    return data.Split(torch.cat(parts), torch.cat(labels))


def warm_up(job: Job, training: Batches, validation: Batches) -> None:
    """Takes real steps, so that the first timed one does not pay for what is done once by shape (allocation, choice
    of kernels, compiling). The network has learnt from them, and the optimizer is for throwing away."""
    job.set_mode()
    for inputs, labels in training:
        step(job, inputs, labels)
    evaluate(job.network, validation, job.backend, job.precision)
    job.backend.synchronise()


def _refuse_non_finite(which: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the {which} loss is {loss} in epoch {epoch}: lower lr, or look at the data")
