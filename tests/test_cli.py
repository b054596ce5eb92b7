"""The command line: settings, help, error messages and exit status."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from pipeline import __main__ as overview
from pipeline import cli, config, startup
from pipeline.errors import StageError, UsageError

CHOSEN = config.load().recipe


def parse(*arguments):
    return cli.parse_settings(arguments, "What it does.", "python -m pipeline.stage")


def refusal(*arguments):
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


def shell(*command):
    """Exit status, stdout, stderr of a command in the project's folder."""
    ended = subprocess.run([sys.executable, *command], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """Call cli.main with a stage and arguments. Returns (exit status, stdout, stderr)."""
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


def raises(error):
    def stage(*_):
        raise error

    return stage


# --- from a shell: nothing is touched, for the settings are refused first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "x"], f'recipes.{CHOSEN}.epochs: "x"'),
        (["-S", "recipe=blogg"], 'recipe: "blogg"'),
        (["--learning-rate", "0.1"], "did you mean lr?"),
        (["--device", "gpu"], "did you mean cuda?"),
        (["epochs=2"], "epochs=2: "),
        (["-S", "trainable=[layer4"], "-S trainable, line 1: "),
    ],
)
def test_a_wrong_setting_gives_one_line_and_status_2(arguments, words):
    status, out, err = shell("-m", "pipeline.download", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("download: ") and words in line


def test_the_commands_are_listed():
    status, out, err = shell("-X", "importtime", "-m", "pipeline")
    assert status == 0
    assert not {"torch", "mlflow"} & {line.rpartition("|")[2].strip() for line in err.splitlines()}
    for name, text in overview.commands().items():
        assert f"python -m pipeline.{name} " in out and text and text in out
    assert set(overview.STAGES) | {"run", "ui", "bundle"} <= overview.commands().keys()
    status, _, err = shell("-m", "pipeline", "train")
    assert status == 2 and err.rstrip().endswith("did you mean python -m pipeline.train?")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lists_its_targets():
    ended = subprocess.run(["make"], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    targets = re.search(r"^\.PHONY: (.+)$", (config.ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert ended.returncode == 0
    assert re.findall(r"^make (\w+) ", ended.stdout, re.MULTILINE) == targets[1:]


# --- what arrives


@pytest.mark.parametrize(
    "arguments",
    [
        ["-S", "epochs=3"],
        ["--set-param", "epochs=3"],
        ["--set-param=epochs=3"],
        ["--epochs", "3"],
        ["--epochs=3"],
        [f"--recipes.{CHOSEN}.epochs", "3"],
    ],
)
def test_all_forms_of_an_override_mean_the_same(arguments):
    assert parse(*arguments) == config.load(["epochs=3"]) != config.load() == parse()


def test_mlflows_arguments_are_read_as_yaml():
    settings = parse(
        "--recipe", "blog", "--data.path", "my pictures", "--lr", "1e-3", "--data.limit", "null", "--label=7x"
    )
    assert (settings.recipe, settings.data.path, settings.work.lr) == ("blog", "my pictures", 0.001)
    assert (settings.data.limit, settings.label) == (None, "7x")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["-S"], "-S: "),
        (["--epochs"], "--epochs: "),
        (["--epochs", "--flip", "true"], "--epochs: "),
        (["-S", "epochs"], "-S epochs: "),
        (["-S=epochs=2"], "-S =epochs=2: "),
        (["--"], "--: unknown argument"),
        (["-e", "2"], "-e: unknown argument"),
        ([""], ": unknown argument"),
        (["--flip", "true", "x"], "x: unknown argument"),
        (["--lr", "-1"], f"recipes.{CHOSEN}.lr: -1 "),
        (["--epoch", "2"], "epoch: unknown setting"),
    ],
)
def test_an_argument_that_is_no_setting_is_refused(arguments, start):
    assert refusal(*arguments).startswith(start)


# --- help


def help_of(name, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.parse_settings([*arguments, "--help"], "What it does.", f"python -m pipeline.{name}")
    assert ended.value.code == 0
    return capsys.readouterr().out


def keys_in(text):
    words = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    return [key for key, *_ in config.describe() if key in words]


def test_a_stages_help_shows_its_settings_and_all_shows_the_rest(capsys):
    every = [key for key, *_ in config.describe()]
    shown = {name: keys_in(help_of(name, capsys)) for name in overview.STAGES}
    assert shown["hardware"] == []
    assert shown["sustain"] == ["device", "sustain_seconds", "largest_batch"]
    assert "recipes.NAME.lr" in shown["train"] and "compare.reference" not in shown["train"]
    assert {key for keys in shown.values() for key in keys} == set(every)  # none is forgotten
    for name in ("sustain", "run"):
        text = help_of(name, capsys, "-S", "epochs=nonsense", "--all")
        assert keys_in(text) == every == keys_in(help_of("run", capsys))
    for key, allowed, meaning in config.describe():
        assert any(key in line and allowed in line and meaning in line for line in text.splitlines())
    assert '["linear-probe"]' in text or f'["{CHOSEN}"]' in text  # what params.yaml holds now


@pytest.mark.parametrize("arguments", [line for lines in cli.EXAMPLES.values() for line in lines])
def test_the_examples_in_the_help_work(arguments):
    assert parse(*shlex.split(arguments)) != parse()


# --- how it ends


def test_a_stage_gets_settings_and_folder(run_main, tmp_path):
    calls = []
    assert run_main(lambda *arguments: calls.append(arguments), "--epochs", "3") == (0, "", "")
    assert calls == [(config.load(["epochs=3"]), tmp_path / "outputs")]
    status, out, err = run_main(lambda *arguments: calls.append(arguments), "--image_size", "4")
    assert (status, out, len(calls)) == (2, "", 1)
    assert err.startswith(f"stage: recipes.{CHOSEN}.image_size: 4 ")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("weights: not there"), 2, "stage: weights: not there"),
        (StageError("the disk is full"), 1, "stage: the disk is full"),
        (ModuleNotFoundError("x", name="scipy"), 1, "stage: scipy is missing: pip install -r requirements.txt"),
        (ImportError("libcudnn.so.9: cannot open\nmore"), 1, f"stage: libcudnn.so.9: cannot open: {startup.REINSTALL}"),
        (OSError("libcudnn.so.9: cannot open"), 1, f"stage: libcudnn.so.9: cannot open: {startup.REINSTALL}"),
        (PermissionError(13, "Permission denied", "/a"), 1, "stage: can't use /a: Permission denied"),
        (KeyboardInterrupt(), 130, "stage: stopped by Ctrl-C"),
    ],
)
def test_an_error_gives_one_line_and_its_status(run_main, error, status, line):
    code, out, err = run_main(raises(error))
    assert (code, out, err.strip()) == (status, "", line)


def test_an_unexpected_error_keeps_its_traceback(run_main):
    with pytest.raises(ZeroDivisionError):
        run_main(raises(ZeroDivisionError()))
