"""The page at `/docs`, in a browser that can reach nothing but this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve.http.openapi import openapi
from tests.serve.harness import LocalFleet, until
from tests.serve.listening import app_of, listening

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LIMIT_S = 60.0
INSIDE = frozenset({"chrome", "chrome-untrusted", "data"})
SHOWN = "return document.querySelector('rapi-doc').shadowRoot.textContent"


class Page:
    """A page in a browser, driven by the WebDriver protocol.

    Source: https://www.w3.org/TR/webdriver2/
    """

    def __init__(self, driver: httpx.Client, session: str) -> None:
        self._driver, self._session = driver, session

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command of the protocol."""
        told = self._driver.post(f"/session/{self._session}/{command}", json=arguments)
        assert told.is_success, told.text
        return told.json()["value"]

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self.ask("execute/sync", script=script, args=[])

    def requested(self) -> list[str]:
        """Every URL that the page has asked for."""
        entries = self.ask("se/log", type="performance")
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A browser without a window."""
    assert BROWSER
    assert DRIVER
    switches = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage")
    arguments = [f"--{switch}" for switch in (*switches, f"user-data-dir={folder}")]
    wanted = {
        "goog:chromeOptions": {"binary": BROWSER, "args": arguments},
        "goog:loggingPrefs": {"performance": "ALL"},
    }
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        started = next(line for line in driver.stdout if "started successfully" in line)
        port = started.split()[-1].rstrip(".")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            asked = {"capabilities": {"alwaysMatch": wanted}}
            session = client.post("/session", json=asked).json()["value"]["sessionId"]
            try:
                yield Page(client, session)
            finally:
                client.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.communicate(timeout=LIMIT_S)


@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
def test_the_page_shows_every_operation_and_asks_nobody_else(
    tmp_path: Path, trunk_folder: Path
) -> None:
    """All that it needs comes from the service that it describes."""
    with (
        LocalFleet(tmp_path / "store", trunk_folder, replicas=1) as fleet,
        listening(app_of(fleet)) as url,
        browsing(tmp_path / "browser") as page,
    ):
        page.ask("url", url=f"{url}/docs")
        until(lambda: "Retire a task" in (page.run(SHOWN) or ""), limit_s=LIMIT_S)
        shown = page.run(SHOWN)
        requested = page.requested()

    for operations in openapi()["paths"].values():
        for operation in operations.values():
            assert operation["summary"] in shown
    assert {urlsplit(address).path for address in requested} >= {
        "/docs",
        "/docs/rapidoc-min.js",
        "/openapi.json",
    }
    # Others never leave the browser: its own first page, and what is written into a URL.
    over_the_network = [a for a in requested if urlsplit(a).scheme not in INSIDE]
    assert {urlsplit(address).netloc for address in over_the_network} == {urlsplit(url).netloc}
