"""The comparison as a person finds it: MLflow's UI in a real Chromium, on made runs of two machines.

Each test leaves pictures of what it saw in its `tmp_path`.
"""

import itertools
import queue
import shutil
import subprocess
import threading
import webbrowser

import made
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import WebDriverWait
from stores import fresh_store

from pipeline import compare, config, ui
from pipeline.profiling import score_steps
from pipeline.tracking import store, views

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium-driver"
    ),
]

SECONDS = {"Made GPU A": 10.25, "Made GPU B": 5.125}
PARENTS = [f"{name} · finetune · fp32 × 3" for name in SECONDS]
SINGLES = [f"{name} · linear-probe · fp32" for name in SECONDS]
COLUMNS = [
    "repeats",
    *(score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS),
    "time/total_seconds", "time/process_seconds", "test/accuracy", "memory/peak_mib", "speed/train_images_per_second",
    "behavior", "workload", "hardware", "recipe", "precision",
]  # fmt: skip
"""Those that the made runs have something for."""


def log(own_store, run, name, **tags):
    """Puts a made run into MLflow; its id there. A tag's dot is written as two underscores."""
    tags = run["tags"] | {key.replace("__", "."): value for key, value in tags.items()}
    record = {"name": name, "experiment": "trainmark", "started": run["started"], "params": run["params"]}
    handle = store.start_run(record | {"tags": tags, "datasets": []})
    store.log_metrics(handle, run["metrics"], run["started"])
    for key, values in own_store.courses[run["run_id"]].items():
        store.log_series(handle, key, values, run["started"])
    store.end_run(handle, "FINISHED", run["started"] + 10_000)
    return handle.run_id


def log_machines():
    """Of each machine a training that was repeated, and a single one."""
    own_store = made.Store()
    for hardware, seconds in SECONDS.items():
        machine = {"hardware": hardware, "machine": hardware[-1] * 12}
        machine |= {"seconds": seconds, "speed": 10_000 / seconds}
        own_store.sustained(3, behavior="drift", **machine)
        own_store.sustained(1, recipe="linear-probe", workload="w2", **machine)
        *repeats, single = own_store.runs[-4:]
        for run in own_store.runs[-4:]:
            run["tags"]["precision"] = "fp32"
            for step, figure in itertools.product(
                score_steps.STEPS, ("first_third_images_per_second", "seconds", "batch_size")
            ):
                del run["metrics"][
                    score_steps.metric(step.name, figure)
                ]  # MLflow's list shows no more than a screenful
        name = f"{hardware} · finetune · fp32"
        shared = {"repeats": "3", "repeats__id": machine["machine"]}
        figures = repeats[0]["metrics"] | {"std/time/total_seconds": 0.1}
        parent = log(own_store, repeats[0] | {"metrics": figures}, f"{name} × 3", **shared)
        for number, run in enumerate(repeats, 1):
            log(own_store, run, f"{name} · {number}/3", repeat=str(number), mlflow__parentRunId=parent, **shared)
        log(own_store, single, f"{hardware} · linear-probe · fp32")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page that `make ui` opens, of a store with the runs of two machines and their comparison."""
    folder = tmp_path_factory.mktemp("store")
    opened, servers, popen = queue.Queue(), [], subprocess.Popen

    def served(*args, **options):
        servers.append(popen(*args, **options))
        return servers[-1]

    with pytest.MonkeyPatch.context() as patch:
        for key in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(key, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", fresh_store(folder / "store.db", tmp_path_factory))
        patch.chdir(folder)  # MLflow puts artifacts below the current folder
        log_machines()
        patch.setattr(compare, "REPORTS", folder / "reports")
        compare.run(config.load(), folder)
        patch.setattr(webbrowser, "open", opened.put)
        patch.setattr(subprocess, "Popen", served)
        thread = threading.Thread(target=ui.run, args=(config.load(), folder))
        thread.start()
        try:
            yield opened.get(timeout=120)
        finally:
            servers[0].terminate()
            thread.join()


@pytest.fixture
def chrome(page, tmp_path):
    """Chromium on that page, its runs there; at the end a picture of where it went, and no error on its console."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1600,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as chrome:
        chrome.get(page)
        until(chrome, lambda: set(PARENTS + SINGLES) <= set(names(chrome)))
        yield chrome
        chrome.save_screenshot(tmp_path / "page.png")
        # The UI asks for the user's name, which a server without users does not know.
        assert [entry for entry in chrome.get_log("browser") if "users/current" not in entry["message"]] == []


def until(chrome, holds):
    return WebDriverWait(chrome, 60).until(lambda _: holds())


def find(chrome, selector):
    return chrome.find_elements(By.CSS_SELECTOR, selector)


def click(chrome, by, what):
    element = WebDriverWait(chrome, 60).until(expected.presence_of_element_located((by, what)))
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    WebDriverWait(chrome, 60).until(expected.element_to_be_clickable(element)).click()


def across(chrome, selector, side):
    """The texts of elements, in order of their `left` or `top`; read at once, for the table redraws itself."""
    return chrome.execute_script(
        "const at = each => each.getBoundingClientRect()[arguments[1]];"
        "return [...document.querySelectorAll(arguments[0])].sort((a, b) => at(a) - at(b)).map(each => each.innerText)",
        selector, side,
    )  # fmt: skip


def names(chrome):
    """The runs in the table."""
    return across(chrome, ".ag-row [col-id='attributes.`Run Name`'] a", "top")


def columns(chrome):
    return [name.strip() for name in across(chrome, ".ag-header-cell[col-id]", "left") if name.strip()]


def tick(chrome, name):
    (box,) = find(chrome, f"[row-id='{run_id(chrome, name)}'] .ag-selection-checkbox input")
    box.click()


def run_id(chrome, name):
    return chrome.find_element(By.LINK_TEXT, name).get_attribute("href").rpartition("/")[2]


def text(chrome):
    return chrome.find_element(By.TAG_NAME, "body").text


def test_the_table_has_the_columns_of_the_comparison_and_parents_with_their_repeats_folded(chrome, tmp_path):
    newest_first = [SINGLES[1], PARENTS[1], SINGLES[0], PARENTS[0]]
    assert names(chrome) == ["comparison", *newest_first]
    assert columns(chrome)[:6] == ["Run Name", "Created", *COLUMNS[:4]]
    last = find(chrome, f".ag-header-cell[col-id='metrics.`{COLUMNS[3]}`']")[0].rect
    assistant = find(chrome, "button[aria-label='New Chat']")[0].rect
    assert last["x"] + last["width"] < assistant["x"]  # at first sight
    chrome.save_screenshot(tmp_path / "first.png")
    chrome.set_window_size(2800, 1000)
    until(chrome, lambda: columns(chrome) == ["Run Name", "Created", *COLUMNS, "Duration"])
    click(chrome, By.CSS_SELECTOR, f"[row-id='{run_id(chrome, PARENTS[1])}'] .ag-cell button")
    until(chrome, lambda: f"{PARENTS[1][:-4]} · 2/3" in names(chrome))


def test_sorted_by_a_metric_repeats_are_unfolded_until_sorted_by_date_again(chrome):
    folded = len(names(chrome))
    click(chrome, By.CSS_SELECTOR, "[data-testid='sort-header-test/accuracy']")
    until(chrome, lambda: len(names(chrome)) == folded + 6)
    click(chrome, By.CSS_SELECTOR, "[data-testid=sort-header-Created]")
    until(chrome, lambda: len(names(chrome)) == folded)


def test_a_machine_is_found_by_its_hardware(chrome):
    (box,) = find(chrome, "[data-testid=search-box]")
    box.send_keys("tags.hardware = 'Made GPU A'", Keys.ENTER)
    until(chrome, lambda: names(chrome) == [SINGLES[0], PARENTS[0]])
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, Keys.ENTER)
    until(chrome, lambda: set(PARENTS + SINGLES) <= set(names(chrome)))


@pytest.mark.parametrize("chosen", [PARENTS, SINGLES], ids=["repeated", "single"])
def test_two_machines_are_compared_by_metrics_and_curves(chrome, chosen, tmp_path):
    for name in chosen:
        tick(chrome, name)
    click(chrome, By.CSS_SELECTOR, "[data-testid=runs-compare-button]")
    until(chrome, lambda: "Comparing 2 Runs" in text(chrome))
    until(chrome, lambda: all(name in text(chrome) for name in (*chosen, *SECONDS)))
    for seconds in SECONDS.values():  # in all, among the metrics
        until(chrome, lambda seconds=seconds: chrome.find_elements(By.XPATH, f"//*[text()='{seconds}']"))
    chrome.save_screenshot(tmp_path / "compare.png")
    click(chrome, By.CSS_SELECTOR, "a[href*='plot_metric_keys=%5B%22val%2Faccuracy']")
    until(chrome, lambda: len(find(chrome, ".scatterlayer .js-line")) >= len(chosen))
    assert all(f"{name} (val/accuracy)" in text(chrome) for name in chosen)


def test_the_charts_show_both_machines_side_by_side(chrome, tmp_path):
    click(chrome, By.CSS_SELECTOR, "label:has(input[value=CHART])")
    until(chrome, lambda: len(find(chrome, ".barlayer .point")) >= 4 * len(PARENTS + SINGLES))
    sections = [each.text.split("\n")[:2] for each in find(chrome, "[data-testid$=section-header]")]
    assert sections[:2] == [["Results", "(8)"], ["Curves by epoch", "(1)"]]
    assert [name for name, _ in sections[2:]] == list(views._FOLDED)  # and no other, which would be open
    chrome.save_screenshot(tmp_path / "bars.png")
    curves = find(chrome, "[data-testid$=section-header]")[1]
    chrome.execute_script("arguments[0].scrollIntoView()", curves)
    until(chrome, lambda: len(find(chrome, ".scatterlayer .js-line")) >= len(PARENTS + SINGLES))


def test_the_description_says_how_to_compare_and_leads_to_the_report(chrome, tmp_path):
    click(chrome, By.CSS_SELECTOR, "[data-testid=experiment-metadata-editor-edit-button] ~ button")
    until(chrome, lambda: "Compare two machines: tick a run of each, then Compare" in text(chrome))
    assert all(name in text(chrome) for name in COLUMNS if name not in ("hardware", "recipe", "precision"))
    chrome.save_screenshot(tmp_path / "description.png")
    click(chrome, By.LINK_TEXT, "Report")
    until(chrome, lambda: len(chrome.window_handles) == 2)
    chrome.switch_to.window(chrome.window_handles[1])
    WebDriverWait(chrome, 60).until(expected.frame_to_be_available_and_switch_to_it((By.TAG_NAME, "iframe")))
    until(chrome, lambda: "times as fast as Made GPU A on this work" in text(chrome))
