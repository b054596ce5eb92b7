"""Made-up runs for the comparison, as `tracking.finished_runs` gives them. No machine ever took these times."""

from pipeline import comparison, config
from pipeline.noise import Between

EXECUTION = {"precision": "fp32", "channels_last": "auto", "compile": "auto", "graph": "auto", "features": "auto"} | {
    "threads": "null"
}
EPOCHS = 4
NOISE = (0.0, 0.01, -0.01, 0.005, -0.005, 0.008, -0.008, 0.002, -0.002, 0.004)
"""By how much the seconds of the first, second, ... run differ from what is typical, as a share."""

BETWEEN = {"cuda": Between(0.02, 4), "cpu": Between(0.05, 9)}
"""Between processes, on logarithms: what no machine ever showed."""

MEASURED = {
    backend: {"any": most, "features": Between(most.deviation / 2, most.degrees), "images": most}
    for backend, most in BETWEEN.items()
}


class Store:
    """Made runs, and their courses by id."""

    def __init__(self):
        self.runs = []
        self.courses = {}
        self.asked = []

    def add(self, count=1, *, seconds=10.0, accuracy=0.75, metrics=None, params=None, machine="a" * 12, **tags):
        """`count` runs that took about `seconds`, newest last; a tag's dot is written as two underscores, and what is
        None is not there."""
        for noise in NOISE[:count]:
            run_id = f"{len(self.runs) + 1:08x}" + "0" * 24
            total = seconds * (1 + noise)
            each = total / (2 * EPOCHS)  # training; validation takes as long
            own = {
                "machine": machine, "hardware": "GPU A", "device": "cuda", "backend": "cuda", "workload": "w1",
                "recipe": "finetune", "dataset": "cifar10", "weights": "pretrained", "software.torch": "2.14.1",
                "software.execution": str(config.EXECUTION_VERSION),
            }  # fmt: skip
            own |= {key.replace("__", "."): value for key, value in tags.items()}
            figures = {
                "time/total_seconds": total, "time/train_seconds": each, "speed/train_images_per_second": 900 / each,
                "memory/peak_mib": 1000.0, "test/accuracy": accuracy + noise / 10, "best/val_accuracy": accuracy,
            }  # fmt: skip
            self.runs.append(
                {
                    "run_id": run_id,
                    "experiment_id": "7",
                    "name": "a name",
                    "started": 1_750_000_000_000 + 3_600_000 * len(self.runs),
                    "tags": {key: value for key, value in own.items() if value is not None},
                    "metrics": {key: value for key, value in (figures | (metrics or {})).items() if value is not None},
                    "params": {f"train.{key}": value for key, value in (EXECUTION | (params or {})).items()},
                }
            )
            self.courses[run_id] = {
                "val/accuracy": [accuracy * (epoch + 1) / EPOCHS for epoch in range(EPOCHS)],
                "time/train_seconds": [each] * EPOCHS,
                "time/val_seconds": [each] * EPOCHS,
            }
        return self

    def repeats(self, count, number, *, planned=None, **others):
        """As `add`, of `count` repeats of one process, which has this number."""
        tags = {"repeats__id": f"{number:032x}", "repeats": str(planned or count)}
        self.add(count, **tags, **others)
        for repeat, run in enumerate(self.runs[-count:], 1):
            run["tags"]["repeat"] = str(repeat)
        return self

    def sustained(self, count=1, *, speed=1000.0, seconds=10.0, taints=None, **others):
        """As `add`, of runs whose step was repeated at about `speed` images a second."""
        for noise in NOISE[:count]:
            metrics = {"speed/sustained_images_per_second": speed * (1 + noise), "time/sustain_seconds": 60.2}
            own = {"sustained__workload": "s1", "sustained__taints": taints}
            self.add(metrics=metrics, seconds=seconds * (1 + noise), **own, **others)
        return self

    def course(self, run_id):
        self.asked.append(run_id)
        return self.courses[run_id]

    def compare(self, prices=None, **settings):
        chosen = {"reference": None, "prices": "prices.yaml", "tainted": False} | settings
        return comparison.compare(self.runs[::-1], self.course, link, config.Compare(**chosen), prices, MEASURED)


def link(experiment_id, run_id):
    return f"http://127.0.0.1:5000/#/experiments/{experiment_id}/runs/{run_id}"


def two(first=3, second=3, **others):
    """A and B, which takes half as long."""
    store = Store().add(first, hardware="GPU A")
    return store.add(second, hardware="GPU B", machine="b" * 12, seconds=5.0, **others)


def sections(found, kind="work", *, demo=False):
    return [each for part in found.parts if part.demo == demo for each in part.sections if each.kind == kind]


def table(found, place=0, kind="work", *, demo=False):
    """A table of the only section of its kind."""
    (section,) = sections(found, kind, demo=demo)
    return section.tables[place]


def row(found, name, place=0, kind="work"):
    (only,) = [each for each in table(found, place, kind).rows if each.name.startswith(name)]
    return only
