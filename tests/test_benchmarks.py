"""What the benchmarks say of their figures: ratios, intervals, JSON without names, no speed without parity."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bare, blog_baseline, precision, results, simulation
from pipeline import config
from pipeline.comparison import claims, stats

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
    message = results.disagreement(losses, accuracies)
    assert (message is None) if expected is None else (expected in message)


def test_accuracies_are_judged_where_they_tell_something():
    assert results.judges(config.load(["recipe=blog", "batch_size=100"]), 2000)
    assert not results.judges(config.load(["recipe=blog"]), 1999)
    assert not results.judges(config.load(["recipe=blog", "lr=1.0e-5"]), 2000)


@pytest.mark.parametrize(
    ("value", "half", "differs"), [(0.006, 0.001, True), (0.006, 0.007, False), (0.004, 0.001, False)]
)
def test_a_precision_differs_beyond_noise_and_what_is_allowed(value, half, differs):
    assert precision.differs(stats.Contrast(value, value - half, value + half, None)) == differs


@pytest.mark.slow
def test_the_baseline_does_the_same_work_and_is_written(bench, capsys):
    blog_baseline.main(["--rounds", "1", "--recipes", "blog,linear-probe", "--accuracy", *TINY])
    recipes = json.loads((bench / "blog_baseline.json").read_text())["result"]["recipes"]
    printed = capsys.readouterr().out
    assert recipes.keys() == {"blog", "linear-probe"}
    for name, result in recipes.items():
        assert f"{name:13} baseline / ours, 2 epochs" in printed
        assert result["baseline / ours"]["n"] == 1
        assert result["baseline epochs measured"] == 2
        assert result["accuracy judged"] is False  # a rate of its own, so small that accuracies are chance
    assert recipes["blog"]["images"] == {"train": 100, "test": 100}


@pytest.mark.slow
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


# --- whether claims are fair


@pytest.fixture
def small_grid(monkeypatch):
    """Two machines with five processes, little noise to choose from, and no table of what one session may call."""
    monkeypatch.setattr(simulation, "MACHINES", {2: 1.0})
    monkeypatch.setattr(simulation, "COUNTS", (5,))
    monkeypatch.setattr(simulation, "INDEPENDENT", {name: simulation.INDEPENDENT[name] for name in ("normal 1%",)})
    monkeypatch.setattr(simulation, "SHARED", {name: simulation.SHARED[name] for name in ("hours 0.48%, 0.05%",)})
    tables = {title: table for title, table in simulation.TABLES.items() if table is not simulation.small_differences}
    monkeypatch.setattr(simulation, "TABLES", tables)


def test_the_rules_of_claims_meet_their_goals(small_grid, tmp_path, capsys):
    simulation.main(["--trials", "20", "--json", str(tmp_path / "shares.json")])
    shares = json.loads((tmp_path / "shares.json").read_text())
    assert shares.keys() == simulation.TABLES.keys()
    results_of = {table: shares[title] for title, table in simulation.TABLES.items()}
    assert results_of[simulation.differences_found][0]["share"] == 1
    every = [share for table in shares.values() for share in table]
    assert not any(share["missed"] for share in every)
    said = capsys.readouterr().out
    assert all(share["row"] in said for share in every)


@pytest.mark.parametrize(
    ("kind", "wrong"), [("faster", simulation.false_claims), ("none", simulation.differences_found)]
)
def test_rules_that_call_everything_or_nothing_fail(small_grid, monkeypatch, kind, wrong):
    rigged = claims.Claim(kind, speedup=stats.Contrast(2.0, 1.9, 2.1, 1.1))
    monkeypatch.setattr(claims, "compare", lambda *_: rigged)
    (title,) = [title for title, table in simulation.TABLES.items() if table is wrong]
    with pytest.raises(SystemExit) as ended:
        simulation.main(["--trials", "5"])
    assert title in ended.value.code  # a text: status 1


@pytest.mark.parametrize("called", [True, False])
def test_small_differences_called_in_one_session_miss_their_goals(monkeypatch, called):
    monkeypatch.setattr(simulation, "COUNTS", (5,))
    rigged = claims.Claim("slower" if called else "small", speedup=stats.Contrast(0.9, 0.89, 0.91, 1.1))
    monkeypatch.setattr(claims, "compare", lambda *_: rigged)
    shares = list(simulation.small_differences(simulation.Trials(10, 0)))
    assert {share.share for share in shares} == {float(called)}
    assert any(share.missed for share in shares) == called
    assert not any(share.missed for share in shares if "wrong" in share.column or simulation.HARDER in share.row)


@pytest.mark.parametrize(
    ("share", "trials", "goal", "missed"),
    [
        (0.08, 1000, simulation.Goal(0.065), False),  # 1.9 standard errors too much
        (0.082, 1000, simulation.Goal(0.065), True),
        (0.082, 400, simulation.Goal(0.065), False),
        (0.885, 1000, simulation.Goal(0.9, least=True), False),
        (0.88, 1000, simulation.Goal(0.9, least=True), True),
        (1.0, 1000, None, False),
    ],
)
def test_a_goal_is_missed_by_more_than_chance(share, trials, goal, missed):
    assert simulation.Result("row", "column", share, trials, goal).missed == missed


@pytest.mark.parametrize("name", ["normal 1%", "t2 1%"])
def test_the_quartiles_of_noise_are_as_its_name_says(name):
    values = simulation.INDEPENDENT[name](np.random.default_rng(0), [40_000])
    assert np.quantile(values, [0.25, 0.75]) == pytest.approx([-0.00674, 0.00674], rel=0.05)


def test_drift_is_correlated_within_a_session_and_hours_are_shared():
    generator = np.random.default_rng(0)
    together = simulation.SHARED["drift 1%"](generator, [40_000])
    assert np.std(together) == pytest.approx(0.01, rel=0.05)
    assert np.corrcoef(together[1:], together[:-1])[0, 1] == pytest.approx(0.7, abs=0.03)
    anew, on = (simulation.drift(0.01, anew=anew)(generator, [1] * 40_000) for anew in (True, False))
    assert abs(np.corrcoef(anew[1:], anew[:-1])[0, 1]) < 0.03
    assert np.corrcoef(on[1:], on[:-1])[0, 1] == pytest.approx(0.7, abs=0.03)
    hours = simulation.SHARED["hours 1.3%, 0.05%"](generator, [2] * 20_000).reshape(-1, 2)
    assert np.std(hours[:, 0]) == pytest.approx(0.013, rel=0.05)
    assert np.std(hours[:, 1] - hours[:, 0]) == pytest.approx(0.0005 * 2**0.5, rel=0.05)


def test_designs_make_as_many_sessions_as_they_say():
    for sessions, sizes in ((1, [10]), (3, [4, 3, 3])):
        runs = simulation.planned_set(0, sizes, [{}] * 10)
        assert len(stats.sessions([run["started"] for run in runs])) == sessions
