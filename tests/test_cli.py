"""The command line: how settings are given, what a person sees, how it ends."""

import json
import subprocess
import sys

import pytest

from pipeline import cli, config, download
from pipeline.errors import StageError, UsageError

CHOSEN = config.load().recipe


def given(*arguments):
    return cli.settings_from(arguments, "What it does.", "python -m pipeline.stage")


def refusal(*arguments):
    with pytest.raises(UsageError) as caught:
        given(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """Calls cli.main for a stage with arguments; gives (exit status, stdout, stderr)."""
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")

    def run(stage, *arguments):
        monkeypatch.setattr(sys, "argv", [str(config.ROOT / "pipeline" / "stage.py"), *arguments])
        status = 0
        try:
            cli.main(stage, "What it does.")
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def never(*_):
    raise AssertionError("the stage ran with wrong settings")


def raises(error):
    def stage(*_):
        raise error

    return stage


# --- from a shell: nothing is touched, for the settings are refused first


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--epochs", "x"],
            f'recipes.{CHOSEN}.epochs: "x" is not allowed: expected a whole number from 1 to 100000',
        ),
        (["-S", "recipe=blogg"], 'recipe: "blogg" is not allowed: expected blog | linear-probe | finetune; '
         "did you mean blog?"),
        (["--data.sorce=auto"], "data.sorce: unknown setting; did you mean data.source?"),
        (["epochs=2"], "epochs=2: unknown argument: expected -S key=value or --key value (see --help)"),
        (["-S", "trainable=[layer4"], None),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_and_status_2(arguments, line):
    command = [sys.executable, "-m", "pipeline.download", *arguments]
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (said,) = ended.stderr.splitlines()
    assert said == f"download: {line}" if line else said.startswith("download: -S trainable, line 1: not YAML: ")


def test_help_from_another_folder(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from pipeline import cli, download;"
        "cli.main(download.run, download.__doc__);"
    )
    command = [sys.executable, "-c", code, str(config.ROOT), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Finds data and weights" in ended.stdout


# --- what arrives


@pytest.mark.parametrize(
    "arguments",
    [
        ["-S", "epochs=3"],
        ["-Sepochs=3"],
        ["--set-param", "epochs=3"],
        ["--set-param=epochs=3"],
        ["--epochs", "3"],
        ["--epochs=3"],
        ["-S", f"recipes.{CHOSEN}.epochs=3"],
        [f"--recipes.{CHOSEN}.epochs", "3"],
    ],
)
def test_each_way_to_give_a_setting_is_the_same(arguments):
    assert given(*arguments) == config.load(["epochs=3"]) != config.load()


def test_no_arguments_are_the_file():
    assert given() == config.load()


def test_what_mlflow_appends_is_taken():
    settings = given("--recipe", "blog", "--device", "mps", "--data.path", "my pictures", "--lr", "1e-3")
    assert (settings.recipe, settings.device, settings.data.path) == ("blog", "mps", "my pictures")
    assert settings.work.lr == 0.001


@pytest.mark.parametrize("arguments", [["--label", "a=b"], ["--label=a=b"], ["-S", "label=a=b"], ["-Slabel=a=b"]])
def test_an_equals_sign_in_the_value(arguments):
    assert given(*arguments).label == "a=b"


@pytest.mark.parametrize("arguments", [["--lr", "-1"], ["--lr=-1"], ["-S", "lr=-1"], ["-Slr=-1"]])
def test_a_value_may_begin_with_a_dash(arguments):
    assert refusal(*arguments) == (f"recipes.{CHOSEN}.lr: -1 is not allowed: expected a number above 0")


def test_values_are_yaml():
    settings = given("--data.limit", "null", "--trainable", "[layer4, fc]", "--flip=true", "--label", "'7'")
    assert (settings.data.limit, settings.work.trainable) == (None, ("layer4", "fc"))
    assert (settings.work.flip, settings.label) == (True, "7")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-S"], "-S: expected key=value after it, such as -S epochs=2"),
        (["--set-param"], "--set-param: expected key=value after it, such as -S epochs=2"),
        (["--epochs"], "--epochs: expected a value after it"),
        (["--epochs", "--flip", "true"], "--epochs: expected a value after it"),
        (["-S", "epochs"], "-S epochs: expected key=value, such as -S epochs=2"),
        (["-S", "--epochs"], "-S --epochs: expected key=value, such as -S epochs=2"),
        (["-Sepochs"], "-S epochs: expected key=value, such as -S epochs=2"),
        (["-S=epochs=2"], "-S =epochs=2: expected key=value, such as -S epochs=2"),
        (["--"], "--: unknown argument: expected -S key=value or --key value (see --help)"),
        (["-e", "2"], "-e: unknown argument: expected -S key=value or --key value (see --help)"),
        ([""], ": unknown argument: expected -S key=value or --key value (see --help)"),
        (["--flip", "true", "x"], "x: unknown argument: expected -S key=value or --key value (see --help)"),
        (["--epoch", "2"], "epoch: unknown setting; did you mean epochs?"),
        (["--data-limit", "2"], None),
    ],
)  # fmt: skip
def test_arguments_that_are_no_settings(arguments, line):
    assert refusal(*arguments) == line if line else refusal(*arguments).startswith("data-limit: unknown setting; ")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_every_setting(word, capsys):
    with pytest.raises(SystemExit) as ended:
        given("-S", "epochs=nonsense", word)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m pipeline.stage [-S key=value ...] [--key value ...]\n\nWhat it does.\n")
    for key, allowed, meaning in config.describe():
        (row,) = [line for line in said.splitlines() if line.split()[:1] == [key]]
        assert f"{meaning}: {allowed}" in row
    assert '["linear-probe"]' in said  # what params.yaml holds now
    assert "python -m pipeline.run -S recipe=finetune -S epochs=2" in said
    assert "130 stopped by Ctrl-C" in said


def test_the_examples_are_settings_that_load():
    examples = [line.split()[3:] for line in cli.EXAMPLES.splitlines() if line.startswith("  python -m")]
    assert len(examples) > 2
    for arguments in examples:
        given(*arguments)


# --- how it ends


def test_a_stage_gets_settings_and_folder(run_main, tmp_path):
    calls = []
    ended = run_main(lambda *taken: calls.append(taken), "--epochs", "3")
    assert ended == (0, "", "")
    assert calls == [(config.load(["epochs=3"]), tmp_path / "outputs")]


def test_a_wrong_setting_never_reaches_the_stage(run_main):
    status, out, err = run_main(never, "--image_size", "4")
    assert (status, out) == (2, "")
    assert err == (f"stage: recipes.{CHOSEN}.image_size: 4 is not allowed: expected a whole number from 8 to 2048\n")


def test_mistakes_and_failures_end_differently(run_main):
    assert run_main(raises(UsageError("weights: not there"))) == (2, "", "stage: weights: not there\n")
    assert run_main(raises(StageError("the disk is full"))) == (1, "", "stage: the disk is full\n")


def test_ctrl_c(run_main):
    status, out, err = run_main(raises(KeyboardInterrupt()))
    assert (status, out, err.strip()) == (130, "", "stage: stopped by Ctrl-C")


def test_a_fault_of_ours_keeps_its_traceback(run_main):
    with pytest.raises(ZeroDivisionError):
        run_main(raises(ZeroDivisionError()))


def test_download_leaves_its_inputs(run_main, pictures, tmp_path):
    arguments = ["--data.source=folder", f"--data.path={json.dumps(str(pictures))}", "--weights=random"]
    status, out, err = run_main(download.run, *arguments, "--data.limit", "4")
    assert (status, err) == (0, "")
    inputs = json.loads((tmp_path / "outputs" / "inputs.json").read_text(encoding="utf-8"))
    assert inputs["data"]["counts"] == {"train": 12, "test": 12}
    assert (inputs["weights"]["used"], inputs["fallback"]) == ("random", [])
    assert str(tmp_path) not in json.dumps(inputs)
    assert "data     folder: 12 train + 12 test, 16x16 pixels" in out
    assert "classes  3: blue, green, red" in out
