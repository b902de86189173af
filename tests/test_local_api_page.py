"""The page that the local API serves at `/`, driven in headless Chromium: a whole job, the keyboard, a key, a phone."""

import hashlib
import json
import os
import re
import time
from pathlib import Path

import httpx2
import openai
import pytest
from chromium import CHROMIUM, Chromium, brightness
from local_api_doubles import FakeEngine, running, training_file, wait_for
from tiny_model import write_training_file

from local_api import page

ATTACK = '<img src="http://127.0.0.1:9/x" onerror="window.hacked = 1"><script>window.hacked = 1</script>'
KEY = "s3cret-ü"


class Browser:
    """The page as a reader has it: opened once, looked at again and again."""

    def __init__(self, chromium, url):
        self.chromium, self.url = chromium, url
        chromium.call("Network.clearBrowserCookies")
        chromium.call("Emulation.setEmulatedMedia", features=[])
        chromium.open("about:blank")
        self.size(1280)
        chromium.open(f"{url}/")

    def __call__(self, expression):
        return self.chromium(expression)

    def size(self, width):
        mobile = width < 500
        self.chromium.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=mobile
        )

    def wait(self, expression, seconds=20):
        """Evaluate an expression until it is true of the page; return its value, and for an element True."""
        value_of = f"const value = {expression}; return value instanceof Node || value"
        deadline = time.monotonic() + seconds
        while not (value := self(f"(() => {{ try {{ {value_of} }} catch {{ return null }} }})()")):
            assert time.monotonic() < deadline, f"{expression}\n{self('document.body.innerText')}"
            time.sleep(0.03)
        return value

    def text(self, selector):
        return self(f"document.querySelector({json.dumps(selector)}).innerText")

    def wait_for_text(self, selector, text, seconds=20):
        self.wait(f"document.querySelector({json.dumps(selector)}).innerText.includes({json.dumps(text)})", seconds)

    def click(self, selector):
        self.wait(f"document.querySelector({json.dumps(selector)}).offsetParent")
        self(f"document.querySelector({json.dumps(selector)}).click()")

    def point(self, element, right, down):
        """Move the mouse to this place in an element, in pixels from its left and its top."""
        left, top = self(f"(({{left, top}}) => [left, top])({element}.getBoundingClientRect())")
        self.chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + right, y=top + down)

    def press(self, key, text=None):
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
            more = {"text": text} if text and kind == "keyDown" else {}
            self.chromium.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more
            )

    def type(self, text):
        self.chromium.call("Input.insertText", text=text)

    def focused(self):
        """Return the id or the text of what has the keyboard's focus; "" if it has gone to the browser's own bars."""
        return self("(one => one === document.body ? '' : one.id || one.textContent.trim())(document.activeElement)")

    def tab_to(self, name):
        """Press Tab until the element with this id or text has the focus; return what had it on the way there."""
        passed = []
        while self.focused() != name:
            passed.append(self.focused())
            assert len(passed) < 60, passed
            self.press("Tab")
            assert self.focused() == "" or self("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        return passed

    def problems(self):
        """Return what the console said, and which other origins were asked for anything."""
        requests = [event["request"]["url"] for event in self.chromium.named("Network.requestWillBeSent")]
        elsewhere = [one for one in requests if not one.startswith(f"{self.url}/")]
        entries = [event["entry"] for event in self.chromium.named("Log.entryAdded")]
        errors = [one for one in entries if one["level"] != "verbose"]
        consoles = self.chromium.named("Runtime.consoleAPICalled") + self.chromium.named("Runtime.exceptionThrown")
        return elsewhere + errors + consoles


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not CHROMIUM or os.name == "nt":
        pytest.skip("the local API's page is not driven: there is no chromium on this machine")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server with stand-ins for trainer and engine, and a client of it."""
    with running(tmp_path_factory.mktemp("page") / "data") as (url, _):
        yield url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def browser(chromium, server):
    return Browser(chromium, server[0])


def create_job(client, first="hello", **parameters):
    file = client.files.create(file=("training_data.jsonl", training_file(first)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id, **parameters)


def test_a_whole_job_is_followed_without_a_reload(tiny_api, chromium, tmp_path):
    """With the real trainer and the real engine, on a tiny model: from the empty page to two answers side by side."""
    url = tiny_api.base_url.removesuffix("/v1")
    client = openai.OpenAI(base_url=tiny_api.base_url, api_key="any")
    browser = Browser(chromium, url)
    browser.wait_for_text("#connection", "Live")
    browser("window.still_here = true")

    files = [
        client.files.create(file=(path.name, path.read_bytes()), purpose="fine-tune")
        for path in (write_training_file(tmp_path / name) for name in ("training_data.jsonl", "validation_data.jsonl"))
    ]
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=files[0].id,
        validation_file=files[1].id,
        suffix="watched",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 2}}},
    )
    browser.wait_for_text("#job-list a", "watched")
    browser.wait_for_text("#job-head h2", "watched")
    seen = set()
    deadline = time.monotonic() + 120
    while "succeeded" not in seen:
        assert time.monotonic() < deadline, seen
        seen.add(browser("document.querySelector('#job-head .badge').textContent"))
        time.sleep(0.05)
    assert seen & {"validating files", "queued", "running"}, seen

    job = wait_for(job.id, client, "succeeded")
    browser.wait_for_text("#facts", job.fine_tuned_model)
    browser.wait("document.querySelector('#chart canvas')")
    assert browser("document.querySelector('#chart').ariaLabel").startswith("Loss curve. Step 24: training loss")
    assert re.search(r"full validation loss \d\.\d{3}", browser.text("#legend"))
    assert browser(COLOURS) >= 4, "the curve has no lines in its colours"
    width = browser("document.querySelector('#chart').clientWidth")
    browser.point("document.querySelector('#chart')", width // 2, 100)
    browser.wait_for_text("#legend", "Step 12")  # the figures under the mouse
    steps = browser("[...document.querySelectorAll('#checkpoints tbody th')].map(one => one.textContent)")
    assert steps == [str(one.step_number) for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert "successfully completed" in browser.text("#events li")

    browser.click("#job-head a.primary")
    browser.wait("document.querySelector('#model-b').value.startsWith('ft:tiny')")
    browser.wait("document.querySelector('#system').value === 'You answer.'")  # as in the training file
    browser("document.querySelector('#max-tokens').value = 8; document.querySelector('#question').focus()")
    browser.type("Is it?")
    browser.press("Enter", text="\r")
    browser.wait(
        "[...document.querySelectorAll('#answers small')].filter(one => /tokens/.test(one.textContent))[1]", 60
    )
    answers = browser("[...document.querySelectorAll('#answers article')].map(one => one.innerText.split('\\n'))")
    assert [answer[:2] for answer in answers] == [["Base model", "tiny"], ["Fine-tuned model", job.fine_tuned_model]]
    assert browser("[...document.querySelectorAll('#answers .text')].every(one => one.ariaBusy === 'false')")
    assert browser("window.still_here") and browser.problems() == []


# How many colours other than grey there are among the chart's pixels: lines are drawn, not only axes.
COLOURS = """(() => {
    const canvas = document.querySelector("#chart canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const seen = new Set();
    for (let at = 0; at < data.length; at += 4) {
        const [red, , blue, alpha] = data.subarray(at, at + 4);
        if (alpha === 255 && Math.abs(red - blue) > 60) seen.add(`${red} ${blue}`);
    }
    return seen.size;
})()"""


def test_the_curve_grows_while_the_job_runs(browser, server):
    _, client = server
    job = create_job(client, "endless", suffix="growing")  # a step each 0.15 s
    browser.wait_for_text("#job-head h2", "growing")
    progress = "document.querySelector('#job-head progress').value"
    early = browser.wait(progress)
    browser.wait(f"{progress} > {early + 5}")
    assert "ready at about" in browser.text("#job-head .progress")
    said = int(re.search(r"Step (\d+)", browser.text("#legend"))[1])
    assert said > early and browser("document.querySelector('#events').childElementCount") > said
    browser.click("#job-head button")  # Pause needs no confirmation: nothing is lost
    browser.wait_for_text("#job-head .badge", "paused")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    browser.click("#job-head button")
    browser.wait("['queued', 'running'].includes(document.querySelector('#job-head .badge').textContent)")
    client.fine_tuning.jobs.cancel(job.id)
    browser.wait_for_text("#job-head .badge", "cancelled")
    assert browser.problems() == []


def test_jobs_without_a_suffix_are_told_apart_and_empty_columns_are_not_shown(chromium, server):
    url, client = server
    jobs = [wait_for(create_job(client).id, client) for _ in range(5)]
    browser = Browser(chromium, url)
    for job in jobs:
        browser.wait_for_text("#job-list", f"tiny-base · {job.id[-6:]}")
    browser.wait_for_text("#checkpoints", "Training loss")
    assert browser.text("#checkpoints thead").strip().split("\t") == ["Step", "Training loss", "Try it"]
    browser.size(390)  # the list goes on below what is seen of it, and shows so
    assert browser("(one => one.scrollHeight > one.clientHeight)(document.querySelector('#job-list'))")
    assert browser("getComputedStyle(document.querySelector('#job-list')).backgroundAttachment.includes('local')")


def test_a_failed_job_says_why(browser, server):
    create_job(server[1], "fail", suffix="broken")
    browser.wait_for_text("#job-head [role=alert]", "Line 3: too long")
    assert "failed" in browser.text("#job-head .badge")


def test_markup_stays_text_wherever_it_comes_from(chromium, server):
    url, client = server
    file = client.files.create(file=(f"{ATTACK.replace('/', '-')}.jsonl", training_file(ATTACK)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny-base", training_file=file.id, suffix="<b>x</b>" + ATTACK[:40], metadata={ATTACK[:60]: ATTACK}
    )
    wait_for(job.id, client)
    browser = Browser(chromium, url)
    browser.wait_for_text("#job-list a", "<b>x</b>")
    browser.wait_for_text("#job-head h2", "<b>x</b>")
    browser.wait_for_text("#facts", f"{ATTACK[:60]}: {ATTACK}")
    browser.wait_for_text("#facts", file.filename)
    browser("location.hash = 'files'")
    browser.wait_for_text("#files", file.filename)
    browser.click(f"[id='Delete files/{file.id}']")
    browser.wait_for_text("#confirm-question", file.filename)
    browser.press("Escape")
    browser("location.hash = 'playground'")
    browser.wait("document.querySelector('#model-b').value")
    browser(f"document.querySelector('#question').value = {json.dumps(ATTACK)}")
    browser.click("#ask .primary")
    browser.wait("document.querySelectorAll('#answers small')[1].textContent.includes('tokens')")
    assert browser.text("#answers h3") == ATTACK
    answers = browser("[...document.querySelectorAll('#answers .text')].map(one => one.textContent.trim())")
    assert answers == [f"You said: {ATTACK}"] * 2
    assert browser("document.querySelectorAll('img, iframe, b:not(#legend b)').length") == 0
    assert browser("document.scripts.length") == 2 and browser("typeof window.hacked") == "undefined"
    assert browser.problems() == []


def test_even_a_script_that_got_in_would_not_run(browser):
    for attempt in (
        "document.body.insertAdjacentHTML('beforeend', '<p>x</p>')",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))",
        "document.body.setAttribute('onclick', 'window.hacked = 1'); document.body.click()",
    ):
        result = browser.chromium.call("Runtime.evaluate", expression=attempt)
        assert "exceptionDetails" in result or browser("typeof window.hacked") == "undefined"
    assert browser("typeof window.hacked") == "undefined" and browser("document.querySelector('body > p')") is None


def test_answers_stream_and_can_be_stopped(chromium, tmp_path):
    engine = FakeEngine()
    with running(tmp_path / "data", engine=engine) as (url, _):
        browser = Browser(chromium, f"{url}")
        browser("location.hash = 'playground'")
        browser.wait("document.querySelector('#model-a').value === 'tiny-base'")
        assert browser("document.querySelector('#model-b').value") == ""  # no fine-tuned model yet
        browser("document.querySelector('#question').focus()")
        browser.type("slow")
        browser.press("Enter", text="\r")
        browser.wait("document.querySelector('#answers .text').textContent.startsWith('on on on ')")
        browser.press("Escape")
        browser.wait_for_text("#answers small", "stopped")
        assert engine.cancelled.wait(10)
        for question, sentence in (("too long", "maximum context length"), ("broken", "The model broke")):
            browser(f"document.querySelector('#question').value = {question!r}")
            browser.click("#ask .primary")
            browser.wait_for_text("#answers small.bad", sentence)
        browser(
            "document.querySelector('#system').value = 'Be brief.'; document.querySelector('#question').value = 'hi'"
        )
        browser.click("#ask .primary")
        browser.wait_for_text("#answers article", "You said: hi")
        assert [one["content"] for one in engine.requests[-1].messages] == ["Be brief.", "hi"]
        assert engine.requests[-1].temperature == 0 and engine.requests[-1].max_tokens == 400


def test_the_keyboard_reaches_everything(chromium, server):
    url, client = server
    old, new = (create_job(client, suffix=name) for name in ("older", "newer"))
    for job in (old, new):
        wait_for(job.id, client)
    browser = Browser(chromium, url)
    browser.wait_for_text("#checkpoints", "Checkpoints")
    browser.press("Tab")
    passed = browser.tab_to("events")
    assert passed[:4] == ["Jobs", "Models", "Files", "Playground"]
    assert passed[4:6] == [f"link-{new.id}", f"link-{old.id}"]
    assert "Ask this model" in passed and sum(one.startswith("ask-ft:tiny-base") for one in passed) == 3
    browser.tab_to("Jobs")
    browser.tab_to(f"link-{old.id}")
    browser.press("Enter", text="\r")
    browser.wait_for_text("#job-head h2", "older")
    assert browser.focused() == f"link-{old.id}"  # drawn anew, with the focus where it was

    browser("location.hash = 'files'")
    file = client.files.retrieve(old.training_file)
    delete = f"Delete files/{file.id}"
    browser.wait(f"document.getElementById({delete!r})")
    browser.tab_to(delete)
    browser.press("Enter", text="\r")
    browser.wait("document.querySelector('dialog').open")
    assert browser.focused() == "Keep it"
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog').open")
    assert browser.focused() == delete and client.files.retrieve(file.id)
    browser.press("Enter", text="\r")
    browser.tab_to("confirm-yes")
    browser.press("Enter", text="\r")
    browser.wait(f"!document.getElementById({delete!r})")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)

    browser("location.hash = 'playground'")
    browser.wait("document.querySelector('#model-b').value")
    order = [*browser.tab_to("temperature"), "temperature"]
    fields = ["model-a", "model-b", "system", "question", "Ask", "temperature"]
    assert [one for one in order if one in fields] == fields
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(one => !one.labels.length).length"
    assert browser(unnamed) == 0 and browser.problems() == []


def test_a_model_is_deleted_with_its_checkpoints(browser, server):
    _, client = server
    job = wait_for(create_job(client, suffix="short-lived").id, client, "succeeded")
    browser("location.hash = 'models'")
    delete = f"[id='Delete models/{job.fine_tuned_model.replace(':', '%3A')}']"
    browser.click(delete)
    browser.wait_for_text("#confirm-question", f"{job.fine_tuned_model} and its checkpoints")
    browser.click("#confirm-yes")
    browser.wait("!document.querySelector('#models').textContent.includes('short-lived')")
    assert not [one for one in client.models.list() if "short-lived" in one.id]
    assert "tiny-base" in browser.text("#models") and not browser(
        "document.querySelector('[id*=\"models/tiny-base\"]')"
    )


def test_an_empty_server_says_how_to_begin_and_a_lost_one_that_it_is_lost(chromium, tmp_path):
    with running(tmp_path / "data") as (url, _):
        browser = Browser(chromium, url)
        browser.wait_for_text("#no-job", "python fine_tune.py")
        assert f"{url}/v1" in browser.text("#no-job")
        browser("location.hash = 'files'")
        browser.wait_for_text("#files", "No files yet")
        assert browser.problems() == []
        live = browser("getComputedStyle(document.querySelector('#connection')).color")
    browser.wait_for_text("#connection", "The server does not answer. Trying again")
    assert browser("getComputedStyle(document.querySelector('#connection')).color") != live


def test_with_a_key_the_page_asks_for_it(chromium, tmp_path):
    with running(tmp_path / "data", api_key=KEY) as (url, _):
        browser = Browser(chromium, url)
        browser.wait("document.activeElement.id === 'key-field'")
        assert browser("document.querySelector('#key-field').type") == "password"
        assert browser.text("#key-problem") == "" and not browser("document.querySelector('#jobs').offsetParent")
        browser.type("wrong")
        browser.press("Enter", text="\r")
        browser.wait_for_text("#key-problem", "That is not the key: the server refused it.")
        assert browser("document.querySelector('#key-field').value") == ""
        browser.type(KEY)
        browser.press("Enter", text="\r")
        browser.wait_for_text("#no-job", "No fine-tuning job yet")
        assert not browser("document.querySelector('#key').offsetParent")
        headers = {"Authorization": f"Bearer {KEY}".encode()}  # by hand, for the SDK sends a key in ASCII only
        upload = {"files": {"file": ("data.jsonl", training_file())}, "data": {"purpose": "fine-tune"}}
        file = httpx2.post(f"{url}/v1/files", headers=headers, **upload).json()
        job = {"model": "tiny-base", "training_file": file["id"], "suffix": "guarded"}
        assert httpx2.post(f"{url}/v1/fine_tuning/jobs", headers=headers, json=job).status_code == 200
        browser.wait_for_text("#job-list", "guarded")
        stored = browser("JSON.stringify({...localStorage}) + document.cookie + location.href")
        assert KEY not in stored and "s3cret" not in stored
        chromium.open(f"{url}/")  # the tab still has it
        browser.wait_for_text("#job-list", "guarded")
        requests = [event["request"] for event in chromium.named("Network.requestWillBeSent")]
        sent = [one["headers"].get("Authorization") for one in requests if "/v1/" not in one["url"]]
        assert sent and not any(sent)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark_mode(browser, server, scheme):
    wait_for(create_job(server[1], suffix="readable").id, server[1])
    browser.chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.wait_for_text("#checkpoints", "Checkpoints")
    background = brightness(browser("getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.1) is (scheme == "dark")
    card = brightness(browser("getComputedStyle(document.querySelector('#events')).backgroundColor"))
    for selector in ("h2", "dt", "dd", ".badge", "#legend", "#events time", "header a", "#job-list small", "td a"):
        text = brightness(browser(f"getComputedStyle(document.querySelector({selector!r})).color"))
        for back in (background, card):
            lighter, darker = max(text, back), min(text, back)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector  # WCAG AA


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_it_fits_a_phone(browser, server, width):
    job = create_job(server[1], suffix="a-rather-long-suffix-such-as-a-reader-might-well-choose-for-it")
    wait_for(job.id, server[1])
    browser.size(width)
    browser.wait_for_text("#checkpoints", "a-rather-long-suffix")
    for view in ("jobs", "models", "files", "playground"):
        browser(f"location.hash = {view!r}")
        browser.wait(f"document.querySelector('#{view}').offsetParent")
        assert browser("document.documentElement.scrollWidth") <= width, view


def test_it_rests_while_no_one_looks(chromium, tmp_path, caplog):
    """A hidden page asks nothing; one that is shown again asks at once."""
    with running(tmp_path / "data") as (url, _):
        browser = Browser(chromium, url)
        browser.wait_for_text("#connection", "Live")
        count = "performance.getEntriesByType('resource').filter(one => one.name.includes('/v1/')).length"
        hide = "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}})"
        browser(f"{hide.format('true')}; document.dispatchEvent(new Event('visibilitychange', {{bubbles: true}}))")
        time.sleep(0.5)
        before = browser(count)
        time.sleep(4)
        assert browser(count) == before
        browser(f"{hide.format('false')}; document.dispatchEvent(new Event('visibilitychange', {{bubbles: true}}))")
        browser.wait(f"{count} > {before}", seconds=2)


# Without a browser: what is served, to whom, and from where


def test_what_is_served(server):
    url, _ = server
    for path, name in page.FILES.items():
        answer = httpx2.get(url + path)
        assert answer.status_code == 200 and answer.content == (page.FOLDER / name).read_bytes()
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    served = {path for path in page.FOLDER.rglob("*") if path.is_file() and path.suffix not in (".md", "")}
    assert served == {page.FOLDER / name for name in page.FILES.values()}
    for path in ("/static/", "/static/../page.py", "/static/%2e%2e/page.py", "/static/uplot/README.md", "/index.html"):
        assert httpx2.get(url + path).status_code == 404


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"},
])  # fmt: skip
def test_the_page_is_guarded_as_the_api_is(server, headers):
    for path in page.FILES:
        assert httpx2.get(server[0] + path, headers=headers).status_code == 403


def test_a_link_on_another_site_may_be_followed_but_not_framed(server):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert httpx2.get(f"{server[0]}/", headers=followed).status_code == 200
    assert httpx2.get(f"{server[0]}/", headers={**followed, "Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert httpx2.get(f"{server[0]}/v1/files", headers=followed).status_code == 403


def test_the_page_has_no_inline_script_or_style():
    html = (page.FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=|https?://", html)
    for script in page.FOLDER.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script.read_text("utf-8")
        )


def test_the_charting_library_is_the_one_that_its_readme_names():
    folder = page.FOLDER / "uplot"
    named = re.findall(r"([0-9a-f]{64})  (\S+)", (folder / "README.md").read_text("utf-8"))
    assert len(named) == 2
    for digest, name in named:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert "MIT License" in (folder / "LICENSE").read_text("utf-8")


def test_the_page_is_found_wherever_the_server_is_started(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.FOLDER.is_absolute() and Path.cwd() == tmp_path
    assert httpx2.get(f"{server[0]}/").text.startswith("<!doctype html>")
