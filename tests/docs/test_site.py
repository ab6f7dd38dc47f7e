"""The built documentation in a browser: links, pictures, the console, and a phone's width.

Run by `nox -s docs` on docs/_build/html; without Chromium on the machine there is nothing to run it in.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver"),
    pytest.mark.skipif(not PAGES, reason="the documentation is not built"),
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(_Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def visit(driver, url):
    """Load a page, whole: a driver may answer while the page before it is still being left."""
    driver.get("about:blank")
    driver.get(url)
    loaded = "return location.href == arguments[0] && document.readyState == 'complete'"
    WebDriverWait(driver, 30).until(lambda _: driver.execute_script(loaded, url))


class _Anchors(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, _tag, attrs):
        self.found |= {value for name, value in attrs if name == "id"}


@functools.cache
def anchors(path):
    parser = _Anchors()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.found


def test_there_are_pages():
    wanted = {"index", "which", "capabilities", "recipes", "api", "benchmarks", "integrations"}
    wanted |= {f"estimators/{name}" for name in ("softmax", "rfa", "ra", "lara", "eva")}
    assert {f"{name}.html" for name in wanted} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_page(browser, address, page):
    browser.set_window_size(1300, 900)
    visit(browser, address + page)
    faults = [
        line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")
    ]
    assert not faults
    empty = browser.execute_script(
        "return [...document.images].filter(x => !x.complete || x.naturalWidth == 0).map(x => x.src)"
    )
    assert not empty
    links = browser.execute_script(
        "return [...document.querySelectorAll('a[href]')].map(x => x.getAttribute('href'))"
    )
    assert links
    for link in {urljoin(address + page, link) for link in links}:
        url, anchor = urldefrag(link)
        if not url.startswith(address):
            assert url.startswith("https://"), link
            continue
        target = SITE / (unquote(url.removeprefix(address)) or "index.html")
        assert target.is_file(), link
        if anchor and target.suffix == ".html":
            assert unquote(anchor) in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_on_a_phone(browser, address, page):
    """Nothing but what scrolls by itself is wider than the screen."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    visit(browser, address + page)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 390
