"""The training and evaluation loops. They yield figures; they know nothing of files, YAML or MLflow."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data import batching
from pipeline.devices import Backend
from pipeline.errors import StageError
from pipeline.profiling.clock import Clock, StepTimes
from pipeline.training import optimizers

Batches = Iterable[tuple[Tensor, Tensor]]
Ready = Callable[[Tensor], Tensor]
"""Makes of a batch, as it lies in memory, what the network takes."""
Schedule = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
Progress = Callable[[int], None]
"""Told how many samples were taken, once their work is queued."""

STRETCH = 8
"""How many steps of a head are recorded as one. On an H200 one takes the card 61 microseconds and the host, which cuts
its batch, copies it to where the recording reads it and sets its rate, 70 to 130; of eight at once, 20."""


def silent(count: int) -> None:
    """No progress shown."""


class NonFiniteLossError(StageError):
    """The loss became NaN or infinite: what follows would be noise."""


class RunningMetrics:
    """Loss and correct answers summed over samples on the device; read once, since reading waits for it."""

    def __init__(self, device: torch.device):
        # float32, since mps has no float64; a float64 sum would differ in the seventh digit at 50,000 samples.
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Starts anew, in the same memory."""
        self._loss.zero_()
        self._correct.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss`: the batch's mean, a scalar; `logits` (B, classes); `labels` (B,)."""
        self._loss.add_(loss.detach(), alpha=len(labels))
        self._correct.add_((logits.detach().argmax(1) == labels).sum())

    def read(self, count: int) -> tuple[float, float]:
        """Mean loss, and accuracy as a fraction, over the `count` samples added."""
        return self._loss.item() / count, self._correct.item() / count


class TrainLoop:
    """One training on one device: all that the loop needs beside the samples.

    `network` maps what `ready` makes of a batch to logits: the whole model on images, or its head alone on features
    computed before (`on_features`: images then never pass the network, and none count as trained). `recorded`: the
    launches of a step are recorded once for each shape of batch and replayed, where the backend can (`captured`), those
    of a head for `STRETCH` steps at once, where its optimizer's are among them (`optim.capturable`).
    """

    def __init__(
        self,
        network: nn.Module,
        build: Callable[[], Schedule],
        backend: Backend,
        clock: Clock,
        *,
        ready: Ready = lambda inputs: inputs,
        set_mode: Callable[[], object],
        epochs: int,
        batch_size: int,
        per_batch: bool,
        precision: str,
        on_features: bool = False,
        recorded: bool = False,
    ):
        self.network, self.ready, self.set_mode = network, ready, set_mode
        self.epochs, self.batch_size = epochs, batch_size
        self.per_batch, self.on_features = per_batch, on_features
        """`per_batch`: whether the schedule moves with each batch, or with each epoch."""
        self.backend, self.clock, self.precision = backend, clock, precision
        self.times = StepTimes(backend, clock.now)
        self.totals = RunningMetrics(backend.device)
        self._build = build
        self.optimizer, self.scheduler = build()
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # fp16 alone has so little range that gradients would vanish.
        self.scaler = torch.amp.GradScaler(backend.kind) if precision == "fp16" else None
        self._unscaled = self.scaler.state_dict() if self.scaler else {}
        self._whole = recorded and self.scaler is None and optimizers.capturable(self.optimizer, self.scheduler)
        stretch = STRETCH if self._whole and on_features else 1
        self.at_once = stretch * batch_size
        """How many samples `step` takes at most."""
        self._rates = [
            [torch.zeros((), device=backend.device) for _ in self.optimizer.param_groups] for _ in range(stretch)
        ]
        work: Callable[..., Any] = self._whole_steps if self._whole else self._gradients
        self._step = backend.capture_graph(work) if recorded else work
        self.score = make_eval_step(network, ready, backend, precision, self.totals, recorded=recorded)

    def step(self, inputs: Tensor, labels: Tensor, *, scheduled: bool = False) -> tuple[float, float | None]:
        """A step of training on each batch of these samples, which are on the device; losses and correct answers go to
        `totals`. What isn't recorded with its optimizer takes them for one batch, whatever their number. `scheduled`:
        where the schedule moves with each batch, it does.

        Gives the last step's learning rate: the schedule's, and the one applied in its place, where one was.
        """
        moves = scheduled and self.per_batch
        groups = self.optimizer.param_groups
        if self._whole:
            for number in range(self.steps(len(labels))):
                lr = float(groups[0]["lr"])
                for rate, group in zip(self._rates[number], groups, strict=True):
                    rate.fill_(group["lr"])
                if moves:
                    self.scheduler.step()
            self._step(inputs, labels)
            return lr, None
        for parameter, gradient in zip(self._parameters, self._step(inputs, labels), strict=True):
            parameter.grad = gradient
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        used = float(groups[0]["lr"]), optimizers.applied_lr(self.optimizer)
        if moves:
            self.scheduler.step()
        return used

    def steps(self, samples: int) -> int:
        """How many steps so many samples make."""
        return math.ceil(samples / self.batch_size)

    def restart(self) -> None:
        """Puts the optimizer, its schedule and the times of steps back to their beginning; the caller does so with the
        network."""
        optimizer, scheduler = self._build()
        if self._whole:
            optimizers.reset_state(self.optimizer)
            for group, fresh in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = fresh["lr"]
            self.scheduler.load_state_dict(scheduler.state_dict())
        else:
            self.optimizer, self.scheduler = optimizer, scheduler
        self.times = StepTimes(self.backend, self.clock.now)
        if self.scaler:
            self.scaler.load_state_dict(self._unscaled)  # in its memory, where a recorded step reads it
        for parameter in self._parameters:
            parameter.grad = None

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
        """Of the batch's mean loss, one for each trainable parameter; None for one that has no part in it."""
        for parameter in self._parameters:
            parameter.grad = None
        inputs = self.ready(inputs)
        with self.backend.autocast(self.precision):
            logits = self.network(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        self.totals.add(loss, logits, labels)
        return tuple(parameter.grad for parameter in self._parameters)

    def _whole_steps(self, inputs: Tensor, labels: Tensor) -> None:
        size = self.batch_size
        batches = zip(torch.split(inputs, size), torch.split(labels, size), strict=True)
        for number, batch in enumerate(batches):
            self._gradients(*batch)
            with optimizers.use_rate_tensors(self.optimizer, self._rates[number]):
                self.optimizer.step()


def make_eval_step(
    network: nn.Module,
    ready: Ready,
    backend: Backend,
    precision: str,
    totals: RunningMetrics,
    *,
    recorded: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that passes a batch through `network` in evaluation mode, adds its loss and correct answers to
    `totals`, and gives the predicted labels, (B,) int64; they stand until the next batch."""

    @torch.no_grad()
    def score(inputs: Tensor, labels: Tensor) -> Tensor:
        inputs = ready(inputs)
        with backend.autocast(precision):
            logits: Tensor = network(inputs)
        logits = logits.float()
        totals.add(F.cross_entropy(logits, labels), logits, labels)
        return logits.argmax(1)

    return backend.capture_graph(score) if recorded else score


def train(
    job: TrainLoop,
    train_batches: Callable[[int], Batches],
    val_batches: Callable[[], Batches],
    progress: Progress = silent,
) -> Iterator[dict[str, float]]:
    """Trains, and yields an epoch's figures, by the names that MLflow shows, when its validation is done.

    `train_batches` gives an epoch's samples, counted from 1, `job.at_once` at a time. The clock stands still while the
    caller handles what was yielded. Raises NonFiniteLossError.
    """
    for epoch in range(1, job.epochs + 1):
        job.backend.reset_peak_memory()
        job.set_mode()
        job.totals.reset()
        images = 0
        with job.clock.span("train") as train_span:
            for inputs, labels in train_batches(epoch):
                with job.times.step(job.steps(len(labels))):
                    lr, applied = job.step(inputs, labels, scheduled=True)
                images += len(labels)
                progress(len(labels))
            train_loss, train_accuracy = job.totals.read(images)
        job.times.collect()
        _refuse_non_finite("training", train_loss, epoch)
        if not job.per_batch:
            job.scheduler.step()
        with job.clock.span("validate") as val_span:
            val_loss, val_accuracy = evaluate(job.network, job.score, job.totals, val_batches(), progress=progress)
        _refuse_non_finite("validation", val_loss, epoch)
        speed = {} if job.on_features else {"speed/train_images_per_second": images / train_span.seconds}
        memory, capacity = job.backend.memory_mib(), job.backend.capacity_mib()
        yield {
            "epoch": epoch,
            "train/loss": train_loss,
            "train/accuracy": train_accuracy,
            "val/loss": val_loss,
            "val/accuracy": val_accuracy,
            "train/lr": lr,
            **({} if applied is None else {"train/lr_applied": float(applied)}),
            "time/train_seconds": train_span.seconds,
            "time/val_seconds": val_span.seconds,
            **speed,
            **{f"memory/{name}_mib": mib for name, mib in memory.items()},
            **({"memory/peak_share": memory["peak"] / capacity} if capacity and "peak" in memory else {}),
        }


def evaluate(
    network: nn.Module,
    score: Callable[[Tensor, Tensor], Tensor],
    totals: RunningMetrics,
    batches: Batches,
    predictions: list[Tensor] | None = None,
    progress: Progress = silent,
) -> tuple[float, float]:
    """Mean loss and accuracy (a fraction) over `batches`, by an eval step of `network` that adds to `totals`; appends
    each batch's predicted labels, (B,) int64 on the device, to `predictions` where given."""
    network.eval()
    totals.reset()
    images = 0
    for inputs, labels in batches:
        predicted = score(inputs, labels)
        if predictions is not None:
            predictions.append(predicted.clone())
        images += len(labels)
        progress(len(labels))
    return totals.read(images)


@torch.no_grad()
def compute_features(
    features: Callable[[Tensor], Tensor], split: batching.Split, batches: Batches, progress: Progress = silent
) -> batching.Split:
    """What the head takes of each sample of `split`, (N, D) float32, in the order of `batches`, where `split` is."""
    inputs = labels = torch.empty(0)
    done = 0
    for images, answers in batches:
        found = features(images)
        if not done:
            inputs = torch.empty((len(split), *found.shape[1:]), device=split.inputs.device)
            labels = torch.empty(len(split), dtype=answers.dtype, device=split.inputs.device)
        inputs[done : done + len(found)] = found
        labels[done : done + len(found)] = answers
        done += len(found)
        progress(len(answers))
    return batching.Split(inputs, labels)


def warm_up(job: TrainLoop, training: Batches, validation: Batches) -> None:
    """Takes real steps, so that the first timed one does not pay for what is done once by shape (allocation, choice
    of kernels, compiling, recording). The network has learnt from them, and `job.restart` is due."""
    job.set_mode()
    for inputs, labels in training:
        job.step(inputs, labels)
    job.network.eval()
    for inputs, labels in validation:
        job.score(inputs, labels)
    job.backend.synchronize()


def _refuse_non_finite(which: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the {which} loss is {loss} in epoch {epoch}: lower lr, or look at the data")
