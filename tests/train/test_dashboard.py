"""`ernie dashboard`: started as a user starts it, seen as a user sees it."""

import os
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

from train.tracking import make_trackers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run_on_record(tmp_path_factory):
    """A run of 50 steps in trackio's folder (a temporary one, see conftest.py)."""
    _, tracker = make_trackers(["trackio"], "dashboard-test")
    tracker.start("digits-seen", {"lr": 1e-3}, tmp_path_factory.mktemp("run"))
    for step in range(1, 51):
        tracker.log({"loss": 2.3 / step, "accuracy": 1 - 1 / step}, step)
    tracker.finish()
    assert tracker.failures == 0


@contextmanager
def dashboard(*arguments: str):
    """The address that a started dashboard prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train.dashboard", "--no-browser", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("dashboard: http://127.0.0.1:"), first + process.stdout.read()
        yield first.split()[1]
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def test_the_page_is_served_from_this_machine_alone(run_on_record):
    with dashboard("--project", "dashboard-test") as url, urllib.request.urlopen(url, timeout=20) as answer:
        page = answer.read().decode()
    assert answer.status == 200
    assert 'src="http' not in page and 'href="http' not in page  # nothing comes from another server


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_run_and_its_curves(run_on_record, tmp_path):
    with dashboard("--project", "dashboard-test") as url:
        page = subprocess.run(
            [
                str(CHROMIUM),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1400,1000",
                "--virtual-time-budget=20000",
                "--dump-dom",
                f"{url}?project=dashboard-test",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        ).stdout
    assert "digits-seen" in page, page[:2000]
    for metric in ("loss", "accuracy"):
        assert f">{metric}<" in page
    assert "<canvas" in page or "<svg" in page


def test_an_unknown_project_is_an_error_that_lists_the_known_ones(run_on_record):
    out = subprocess.run(
        [sys.executable, "-m", "train.dashboard", "--no-browser", "--project", "nope"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 1
    assert "--project nope: there is no such project" in out.stderr
    assert "dashboard-test" in out.stderr


def test_a_port_in_use_is_an_error_that_names_it(run_on_record):
    with dashboard() as url:
        port = url.rstrip("/").rsplit(":", 1)[1]
        out = subprocess.run(
            [sys.executable, "-m", "train.dashboard", "--no-browser", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert out.returncode == 1
    assert f"--port {port}: the dashboard could not start" in out.stderr
