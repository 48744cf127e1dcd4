"""The page in a real browser: sorts, filters, unfolds, copies; asks nobody, complains never."""

from __future__ import annotations

import os
import shutil

import pytest

from lm_calib_plugin.drawing import rendered
from lm_calib_plugin.leaderboard.report import page, plots
from tests.leaderboard import synthetic

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
HEADLINE = "t3"  # the average is the fourth column of the synthetic leaderboard


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    from playwright.sync_api import sync_playwright

    assert found is not None, f"CI needs one of {', '.join(NAMES)}"
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    small = synthetic.small(rankings=(), heats=())
    drawn = plots.draw(small) if rendered.available() else []
    (folder / "index.html").write_text(page.render(synthetic.analysis(), drawn), encoding="utf-8")
    unranked = page.render(synthetic.small(no_ranking=("draws differ",)))
    (folder / "unranked.html").write_text(unranked, encoding="utf-8")
    return (folder / "index.html").as_uri()


@pytest.fixture
def visit(browser, address):
    """Open pages; at the end no request but that for the file was made, nothing was complained."""
    contexts, complaints, requests = [], [], []

    def watch(route):
        if not route.request.url.startswith(address.rsplit("/", 1)[0]):
            requests.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    def opened(hash="", width=1280, name="index.html", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.route("**/*", watch)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.goto(address.replace("index.html", name) + hash, wait_until="domcontentloaded")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert (complaints, requests) == ([], [])


def column(tab, key, body=0):
    """Return what a column of one table shows: values as sorted by, None for missing ones."""
    return tab.evaluate(
        """([key, body]) => [...document.querySelector('#entries').tBodies[body].rows]
          .filter((row) => row.classList.contains('row') && !row.hidden)
          .map((row) => row.querySelector(`[data-c="${key}"]`).dataset.v ?? null)""",
        [key, body],
    )


def shown(tab, table="entries"):
    return tab.locator(f"#{table} tr.row:visible").count()


def hash_of(tab):
    return tab.evaluate("location.hash")


def test_sorting_by_click_is_by_number_within_tables_and_dense_stays_first(visit):
    tab = visit()
    before = column(tab, "name")
    head = tab.locator(f'#entries th[data-c="{HEADLINE}"]')
    for order in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert f"{order}" in hash_of(tab)
        for body in range(4):
            dense, *values = map(float, column(tab, HEADLINE, body))
            assert dense == synthetic.DENSE_SCORES["average"]
            assert values == sorted(values, reverse=order == "descending")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert column(tab, "name") == before


def test_sorting_by_keyboard_keeps_order_of_equals_and_puts_missing_last(visit):
    tab = visit("#columns=tokens")
    before = column(tab, "name")
    tab.locator('#entries th[data-c="tokens"] button').focus()
    for _ in range(2):
        tab.keyboard.press("Enter")
        values = column(tab, "tokens")[1:]
        assert values[-1] is None
        assert None not in values[:-1]
        assert column(tab, "name") == before


def test_a_wordless_number_is_not_sorted_as_text(visit):
    tab = visit()
    tab.locator('#entries th[data-c="t2"] button').click()
    values = [float(value) for value in column(tab, "t2", 1)[1:]]
    assert max(values) > 100 > min(values)
    assert values == sorted(values)


def test_filters_narrow_rows_and_stand_in_the_address(visit):
    tab = visit()
    everything = shown(tab)
    tab.select_option('select[name="model"]', synthetic.MODELS[0])
    tab.select_option('select[name="level"]', "60%")
    assert shown(tab) == 10
    tab.check('input[name="hide"]')
    assert shown(tab) == 7
    tab.fill('input[name="q"]', "wanda c4")
    assert shown(tab) == 2
    assert tab.locator("#filters .count").inner_text() == f"2 of {everything} rows"
    again = visit(hash_of(tab))
    assert shown(again) == 2
    assert again.input_value('input[name="q"]') == "wanda c4"
    assert again.is_checked('input[name="hide"]')
    again.fill('input[name="q"]', "nobody")
    assert again.locator("#nothing").is_visible()
    again.click("#clear")
    assert shown(again) == everything
    assert hash_of(again) == ""


def test_sort_columns_and_comparisons_come_back_from_the_address(visit):
    tab = visit(f"#sort={HEADLINE}.ascending&columns=bits.draws&task=all&resolved=1&against=method")
    values = list(map(float, column(tab, HEADLINE)[1:]))
    assert values == sorted(values)
    assert tab.locator('#entries th[data-c="bits"]').is_visible()
    assert not tab.locator('#entries th[data-c="draws"]').is_visible()
    kinds = set(tab.locator("#pairs tr.row:visible .verdict").all_inner_texts())
    assert kinds
    assert kinds <= {"resolved better", "resolved worse"}
    before = shown(tab, "pairs")
    tab.uncheck('input[name="resolved"]')
    assert shown(tab, "pairs") > before


def test_a_hash_that_nobody_wrote_does_no_harm(visit):
    tab = visit("#tables")
    everything = shown(tab)
    for hash in ("#sort=x.y&model=nobody", "#columns=%00..&sort=__proto__.descending", "#%"):
        tab.evaluate("hash => { location.hash = hash; }", hash)
        assert shown(tab) == everything
    tab.evaluate("location.hash = '#q=%3Cscript%3E'")
    tab.wait_for_function("document.querySelector('input[name=q]').value === '<script>'")
    assert shown(tab) == 1


def test_rows_unfold_and_commands_are_copied(visit, address):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    assert tab.locator("tr.more:visible").count() == 0
    toggle = tab.locator("#entries .toggle").nth(1)
    toggle.focus()
    tab.keyboard.press("Enter")
    assert toggle.get_attribute("aria-expanded") == "true"
    more = tab.locator("tr.more:visible")
    assert more.count() == 1
    more.locator(".copy").click()
    more.locator(".copy", has_text="Copied").wait_for()
    command = more.locator("pre").inner_text()
    assert "lm_eval --model calib_pruned" in command
    assert tab.evaluate("navigator.clipboard.readText()") == command
    toggle.click()
    assert tab.locator("tr.more:visible").count() == 0


def test_copying_falls_back_where_the_clipboard_is_closed(visit):
    tab = visit()
    tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    tab.locator("#entries .toggle").nth(1).click()
    button = tab.locator("tr.more:visible .copy")
    button.click()
    tab.wait_for_function(
        "['Copied', 'Selected'].includes("
        "document.querySelector('tr.more:not([hidden]) .copy').textContent)"
    )


def test_keys_reach_filter_and_tables(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.locator(".skip").bounding_box()["x"] >= 0
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "tables"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.name") == "q"
    tab.keyboard.type("wanda/")
    assert tab.input_value('input[name="q"]') == "wanda/"
    tab.keyboard.press("Escape")
    assert tab.input_value('input[name="q"]') == ""


def lightness(tab):
    color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in color[4:-1].split(",")[:3]) / 3


def test_dark_by_system_and_by_hand(visit):
    dark, light = visit(color_scheme="dark"), visit(color_scheme="light")
    assert lightness(dark) < 60 < 200 < lightness(light)
    dark.click("#theme")
    assert lightness(dark) > 200
    light.click("#theme")
    assert lightness(light) < 60
    light.reload()
    assert lightness(light) < 60


def test_plots_take_the_colors_of_the_page(visit):
    pytest.importorskip("matplotlib")
    ink = {}
    for scheme in ("light", "dark"):
        tab = visit(color_scheme=scheme)
        ink[scheme] = tab.evaluate("getComputedStyle(document.querySelector('.pf-ink')).fill")
        page_ink = tab.evaluate("getComputedStyle(document.body).color")
        assert ink[scheme] == page_ink
    assert ink["light"] != ink["dark"]


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_page_is_wider_than_its_screen(visit, width):
    tab = visit(width=width)
    tab.locator("#entries .toggle").nth(1).click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#entries tr.row").first.is_visible()


def test_a_phone_sorts_by_menu(visit):
    tab = visit(width=360)
    tab.select_option('select[name="sort"]', "t2")
    values = [float(value) for value in column(tab, "t2")[1:]]
    assert values == sorted(values)
    assert "sort=t2" in hash_of(tab)


def test_without_scripts_everything_can_be_read(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator("#filters").is_hidden()
    assert tab.locator("#entries tr.row").count() == tab.locator("#entries tr.row:visible").count()
    summary = tab.locator("tr.more summary").first
    summary.click()
    assert tab.locator("tr.more pre").first.is_visible()


def test_what_is_not_ranked_filters_but_does_not_sort(visit):
    tab = visit("#sort=worst.ascending", name="unranked.html")
    assert tab.locator("#entries thead button").count() == 0
    assert tab.locator(".banner").is_visible()
    expected = [row.id for row in synthetic.small().entries][1:3]
    assert column(tab, "name")[1] == " ".join(expected[0].split("/")[-2:])
    tab.fill('input[name="q"]', "magnitude")
    assert shown(tab) == 1


def test_paper_shows_no_controls(visit):
    tab = visit()
    tab.emulate_media(media="print")
    assert tab.locator("#filters").is_hidden()
    assert tab.locator("#entries").is_visible()
