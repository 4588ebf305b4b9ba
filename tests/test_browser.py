"""The page in a real browser: Debian's Chromium through Playwright, offline. Skipped where there is none."""

import shutil
from pathlib import Path

import pytest
from test_report_toys import BOARD, codec_store, write_board

from bench.report import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000  # ms; a busy machine is slow, not wrong
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    published = (
        "run,suite,suite_version,model,seed,metric,slice,value,low,high,method,n,expected,complete,unit,better,signature,source\n"
        ',reconstruction,0,famous,0,rFID,"ImageNet val, 256 px",0.9,,,none,0,0,true,,lower,not stated,Doe 2020\n'
        ',reconstruction,0,older,0,rFID,"ImageNet val, 256 px",10.5,,,none,0,0,true,,lower,not stated,Doe 2010\n'
    )
    (root / "published.csv").write_text(published)
    board = write_board(root, BOARD.replace('"board/scores.csv"', '"published.csv"'))
    render(board, codec_store(root / "store"), root / "board")
    return root / "board" / "index.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        try:
            opened = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        except playwright.Error as e:
            pytest.skip(f"chromium does not start: {str(e).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, path):
    """Opens the page at a width; whatever it logs, throws or asks for is a failure of the test that used it."""
    heard, contexts = [], []

    def visit(width=1280, **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: heard.append(m.text))
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or heard.append(r.url))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert heard == []


def column(page, number, table="#table table"):
    return page.eval_on_selector_all(f"{table} tbody tr", "(rows, i) => rows.map(r => r.cells[i].dataset.v)", number)


def test_a_click_sorts_and_a_second_click_turns_the_order(opened):
    page = opened()
    by_rank = column(page, 1)
    button = page.locator("#table th button").nth(3)  # bpp, lower is better
    button.click()
    rising = [float(v) for v in column(page, 3)]
    assert rising == sorted(rising) and column(page, 1) != by_rank
    assert page.locator("#table th").nth(3).get_attribute("aria-sort") == "ascending"
    button.click()
    assert [float(v) for v in column(page, 3)] == rising[::-1]
    page.locator("#table th button").nth(2).click()  # PSNR, higher is better: best first
    falling = [float(v) for v in column(page, 2)]
    assert falling == sorted(falling, reverse=True)
    page.locator("#table th button").nth(0).click()
    assert column(page, 1) == by_rank
    assert page.locator("#table th[aria-sort=ascending], #table th[aria-sort=descending]").count() == 1


def test_the_keyboard_sorts_too(opened):
    page = opened()
    page.locator("#table th button").nth(1).focus()
    page.keyboard.press("Enter")
    names = column(page, 1)
    assert names == ["jpeg-20", "jpeg-50", "jpeg-80", "webp-20", "webp-50", "webp-80"]


def test_published_numbers_sort_as_numbers(opened):
    page = opened()
    button = page.locator("#published th button").nth(1)
    button.click()
    assert column(page, 0, "#published table") == ["famous", "older"]
    button.click()
    assert column(page, 0, "#published table") == ["older", "famous"]


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_width_scrolls_sideways(opened, width):
    page = opened(width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_is_needed_but_the_file(opened):
    """Without script the table is whole and its buttons are off; pictures and figures are there."""
    page = opened(java_script_enabled=False)
    assert page.locator("#table tbody tr").count() == 6
    assert page.locator("#table th button:enabled").count() == 0
    assert page.locator("svg.figure").count() == 3
    assert page.locator("#gallery img").count() == 8 * (1 + 2 * 6)


def test_pictures_decode_and_figures_have_a_size(opened):
    page = opened()
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    sizes = page.evaluate("[...document.querySelectorAll('svg.figure')].map(s => s.getBoundingClientRect().height)")
    assert len(sizes) == 3 and min(sizes) > 100


def test_the_table_can_be_saved(opened, path):
    page = opened(accept_downloads=True)
    with page.expect_download() as saved:
        page.locator("a[download='scores.csv']").click()
    assert Path(saved.value.path()).read_bytes() == path.with_name("scores.csv").read_bytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(opened, scheme):
    """Contrast of body text and of quiet text against the ground: at least 4.5 to 1 (WCAG 2.1, 1.4.3)."""
    page = opened(color_scheme=scheme)
    colours = page.evaluate(
        "['body', '.about', '.i', 'figcaption', 'a', '.mark']"
        ".map(s => getComputedStyle(document.querySelector(s)).color)"
        ".concat(getComputedStyle(document.body).backgroundColor)"
    )
    *texts, ground = [luminance(c) for c in colours]
    for text, colour in zip(texts, colours, strict=False):
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5, colour


def luminance(colour: str) -> float:
    channels = [int(v) / 255 for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_policy_stops_what_the_page_does_not_bring(opened, browser, path, tmp_path):
    """The same page with a foreign script, style and picture added: none of them comes to life."""
    foreign = '<script>document.title = "changed"</script><b style="color: red" onclick="x">b</b><img src="http://127.0.0.1:9/x">'
    changed = tmp_path / "changed.html"
    changed.write_text(path.read_text().replace("<main>", "<main>" + foreign))
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked, refused = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: refused.append(m.text))
    page.goto(changed.as_uri())
    assert page.title() != "changed"
    assert page.evaluate("getComputedStyle(document.querySelector('main > b')).color") != "rgb(255, 0, 0)"
    assert len(refused) >= 3 and all("Content Security Policy" in m or "violates" in m for m in refused)
    context.close()
