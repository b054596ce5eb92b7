"""What the benchmarks say of their figures: ratios, intervals, JSON without names, no speed without parity."""

import json
import math
import platform
import random
from pathlib import Path

import pytest
import torch

from benchmarks import bare, blog_baseline, noise, precision, results, simulation
from pipeline import config
from pipeline import noise as measured_noise
from pipeline.noise import Between

TINY = (
    "-S", "model=test_resnet.r160_in1k", "-S", "image_size=32", "-S", "data.limit=10", "-S", "batch_size=50",
    "-S", "epochs=2", "-S", "device=cpu", "-S", "threads=1", "--workers", "0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def bench(tmp_path, monkeypatch):
    """Results of the test's own; the number of threads does not last."""
    before = torch.get_num_threads()
    monkeypatch.setattr(results, "FOLDER", tmp_path / "bench")
    yield tmp_path / "bench"
    torch.set_num_threads(before)


def test_ratios_have_their_spread():
    found = results.ratios([3.0, 1.0, 2.5])
    assert found == {"median": 2.5, "min": 1.0, "max": 3.0, "n": 3, "values": [3.0, 1.0, 2.5]}


def test_what_is_written_has_its_conditions_and_no_name_or_path(bench, pictures):
    overrides = [f"data.path={pictures}", f'weights="{pictures}/own.safetensors"', "device=cpu", "recipe=blog"]
    path = results.write("one", results.conditions_of(config.load(overrides), overrides), {"a": results.ratios([1.0])})
    written = json.loads(path.read_text())
    assert path == bench / "one.json"
    assert written["conditions"]["torch"] == torch.__version__
    assert written["conditions"]["settings"][:2] == ["data.path=pictures", "weights=own.safetensors"]
    assert {"date", "hardware", "threads", "device"} <= written["conditions"].keys()
    assert written["result"]["a"]["n"] == 1
    for private in (str(pictures.parent), str(config.ROOT), str(Path.home()) + "/", platform.node()):
        assert private not in path.read_text()


@pytest.mark.parametrize(
    ("losses", "accuracies", "expected"),
    [
        (([2.0], [2.03]), None, None),
        (([2.0], [2.05]), None, "losses disagree"),
        (([2.0], [float("nan")]), None, "losses disagree"),
        (([2.0, 2.2], [2.2, 2.0]), None, None),
        (([2.0], [2.0]), ([0.800], [0.805]), None),
        (([2.0], [2.0]), ([0.800], [0.794]), "accuracies disagree"),
        (([2.0], [2.0]), ([0.800, 0.800], [0.810, 0.792]), None),
    ],
)
def test_parity(losses, accuracies, expected):
    said = results.disagreement(losses, accuracies)
    assert (said is None) if expected is None else (expected in said)


def test_accuracies_are_judged_where_they_tell_something():
    assert results.judges(config.load(["recipe=blog", "batch_size=100"]), 2000)
    assert not results.judges(config.load(["recipe=blog"]), 1999)
    assert not results.judges(config.load(["recipe=blog", "lr=1.0e-5"]), 2000)


def test_t_is_that_of_the_tables():
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    assert [round(precision.t_quantile(degrees), 3) for degrees in (1, 4, 30)] == [12.706, 2.776, 2.042]


def test_a_difference_beyond_noise_is_told_from_one_within_it():
    apart, half = precision.difference([0.80, 0.81, 0.82], [0.80, 0.81, 0.82])
    assert apart == 0
    assert half == pytest.approx(precision.t_quantile(4) * 0.01 * (2 / 3) ** 0.5)
    assert precision.difference([0.8, 0.8], [0.7, 0.7]) == (pytest.approx(0.1), 0.0)
    assert precision.differs(0.006, 0.001)
    assert not precision.differs(0.006, 0.007)
    assert not precision.differs(0.004, 0.001)


def test_the_baseline_does_the_same_work_and_is_written(bench, capsys):
    blog_baseline.main(["--rounds", "1", "--recipes", "blog,linear-probe", "--accuracy", *TINY])
    found = json.loads((bench / "blog_baseline.json").read_text())["result"]["recipes"]
    said = capsys.readouterr().out
    assert found.keys() == {"blog", "linear-probe"}
    for name, result in found.items():
        assert f"{name:13} baseline / ours, 2 epochs" in said
        assert result["baseline / ours"]["n"] == 1
        assert result["baseline epochs measured"] == 2
        assert result["accuracy judged"] is False  # a rate of its own, so small that accuracies are chance
    assert found["blog"]["images"] == {"train": 100, "test": 100}


def test_fewer_images_for_the_baseline_are_scaled(bench):
    blog_baseline.main(["--rounds", "1", "--recipes", "linear-probe", "--baseline-limit", "50", *TINY])
    (result,) = json.loads((bench / "blog_baseline.json").read_text())["result"]["recipes"].values()
    assert result["images"] == {"train": 90, "validation": 10}
    assert result["baseline images"] == {"train": 50, "validation": 6}
    ((first,),) = result["baseline seconds by epoch"]
    assert result["baseline seconds"] == [pytest.approx(2 * first * 90 / 50)]


def test_no_speed_without_parity(bench, monkeypatch, capsys):
    trained = {"epochs": [{"train/loss": 2.2, "val/accuracy": 0.1}], "seconds": 1.0, "setup": 1.0}
    trained |= {"speed": 1.0, "fixed_speed": 1.0, "how": {"features": "cache"}}
    monkeypatch.setattr(bare, "train", lambda *_, **__: trained)
    rows = [{"seconds": 2.0, "loss": 2.3, "accuracy": 0.1}]
    monkeypatch.setattr(blog_baseline, "apart", lambda *_, **__: rows)
    with pytest.raises(SystemExit) as ended:
        blog_baseline.main(["--rounds", "1", "--recipes", "linear-probe", *TINY])
    assert "linear-probe: the first epoch's losses disagree" in ended.value.code  # a text: status 1
    assert "baseline / ours" not in capsys.readouterr().out
    assert not bench.exists()


def test_a_wrong_setting_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        blog_baseline.main(["-S", "epochs=none"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- noise


def test_noise_is_measured_in_a_process_and_joins_what_was(tmp_path, monkeypatch, capsys):
    file = tmp_path / "noise.json"
    tiny = [word for word in TINY if word not in ("--workers", "0")]
    words = ["--repeats", "2", "--into", str(file), *tiny, "-S", "weights=random", "-S", "data.source=synthetic"]
    noise.main(["--processes", "1", *words])
    (found,) = json.loads(file.read_text())["processes"]
    assert found["backend"] == "cpu" and found["conditions"]["torch"] == torch.__version__
    assert found.pop("session") == found["conditions"]["date"]
    assert [len(own) for own in (*found["seconds"].values(), *found["accuracies"].values())] == [2, 2, 2, 2, 2]
    assert all(seconds > 0 for each in found["seconds"].values() for seconds in each)
    assert "repeats in" not in capsys.readouterr().out  # one process tells nothing of what differs between several

    dates = iter(("2100-01-01T00:00:00+00:00", "2100-01-01T00:01:00+00:00"))

    def later(words):
        return found | {"conditions": found["conditions"] | {"date": next(dates)}}

    monkeypatch.setattr(noise, "in_process", later)
    noise.main(["--processes", "2", *words])
    sessions = [process["session"] for process in json.loads(file.read_text())["processes"]]
    assert sessions == [found["conditions"]["date"], *["2100-01-01T00:00:00+00:00"] * 2]
    said = capsys.readouterr().out
    assert "linear-probe: within a process" in said and "6 repeats in 3 processes" in said


def test_a_repeat_is_the_training_alone(monkeypatch, settings_of):
    settings = settings_of("model=test_resnet.r160_in1k", "image_size=32", "batch_size=20", "epochs=2", "threads=1")
    monkeypatch.setattr(noise, "STEP_SECONDS", 0.0)
    seeds, restart = [], noise.training.restart
    monkeypatch.setattr(noise.training, "restart", lambda work, seed: (seeds.append(seed), restart(work, seed)))
    seconds, accuracies = noise._trainings(settings, 3)
    assert seeds == [0, 0, 1, 2]  # the first of them after the warm-up
    assert len(seconds) == len(accuracies) == 3
    assert len(noise._steps(settings, 2)) == 2


def test_a_failing_process_ends_the_measuring(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        noise.main(["--into", str(tmp_path / "noise.json"), "-S", "device=xpu"])
    assert ended.value.code == 2
    assert len(capfd.readouterr().err.splitlines()) == 1 and not (tmp_path / "noise.json").exists()


# --- whether comparisons are fair


def measurement(backend, within, between, processes=6, repeats=6):
    """What `noise` might have written of this spread. No machine ever took these times."""
    generator, found = random.Random(0), []
    for _ in range(processes):
        shift = generator.gauss(0, between)
        found.append({
            "session": "2026-01-01T00:00:00+00:00", "backend": backend,
            "conditions": {
                "date": "2026-01-01T00:00:00+00:00", "hardware": f"made-up {backend}", "torch": "2.14.1", "threads": 1,
                "settings": [],
            },
            "seconds": {"example": [math.exp(shift + generator.gauss(0, within)) for _ in range(repeats)]},
            "accuracies": {"example": [0.75 + generator.gauss(0, 0.001) for _ in range(repeats)]},
        })  # fmt: skip
    return found


def test_alike_machines_are_rarely_called_different_and_a_slow_down_is_found():
    (each,) = measured_noise.measured(measurement("cuda", 0.004, 0.004))
    found = simulation.rates(each, measured_noise.between([each]), 120, random.Random(0))
    assert found.keys() == {"one process", "two processes", "own processes"}
    assert all(by_count.keys() == {3, 5, 10} for by_count in found.values())
    # At 5%, three standard deviations of chance are 6% of 120 trials.
    assert all(shares["alike"] <= 0.11 for by_count in found.values() for shares in by_count.values())
    assert found["one process"][10]["slower"] > 0.9 and found["own processes"][10]["slower"] > 0.9


def test_repeats_of_one_process_would_be_unfair_if_nothing_were_known_of_others():
    (each,) = measured_noise.measured(measurement("cuda", 0.004, 0.008))
    unfair = simulation.rates(each, {"cuda": {"any": Between(0.0, 5)}}, 60, random.Random(0))
    assert unfair["own processes"][10]["alike"] <= 0.14
    assert unfair["one process"][10]["alike"] > 0.4
    assert any("called different" in text and "one process" in text for text in simulation.failures(each, unfair))


@pytest.mark.parametrize(("backend", "failing"), [("cuda", 1), ("cpu", 0)])
def test_a_slow_down_has_to_be_found_on_the_machine_that_is_asked(monkeypatch, backend, failing):
    monkeypatch.setattr(simulation, "ASKED", "made-up cuda")
    (each,) = measured_noise.measured(measurement(backend, 0.004, 0.004))
    shares = {"alike": 0.065, "slower": 0.79}
    found = {kind: dict.fromkeys((3, 5, 10), shares) for kind in simulation.PROCESSES}
    assert len(simulation.failures(each, found)) == failing


def test_the_simulation_prints_a_table_and_fails_where_it_is_not_fair(tmp_path, monkeypatch, capsys):
    file = tmp_path / "noise.json"
    file.write_text(json.dumps({"processes": measurement("cuda", 0.004, 0.004)}))
    words = ["--trials", "5", "--from", str(file)]
    monkeypatch.setattr(simulation, "MOST_CALLED", 1.0)  # of five trials, chance says nothing
    simulation.main(words)
    said = capsys.readouterr().out
    assert "made-up cuda, example" in said and len(said.splitlines()) == 6
    monkeypatch.setattr(simulation, "LEAST_FOUND", 1.1)
    monkeypatch.setattr(simulation, "ASKED", "made-up cuda")
    with pytest.raises(SystemExit) as ended:
        simulation.main(words)
    assert "a slow-down found in" in ended.value.code  # a text: status 1


def test_what_was_measured_is_there_for_the_comparison():
    found = measured_noise.measured(json.loads(measured_noise.FILE.read_text())["processes"])
    assert {each.work for each in found} == {"linear-probe", "blog", "finetune"}
    assert all(each.within > 0 for each in found) and measured_noise.between(found)
