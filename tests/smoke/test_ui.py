"""``sixfold ui`` in a real browser: it finds the run, its charts and its sample grid, and leaves no process behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from sixfold.recipe.load import load_recipe
from tracked_run import RECIPE, train

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1600,1400",
)
WAIT_S = 90.0
STEPS = 50


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with one finished run in its MLflow store."""
    folder = tmp_path_factory.mktemp("ui")
    params = load_recipe("flow/dit-smoke").recipe.model_dump(mode="json")
    train(folder / "runs" / RECIPE / "run-one", f"sqlite:///{folder}/mlflow.db", steps=STEPS, params=params)
    return folder


@pytest.fixture(scope="module")
def ui(tracked):
    """The link that a running ``sixfold ui`` printed."""
    log = tracked / "ui.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sixfold.cli.main", "ui", "--no-browser", "--port", str(free_port())],
            cwd=tracked,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        link = wait_for_link(process, log)
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        yield link
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert len(family) > 1
        assert not [child for child in family[1:] if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None or DRIVER is None:
        missing = "chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in BROWSER_FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_link(process, log):
    deadline_s = time.monotonic() + 2 * WAIT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        if "Ctrl-C stops it" in log.read_text():
            return re.search(r"http://\S+/model-metrics", log.read_text())[0]
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def wait_for(browser, what, found):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, WAIT_S, poll_frequency=0.2, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(found, message=what)


def charts(browser):
    """What the drawn charts show, as ``{title: y values}``; charts come after the page."""
    script = """
        return Object.fromEntries([...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')]
            .map(card => [card.querySelector('h4')?.textContent, card.querySelector('.js-plotly-plot')?.data?.[0]?.y])
            .filter(([title, values]) => title && values && values.length)
            .map(([title, values]) => [title, Array.from(values)]))
    """
    return browser.execute_script(script)


def loaded_images(browser, inside):
    """Addresses of the sample grids of the last step that have been loaded, drawn in the elements that match."""
    script = """
        return [...document.querySelectorAll(arguments[0])]
            .filter(image => image.complete && image.naturalWidth > 0 && image.width > 0)
            .map(image => image.src)
    """
    return browser.execute_script(script, f"{inside} img[src*='samples~grid%2Bstep%2B{STEPS}%2B']")


def moved_to_last_step(browser):
    """Move the grid's slider on, and tell whether it has come to the end."""
    slider = browser.find_element("css selector", "[role=slider]")
    if slider.get_attribute("aria-valuenow") == str(STEPS):
        return True
    slider.send_keys("\ue014")  # the right arrow key
    return False


def test_charts_and_sample_grid_are_where_the_link_leads(browser, ui, tracked):
    browser.get(ui)
    shown = wait_for(browser, "the loss chart", lambda driver: charts(driver).get("loss"))
    assert shown == pytest.approx([1 / step for step in range(1, STEPS + 1)])
    assert "run-one" in browser.find_element("tag name", "body").text

    wait_for(browser, "the slider of the sample grid", moved_to_last_step)
    wait_for(browser, "the sample grid", lambda driver: loaded_images(driver, "[data-testid$=runs-card]"))
    browser.save_screenshot(str(tracked / "charts.png"))


def test_the_overview_shows_the_newest_samples(browser, ui, tracked):
    browser.get(ui.removesuffix("/model-metrics"))
    wait_for(browser, "the newest samples", lambda driver: loaded_images(driver, "body"))
    content = browser.find_element("tag name", "body").get_attribute("textContent")
    assert f"samples/text at step {STEPS}" in content  # further down, behind "Show more"
    browser.save_screenshot(str(tracked / "overview.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--uri", "sqlite:///nowhere.db"), "there is no MLflow store yet"),
        (("--uri", "sqlite:///mlflow.db", "--port", "{taken}"), "is taken by another program"),
    ],
)
def test_faults_are_one_clear_message(tracked, arguments, message):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        filled = [argument.format(taken=other.getsockname()[1]) for argument in arguments]
        command = [sys.executable, "-m", "sixfold.cli.main", "ui", "--no-browser", *filled]
        result = subprocess.run(command, cwd=tracked, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
