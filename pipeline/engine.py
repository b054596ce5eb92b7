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


class NonFiniteLossError(StageError):
    """The loss became NaN or infinite: what follows would be noise."""


class Totals:
    """Loss and correct answers summed over samples on the device; read once, since reading waits for it."""

    def __init__(self, device: torch.device):
        # float32, since mps has no float64; a float64 sum would differ in the seventh digit at 50,000 samples.
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss`: the batch's mean, a scalar; `logits` (B, classes); `labels` (B,)."""
        self._loss += loss.detach() * len(labels)
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self._count += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss, and accuracy as a fraction, over all samples added."""
        return self._loss.item() / self._count, self._correct.item() / self._count


@dataclass(frozen=True)
class Job:
    """All that the loop needs. `network` maps a batch's inputs to logits: the whole model on prepared images,
    or its head alone on features computed before."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    train_batches: Callable[[int], Batches]
    """The batches of an epoch, counted from 1."""
    val_batches: Callable[[], Batches]
    set_mode: Callable[[], None]
    """Puts the network into training mode, frozen layers as the recipe says."""
    epochs: int
    per_batch: bool
    """Whether the schedule moves with each batch, or with each epoch."""
    precision: str
    backend: Backend
    clock: Clock
    features: bool = False
    """Whether the inputs are features: images then never pass the network, and none count as trained."""


def train(job: Job, progress: Progress = lambda count: None) -> Iterator[dict[str, float]]:
    """Trains, and yields an epoch's figures, by the names that MLflow shows, when its validation is done.

    The clock stands still while the caller handles them. Raises NonFiniteLossError.
    """
    for epoch in range(1, job.epochs + 1):
        job.backend.reset_peak_memory()
        job.set_mode()
        totals = Totals(job.backend.device)
        images = 0
        with job.clock.span("train") as train_span:
            for inputs, labels in job.train_batches(epoch):
                loss, logits = step(job, inputs, labels)
                lr, applied = job.optimizer.param_groups[0]["lr"], optim.applied_lr(job.optimizer)
                if job.per_batch:
                    job.scheduler.step()
                totals.add(loss, logits, labels)
                images += len(labels)
                progress(len(labels))
            train_loss, train_accuracy = totals.read()
        if not math.isfinite(train_loss):
            raise NonFiniteLossError(f"the training loss is {train_loss} in epoch {epoch}: lower lr, or clean the data")
        if not job.per_batch:
            job.scheduler.step()
        with job.clock.span("validate") as val_span:
            val_loss, val_accuracy = evaluate(job.network, job.val_batches(), job.backend, job.precision)
        if not math.isfinite(val_loss):
            raise NonFiniteLossError(f"the validation loss is {val_loss} in epoch {epoch}: lower lr")
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
            **({} if job.features else {"speed/train_images_per_second": images / train_span.seconds}),
            **_known("memory/peak_mib", job.backend.peak_memory_mib()),
        }


def step(job: Job, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of training. Gives the batch's mean loss, a scalar, and its logits (B, classes)."""
    with job.backend.autocast(job.precision):
        logits = job.network(inputs)
    loss = F.cross_entropy(logits.float(), labels)
    job.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    job.optimizer.step()
    return loss, logits


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Batches,
    backend: Backend,
    precision: str,
    predictions: list[Tensor] | None = None,
    progress: Progress = lambda count: None,
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
    progress: Progress = lambda count: None,
) -> data.Split:
    """What the head takes of each sample, float32, in the order of `batches`, on the device."""
    parts, labels = [], []
    for inputs, answers in batches:
        with backend.autocast(precision):
            parts.append(features(inputs).float())
        labels.append(answers)
        progress(len(answers))
    return data.Split(torch.cat(parts), torch.cat(labels))


def warm_up(job: Job, samples: Batches) -> None:
    """Passes `samples` forward and back without learning from them, so that the first timed step does not pay
    for what is done once (allocation, choice of kernels). Layers' statistics are put back afterwards."""
    state = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
    job.set_mode()
    for inputs, labels in samples:
        with job.backend.autocast(job.precision):
            logits = job.network(inputs)
        F.cross_entropy(logits.float(), labels).backward()
        job.optimizer.zero_grad(set_to_none=True)
    job.network.load_state_dict(state)
    job.backend.synchronise()


def _known(name: str, value: float | None) -> dict[str, float]:
    """A figure that the backend can't give is left out."""
    return {} if value is None else {name: value}
