"""Made-up runs for the comparison, as `store.finished_runs` gives them. No machine ever took these times."""

from pipeline import config
from pipeline.comparison import build
from pipeline.profiling.score_steps import STEPS, VERSION, metric, tag, workload

EXECUTION = {
    "precision": "fp32", "channels_last": "auto", "compile": "auto", "graph": "auto", "features": "auto",
    "threads": "null", "target_accuracy": "0.5",
}  # fmt: skip
OLDER = str(config.EXECUTION_VERSION - 1)
"""The version of the code before today's."""

EPOCHS = 4
NOISE = (0.0, 0.01, -0.01, 0.005, -0.005, 0.008, -0.008, 0.002, -0.002, 0.004)
"""By what fraction the seconds of the first, second, ... run differ from the typical ones."""

SESSION = 3_600_000
"""Milliseconds between the starts of made runs, unless a test says otherwise: each is a session of its own."""
MINUTE = 60_000

A, B, C = ({"machine": letter * 12, "hardware": name} for letter, name in (("a", "GPU A"), ("b", "GPU B"), ("c", "C")))
"""Tags of three machines."""


class Store:
    """Made runs, and their courses by id. `courses_read`: the ids whose courses were read."""

    def __init__(self):
        self.runs = []
        self.courses = {}
        self.courses_read = []
        self.sets = 0

    # Many parameters: each is one thing that a test may vary.
    def add(self, count=1, *, planned=None, step=SESSION, start=None, seeds=None, seconds=10.0, accuracy=0.75,
            metrics=None, params=None, **tags):  # fmt: skip
        """Add a set of `planned` runs, of which `count` are there. Each took about `seconds` and started `step`
        milliseconds after the one before. In `tags` two underscores are a dot; None leaves out a tag or metric."""
        planned, self.sets = planned or count, self.sets + 1
        start = 1_750_000_000_000 + SESSION * len(self.runs) if start is None else start
        set_tags = {
            "machine": "a" * 12, "hardware": "GPU A", "device": "cuda", "backend": "cuda", "workload": "w1",
            "recipe": "finetune", "dataset": "cifar10", "weights": "pretrained", "software.torch": "2.14.1",
            "software.execution": str(config.EXECUTION_VERSION), "sustained.execution": str(VERSION),
        }  # fmt: skip
        if planned > 1:
            set_tags |= {"repeats.id": f"{self.sets:032x}", "repeats": str(planned)}
        set_tags |= {key.replace("__", "."): value for key, value in tags.items()}
        for number, noise in enumerate(NOISE[:count]):
            run_id = f"{len(self.runs) + 1:08x}" + "0" * 24
            total = seconds * (1 + noise)
            epoch_seconds = total / (2 * EPOCHS)  # training; validation takes as long
            run_tags = {"repeat": str(number + 1) if planned > 1 else None} | set_tags
            run_metrics = {
                "time/total_seconds": total, "time/process_seconds": total + 20, "time/to_target_seconds": total / 2,
                "speed/train_images_per_second": 900 / epoch_seconds, "memory/peak_mib": 1000.0,
                "test/accuracy": accuracy + noise / 10, "best/val_accuracy": accuracy,
            } | (metrics or {})  # fmt: skip
            seed = {"settings.seed": str((seeds or range(count))[number])}
            self.runs.append(
                {
                    "run_id": run_id,
                    "experiment_id": "7",
                    "name": "a name",
                    "started": start + step * number,
                    "tags": {key: value for key, value in run_tags.items() if value is not None},
                    "metrics": {key: value for key, value in run_metrics.items() if value is not None},
                    "params": seed | {f"train.{key}": value for key, value in (EXECUTION | (params or {})).items()},
                }
            )
            self.courses[run_id] = {
                "val/accuracy": [accuracy * (epoch + 1) / EPOCHS for epoch in range(EPOCHS)],
                "time/train_seconds": [epoch_seconds] * EPOCHS,
                "time/val_seconds": [epoch_seconds] * EPOCHS,
            }
        return self

    def sustained(self, count=1, *, speed=1000.0, best=None, transformer=None, precision="bf16", batch=256, watts=None,
                  taints=None, **others):  # fmt: skip
        """Like `add`, with a score. `speed`: images/s of the convnet at fp32; `best`: at its best precision, if None
        twice as many; `transformer`: if None a quarter."""
        first = len(self.runs)
        tags = {"sustained__taints": taints, "sustained__energy_source": "nvml" if watts else None}
        self.add(count, **tags, **others)
        speeds = (speed, best or 2 * speed, transformer or speed / 4)
        for run, noise in zip(self.runs[first:], NOISE, strict=False):
            for step, typical in zip(STEPS, speeds, strict=True):
                size = batch if step.batch_size == 256 else step.batch_size
                figures = {
                    "images_per_second": typical * (1 + noise),
                    "first_third_images_per_second": typical * (1.02 + noise),
                    "seconds": 60.2,
                    "batch_size": float(size),
                }
                figures |= {"watts": watts, "images_per_joule": typical / watts} if watts else {}
                run["metrics"] |= {metric(step.name, figure): value for figure, value in figures.items()}
                run["tags"][tag(step.name, "workload")] = workload(step, size, 60.0)
                run["tags"][tag(step.name, "precision")] = precision if step.best_precision else "fp32"
        return self

    def course(self, run_id):
        self.courses_read.append(run_id)
        return self.courses[run_id]

    def compare(self, prices=None, **settings):
        defaults = {"reference": None, "prices": "prices.yaml", "tainted": False, "smallest": 0.03}
        compare = config.Compare(**defaults | {"accuracy_margin": 0.01} | settings)
        return build.compare(self.runs[::-1], self.course, link, compare, prices)


def every_kind():
    """Runs of all kinds that a store can have."""
    store = two(5, 3).add(1).add(2, machine="b" * 12, hardware="GPU B", taints="load")  # added afterwards
    store.add(1, hardware="C", machine="c" * 12).add(1, hardware="C", machine="c" * 12)  # not planned
    store.add(1, hardware="D", machine="d" * 12).add(3, planned=5, hardware="D", machine="d" * 12)  # cut off
    for precision in ("bf16", "fp16"):
        store.add(3, params={"precision": precision}, seconds=3.0)
    store.add(3, params={"threads": "4"}, seconds=30.0).add(2, params={"compile": "default"}, taints="battery")
    store.add(4, software__execution=OLDER).add(1, software__execution=None, hardware="C", machine="c" * 12)
    store.add(3, fallback="data").add(1, fallback="device", hardware="C", machine="c" * 12)
    store.add(3, workload="w2", recipe="blog").add(2, workload=None, hardware="E", machine="e" * 12)
    store.add(3, metrics={"time/total_seconds": None}, hardware="F", machine="f" * 12)
    store.add(1, record="r1").add(1, record="r1")  # one training in two experiments
    store.sustained(5, hardware="G", machine="9" * 12).sustained(2, hardware="G", machine="9" * 12)
    store.sustained(3, hardware="G", machine="9" * 12, recipe="blog", workload="w2", batch=128)
    store.sustained(3, hardware="H", machine="8" * 12, taints="load", start=1)
    store.runs[-1]["tags"]["taints"] = "load"
    return store


def everything():
    """A store that has all kinds of rows."""
    store = two(4, 3, label="under the desk").add(2, **B, taints="battery").add(1, **C)
    store.add(2, hardware="D", machine="d" * 12, seconds=7.0).add(3, hardware="E", machine="e" * 12, accuracy=0.6)
    store.add(3, hardware="F", machine="f" * 12).add(2, params={"precision": "bf16"}, seconds=3.0)
    return store.sustained(2, hardware="G", machine="9" * 12)


def many(count):
    """Many machines, every ninth disturbed."""
    store = Store()
    for number in range(count):
        machine = {"machine": f"{number:012}", "hardware": f"GPU {number:02}", "seconds": 10.0 + number}
        store.sustained(1 + number % 4, **machine, taints="load" if number % 9 == 5 else None)
    return store


def price(**given):
    """A price in EUR."""
    fields = {"currency": "EUR", "date": "2000-01-01", "source": "https://example.org"}
    return config.Price(**dict.fromkeys(("buy", "per_hour", "per_kwh", "hours_per_day", "machine")) | fields | given)


PRICES = {
    "GPU A": price(buy=2500.0, per_hour=2.5, machine="a desktop", source="https://example.org/a"),
    "GPU B": price(per_hour=0.5, currency="USD", source="a shop"),
}
HOSTILE = "<script>alert(1)</script>|`x` & \"y\" 'z' [a](javascript:b)"
"""A text of a user or of another's bundle."""


def link(experiment_id, run_id):
    return f"http://127.0.0.1:5000/#/experiments/{experiment_id}/runs/{run_id}"


def two(first=3, second=3, **others):
    """A and B, which takes half as long."""
    store = Store().add(first, hardware="GPU A")
    return store.add(second, hardware="GPU B", machine="b" * 12, seconds=5.0, **others)


def sections(comparison, *, demo=False):
    return [section for part in comparison.parts if part.demo == demo for section in part.sections]


def table(comparison, place=0, *, demo=False):
    """A table of the only section."""
    (section,) = sections(comparison, demo=demo)
    return section.tables[place]


def row(comparison, name, place=0):
    (match,) = [row for row in table(comparison, place).rows if row.head.name.startswith(name)]
    return match


def kinds(comparison, place=0, *, demo=False):
    """The kind of each machine's claim, by name."""
    return {row.head.name: row.claim.kind for row in table(comparison, place, demo=demo).rows}


def score_row(comparison, name, *, demo=False):
    (part,) = [part for part in comparison.parts if part.demo == demo]
    (match,) = [row for row in part.score.rows if row.head.name.startswith(name)]
    return match
