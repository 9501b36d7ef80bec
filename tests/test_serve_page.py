"""The web page of the server, in a headless Chromium."""

import dataclasses
import re
import shutil
import threading

import pytest

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.run import Config
from gptjax.text.tokenizers.plain import CharTokenizer
from tests.server import wait_for
from tests.test_chat import INSTRUCT, MODEL
from tests.test_decode import make_params

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
uvicorn = pytest.importorskip("uvicorn", reason="needs the packages of gptjax[serve]")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

from gptjax.serving.app import make_app  # noqa: E402
from gptjax.serving.service import Service  # noqa: E402
from gptjax.verbs.serve import listen  # noqa: E402
from tests.test_serve import NAME, serve_config  # noqa: E402

expect = playwright.expect


@pytest.fixture(scope="module")
def url():
    """A server of a model that writes letters."""
    config = serve_config(port=0)
    tokenizer = CharTokenizer("".join(map(chr, range(97, 123))) + "[]\n", False)
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    run = LoadedRun(Config(model=model, task=INSTRUCT), make_params(model), tokenizer, 0)
    service = Service(run, NAME, config)
    server = uvicorn.Server(uvicorn.Config(make_app(service, config), log_level="warning"))
    listening = listen(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page on a narrow dark screen; everything that it loads or complains of is seen."""
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
    page.goto(url)
    expect(page.locator("#name")).to_have_text(NAME)
    yield page
    context.close()
    assert not problems


def test_a_text_is_continued_and_goes_on_from_an_alternative_of_a_token(page):
    page.fill("#prompt", "abc")
    page.keyboard.press("Control+Enter")
    token = page.locator(".token[data-n='5']")
    expect(token).to_be_visible(timeout=30_000)
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    assert page.inner_text("#text").startswith("abc")
    token.hover()
    assert re.search(r"[\d.]+ %", page.inner_text("#tip"))
    before = page.locator("#text").text_content()
    kept = "abc" + "".join(page.locator(f".token[data-n='{n}']").text_content() for n in range(5))
    token.click()
    page.locator("#tip button:not([aria-current=true])").first.click()
    expect(page.locator(".token[data-n='5']")).to_have_attribute("aria-label", re.compile("chosen by you"))
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    after = page.locator("#text").text_content()
    assert after.startswith(kept) and after != before
    wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not wide and page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 23)"


def test_tokens_are_reached_by_keyboard(page):
    page.fill("#prompt", "abc")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token[data-n='3']")).to_be_visible(timeout=30_000)
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    page.locator(".token[data-n='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token[data-n='2']")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#tip button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    expect(page.locator(".token[data-n='2']")).to_be_focused()


def test_the_temperature_of_the_slider_is_used(page):
    texts = set()
    page.fill("#prompt", "abc")
    page.locator("#temperature").fill("0")
    for _ in range(2):
        page.locator("#go").click()
        expect(page.locator(".token[data-n='3']")).to_be_visible(timeout=30_000)
        expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
        texts.add(page.locator("#text").text_content())
    assert len(texts) == 1


def test_a_chat_is_answered(page):
    page.locator("#tab-chat").click()
    page.fill("#message", "hi")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#turns .turn")).to_have_count(2)
    expect(page.locator("#stop-chat")).to_be_disabled(timeout=30_000)
    user, answer = page.locator("#turns .turn span").all_text_contents()
    assert user == "hi" and answer.strip()
    page.locator("#reset").click()
    expect(page.locator("#turns .turn")).to_have_count(0)
