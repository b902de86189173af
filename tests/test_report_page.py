"""The page of `test_model.py --report`, driven in headless Chromium: mouse, keyboard, phone, dark mode."""

import base64
import itertools
import json
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

import test_model as step5

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or os.name == "nt", reason="the report page is not driven: there is no chromium on this machine"
)

ATTACK = (
    "</pre></script><script>window.hacked = 1</script>"
    '<img src="http://127.0.0.1:9/x" onerror="window.hacked = 1"> \x1b[31m'
)


class Chromium:
    """A headless browser on the DevTools protocol, over the pipe on its descriptors 3 and 4."""

    def __init__(self, profile: Path):
        to_child, self.write_end = os.pipe()
        self.read_end, from_child = os.pipe()
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
            f"--user-data-dir={profile}",
        ]

        def move_ends():  # by way of high numbers, for one of the two may be 3 or 4 already
            os.dup2(to_child, 203)
            os.dup2(from_child, 204)
            os.dup2(203, 3)
            os.dup2(204, 4)

        self.process = subprocess.Popen(
            command,
            preexec_fn=move_ends,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.numbers, self.rest, self.events, self.session = itertools.count(1), b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self):
        while b"\0" not in self.rest:
            piece = os.read(self.read_end, 1 << 20)
            assert piece, "the browser has gone"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while self("document.readyState") != "complete":
            time.sleep(0.02)

    def __call__(self, expression):
        """Evaluate JavaScript on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key, code=None, text=None):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=code or key,
                windowsVirtualKeyCode={"Tab": 9, "Enter": 13, " ": 32}.get(key, 0),
                **more,
            )

    def named(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.write_end)
        os.close(self.read_end)


def row(text, passed):
    answer = step5.NO_ANSWER | {"text": text, "seconds": 1.0, "finish_reason": "stop", "error": None}
    case = {"question": "q", "system": None, "history": [], "answer": "yes", "checks": {"contains": [ATTACK]}}
    scored = step5.score(case, answer, set()) | step5.read_ratings(json.dumps(dict.fromkeys(step5.JUDGE_CRITERIA, 3)))
    del scored["text"]
    return {**scored, "passed": passed}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of 12 cases, three a category; their texts try to break out of the page."""
    results = []
    for number in range(12):
        base, tuned = number % 4 in (0, 3), number % 4 in (1, 3)
        outcome = {(True, False): "broken", (False, True): "fixed", (False, False): "still failing"}.get(
            (base, tuned), "still passing"
        )
        results.append(
            {
                "id": f"case-{number}",
                "category": f"kind {number // 3} <&\"'>",
                "system": ATTACK,
                "question": f"{number} {ATTACK}",
                "history": [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}],
                "expected": ATTACK,
                "generated": ATTACK * 3,
                "base_generated": "word " * 200,
                "outcome": outcome,
                "in_training_data": False,
                "fine_tuned": row(ATTACK, tuned),
                "base": row("", base),
            }
        )
    criteria = [step5.CRITERION_DEFAULTS | {"name": ATTACK, "checks": {}, "judge": "tone"}]
    summary = {
        "model": f"ft:{ATTACK}",
        "base_model": ATTACK,
        "cases_file": ATTACK,
        "server": "http://127.0.0.1:1/v1",
        **step5.summarise(results, criteria, set()),
    }
    path = tmp_path_factory.mktemp("report") / "report.html"
    step5.write_atomically(str(path), step5.report_page(summary, results))
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, page):
    chromium.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.open(page)
    return chromium


SHOWN = (
    "[...document.querySelectorAll('main > details')].filter(one => !one.hidden)"
    ".map(one => one.querySelector('summary .dim').textContent.trim())"
)


def test_nothing_is_fetched_nothing_fails_and_no_text_becomes_markup(browser, page):
    assert browser("typeof window.hacked") == "undefined"
    assert browser("document.scripts.length") == 2 and browser("document.images.length") == 0
    assert {request["request"]["url"] for request in browser.named("Network.requestWillBeSent")} <= {page}
    assert not browser.named("Runtime.exceptionThrown") and not browser.named("Log.entryAdded")
    assert not browser.named("Runtime.consoleAPICalled")
    shown = browser("document.querySelector('main details section:nth-child(2) pre').textContent")
    assert shown == ATTACK * 3
    assert "judge 3.0" in browser("document.querySelector('li').textContent")


def test_the_page_may_fetch_nothing(browser):
    browser("document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x' }))")
    while not browser.named("Log.entryAdded"):
        browser("0")
    assert "Content Security Policy" in browser.named("Log.entryAdded")[0]["entry"]["text"]


def test_the_filters(browser):
    assert browser("document.querySelector('output').textContent.trim()") == "12 of 12"
    browser("[...document.querySelectorAll('button')].find(one => one.value === 'broken').click()")
    assert browser(SHOWN) == ["case-0", "case-4", "case-8"]
    assert browser("document.querySelector('button[aria-pressed=true]').textContent") == "broken"
    browser("select.selectedIndex = 2; select.dispatchEvent(new Event('change'))")
    assert browser(SHOWN) == ["case-4"] and browser("count.textContent.trim()") == "1 of 12"
    browser("[...document.querySelectorAll('button')][0].click()")
    assert browser(SHOWN) == ["case-4", "case-5", "case-3"]  # broken, fixed, still passing


def test_broken_cases_come_first_and_stand_open(browser):
    outcomes = browser(
        "[...document.querySelectorAll('main > details')]"
        ".map(one => [one.querySelector('summary').firstChild.textContent.trim(), one.open])"
    )
    assert [outcome for outcome, _ in outcomes] == [name for name in step5.OUTCOMES for _ in range(3)]
    assert all(is_open == (outcome == "broken") for outcome, is_open in outcomes)


def test_the_keyboard_reaches_everything(browser):
    browser.press("Tab")
    assert browser("document.activeElement.textContent") == "all"
    assert browser("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Tab")
    browser.press("Tab")
    browser.press("Enter", text="\r")
    assert browser("document.querySelector('button[aria-pressed=true]').textContent") == "fixed"
    for _ in range(3):
        browser.press("Tab")
    assert browser("document.activeElement.tagName") == "SELECT"
    browser.press("Tab")
    assert browser("document.activeElement.tagName") == "SUMMARY"
    assert not browser("document.activeElement.parentNode.open")
    browser.press("Enter", text="\r")
    assert browser("document.activeElement.parentNode.open")


def brightness(colour):
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    parts = [
        (part / 255 / 12.92) if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark_mode(browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    back = brightness(browser("getComputedStyle(document.body).backgroundColor"))
    assert (back < 0.1) is (scheme == "dark")
    for selector in ("h1", ".dim", "h3", ".good", ".bad", "pre"):
        text = brightness(browser(f"getComputedStyle(document.querySelector({selector!r})).color"))
        lighter, darker = max(text, back), min(text, back)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector  # WCAG AA


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_a_phone(browser, width):
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=width < 500)
    assert browser("document.documentElement.scrollWidth") <= width
    left, right = browser(
        "[...document.querySelectorAll('details[open] section')].slice(0, 2)"
        ".map(one => one.getBoundingClientRect().left)"
    )
    assert (left < right) is (width == 1200)  # the answers side by side, or one under the other


def test_the_chart_shows_the_pass_rates(browser):
    assert browser("[...document.querySelectorAll('.rate i')].slice(-2).map(one => one.style.width)") == ["50%", "50%"]
    assert browser("document.querySelectorAll('.rate').length") == 10  # four categories and all, both models
    assert browser("document.querySelector('.rate i.tuned').getBoundingClientRect().width") > 20


def test_it_is_drawn(browser):
    picture = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    assert struct.unpack(">II", picture[16:24]) == (1200, 900)
