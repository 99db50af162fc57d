"""The page of a comparison in a real browser: opened from the disk, without a network."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.figures import Options
from cutlayer.plotting.report import write_report
from cutlayer.plotting.tables import table_rows
from tests.plotting.making import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>\'%{y}' + "long" * 30
MILLISECONDS = 30_000

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        # Where it ought to be there, a page that nobody looked at is a failure.
        miss = pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip
        miss("the report is not tested without a browser: apt-get install chromium, or another package with Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"], timeout=MILLISECONDS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedAvg twice, FSL-SAGE with fewer bytes, CSE-FSL that learns little, and a centralized run."""
    folder = tmp_path_factory.mktemp("saves")
    runs = [make_run(folder / f"f{seed}", "fed_avg", seed=seed, accuracy=(0.5, 0.7 + 0.1 * seed)) for seed in (0, 1)]
    runs.append(make_run(folder / "s", "fsl_sage", accuracy=(0.4, 0.9123), load=(600_000, 1_234_567)))
    runs.append(make_run(folder / "l", "cse_fsl", accuracy=(0.1, 0.2)))
    runs.append(make_run(folder / "c", "centralized", accuracy=(0.8, 0.95), load=0, results={"traffic": {}}))
    return write(folder / "report.html", runs)


def write(path: Path, runs: list[Any], title: str = "A comparison") -> Path:
    curves, options = make_curves(runs), Options(title, target=0.72)
    return write_report(path, curves, options, table_rows(curves, options), [f"left out: {title}"])


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a file in a browser without a network; at the end no error and no request but for the file was made."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_file(path: Path, drawn: bool = True, script: str = "", **options: Any) -> Page:
        context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(MILLISECONDS)
        context.on("request", lambda request: request.url == path.as_uri() or wrong.append(request.url))
        context.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.goto(path.as_uri())
        if drawn:
            page.wait_for_selector("body.drawn")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []


def lines(page: Page, chart: str = "curves") -> list[str]:
    """The names of the curves that are to be seen, each a line and its markers; levels are dashed thinner."""
    drawn = page.locator(f"#{chart} .scatterlayer path.js-line").evaluate_all(
        "lines => lines.filter(line => getComputedStyle(line).strokeWidth == '2px').length"
    )
    names = page.evaluate(
        "chart => document.querySelector(`#${chart} .plot`).data"
        ".filter(trace => trace.visible && trace.mode == 'lines+markers' && trace.line.width != 1.6)"
        ".map(trace => trace.name)",
        chart,
    )
    assert drawn == len(names)
    return names


def title_of(page: Page, axis: str, chart: str = "curves") -> str:
    return page.locator(f"#{chart} .{axis}title").text_content() or ""


def choose(page: Page, label: str) -> None:
    """Press one of the main chart's controls."""
    page.locator("#curves .controls").get_by_label(label).check()


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"tbody tr > :nth-child({number})").all_text_contents()


def middle(place: Locator) -> tuple[float, float]:
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def edge(place: Locator) -> tuple[float, float]:
    box = place.bounding_box()
    assert box
    return box["x"] + 1, box["y"] + box["height"] / 2


def test_it_opens_from_the_disk_and_draws_every_method(report: Path, open_page: Open) -> None:
    page = open_page(report)
    assert page.title() == "A comparison"
    # The centralized run has no place on this axis: it is a level.
    assert lines(page) == ["CSE-FSL", "FedAvg", "FSL-SAGE"]
    choose(page, "rounds")
    assert lines(page) == ["Centralized", "CSE-FSL", "FedAvg", "FSL-SAGE"]
    choose(page, "communication")
    assert title_of(page, "x") == "communication"
    assert title_of(page, "y") == "test accuracy"
    # What sends nothing has no bar.
    assert page.locator("#traffic .barlayer .point").count() == 3
    assert page.locator("#failure").is_hidden()
    # Nothing that would send a chart away.
    buttons = page.locator("#curves .modebar-btn").evaluate_all("all => all.map(button => button.dataset.title)")
    assert sorted(buttons) == ["Download plot", "Pan", "Reset axes", "Zoom", "Zoom in", "Zoom out"]


def test_the_legend_hides_and_shows(report: Path, open_page: Open) -> None:
    page = open_page(report)
    button = page.locator("#curves .legend button", has_text="FedAvg")
    button.click()
    assert lines(page) == ["CSE-FSL", "FSL-SAGE"]
    assert button.get_attribute("aria-pressed") == "false"
    # The band and the mark of the method go with it: two lines are left, a mark, and the level.
    assert page.locator("#curves .scatterlayer .trace").count() == 4
    button.press("Space")
    assert lines(page) == ["CSE-FSL", "FedAvg", "FSL-SAGE"]
    page.locator("#curves .legend button", has_text="target").click()
    assert page.locator("#curves .shapelayer path").count() == 0


def test_the_axis_is_chosen(report: Path, open_page: Open) -> None:
    page = open_page(report)
    choose(page, "rounds")
    assert title_of(page, "x") == "rounds"
    assert lines(page) == ["Centralized", "CSE-FSL", "FedAvg", "FSL-SAGE"]
    x = "document.querySelector('#curves .plot').data.find(trace => trace.mode == 'lines+markers').x"
    assert page.evaluate(x) == [1, 2]
    choose(page, "simulated time")
    assert title_of(page, "x").startswith("simulated time (s)")
    choose(page, "communication")
    choose(page, "logarithmic axis")
    ticks = page.locator("#curves .xtick").all_text_contents()
    assert {"1MB", "2MB"} <= set(ticks), "each with its unit"


def test_a_pointer_on_a_value_tells_it_exactly(report: Path, open_page: Open) -> None:
    page = open_page(report)
    found = ""
    for point in page.locator("#curves .scatterlayer .point").all():
        page.mouse.move(0, 0)
        # Of two marks at one place the larger one is met at its edge.
        for x, y in (middle(point), edge(point)):
            page.mouse.move(0, 0)
            page.mouse.move(x, y)
            page.wait_for_selector("#curves .hoverlayer .hovertext")
            found += "".join(page.locator("#curves .hoverlayer .hovertext").all_text_contents()) + "\n"
    assert "FSL-SAGE91.23%round 21.2346MB (1,234,567 bytes)\n" in found
    assert "FedAvg75% ± 5%, 2 seedsround 22MB (2,000,000 bytes)\n" in found
    assert "FedAvgtarget 72% first reached by 1 of 2 seedsround 22MB (2,000,000 bytes)\n" in found


def test_the_table_is_sorted_by_each_column(report: Path, open_page: Open) -> None:
    page = open_page(report)
    final = page.get_by_role("button", name=re.compile("^final"))
    final.click()
    assert column(page, 4) == ["20.00", "75.00 ± 5.00", "91.23", "95.00"]
    assert column(page, 1) == ["CSE-FSL", "FedAvg", "FSL-SAGE", "Centralized"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    final.click()
    assert column(page, 4) == ["95.00", "91.23", "75.00 ± 5.00", "20.00"]
    page.get_by_role("button", name="method").click()
    assert column(page, 1) == ["Centralized", "CSE-FSL", "FedAvg", "FSL-SAGE"]
    # By bytes to the target; a method that never reaches it is last either way.
    to_target = page.get_by_role("button", name=re.compile("^bytes to"))
    to_target.click()
    assert column(page, 1) == ["Centralized", "FSL-SAGE", "FedAvg", "CSE-FSL"]
    to_target.click()
    assert column(page, 1) == ["FedAvg", "FSL-SAGE", "Centralized", "CSE-FSL"]


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, open_page: Open) -> None:
    runs = [make_run(tmp_path / f"<b>{lr}", HOSTILE, lr=lr, seed=HOSTILE) for lr in ("1", HOSTILE)]
    page = open_page(write(tmp_path / "report.html", runs, title=HOSTILE), viewport={"width": 400, "height": 800})
    assert page.title() == HOSTILE
    assert page.locator("img, b, body > b").count() == 0
    assert page.locator(".legend button").first.text_content().strip().startswith(HOSTILE[:100])  # type: ignore[union-attr]
    page.mouse.move(*middle(page.locator("#curves .point").first))
    page.wait_for_selector(".hovertext")
    assert "<img src=x" in page.locator(".hovertext").first.text_content()  # type: ignore[operator]
    page.locator("summary").first.click()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_no_page_is_wider_than_its_window(report: Path, open_page: Open, width: int) -> None:
    page = open_page(report, viewport={"width": width, "height": 800})
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plot = page.locator("#curves .main-svg").first.bounding_box()
    assert plot
    assert 0 <= plot["x"] < plot["x"] + plot["width"] <= width


def test_a_chart_follows_the_width_of_the_window(report: Path, open_page: Open) -> None:
    page = open_page(report)
    svg = page.locator("#curves .main-svg").first
    height = svg.get_attribute("height")
    page.set_viewport_size({"width": 500, "height": 800})
    expect(svg).to_have_attribute("width", "468")
    assert svg.get_attribute("height") == height
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(svg).to_have_attribute("width", "1216")


def test_what_was_zoomed_to_stays_until_the_axis_changes(report: Path, open_page: Open) -> None:
    page = open_page(report)
    span = "document.querySelector('#curves .plot').layout.xaxis.range"
    before = page.evaluate(span)
    x, y = middle(page.locator("#curves .nsewdrag").first)
    page.mouse.move(x - 200, y - 50)
    page.mouse.down()
    page.mouse.move(x + 200, y + 50, steps=4)
    page.mouse.up()
    page.wait_for_function(f"{span}[0] > {before[0]}")
    zoomed = page.evaluate(span)
    page.locator("#curves .legend button", has_text="FedAvg").click()
    assert page.evaluate(span) == zoomed
    choose(page, "rounds")
    choose(page, "communication")
    assert page.evaluate(span) != zoomed


def test_dark_and_printed_pages_have_colours_that_are_seen(report: Path, open_page: Open) -> None:
    white, black = "rgb(232, 232, 232)", "rgb(0, 0, 0)"
    page = open_page(report, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    centralized = page.locator("#curves path.js-line").last
    stroke = "line => getComputedStyle(line).stroke"
    width = "document.querySelector('#curves .main-svg').width.baseVal.value"
    assert centralized.evaluate(stroke) == white
    wide = page.evaluate(width)
    # A browser prints as soon as this event was told.
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert (centralized.evaluate(stroke), page.evaluate(width)) == (black, 660)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert (centralized.evaluate(stroke), page.evaluate(width)) == (white, wide)
    page.emulate_media(color_scheme="light")
    expect(centralized).to_have_css("stroke", black)
    assert page.pdf().startswith(b"%PDF")


def test_without_scripts_the_table_is_there(report: Path, open_page: Open) -> None:
    page = open_page(report, drawn=False, java_script_enabled=False)
    assert page.locator("noscript, [role=alert]").first.text_content()
    assert page.locator("tbody tr").count() == 4


def test_a_browser_that_cannot_draw_says_so(report: Path, browser: Browser) -> None:
    context = browser.new_context(offline=True)
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("#failure", state="visible", timeout=MILLISECONDS)
    context.close()


def test_fine_tuning_is_drawn_and_its_tables_are_sorted(tmp_path: Path, open_page: Open) -> None:
    values = {"fed_avg": (0.5, 0.625), "fed_babu": (0.25, 0.75)}
    runs = [
        make_run(tmp_path / method, method, personalized={("full", 0.1): {0: [before] * 4, 5: [after] * 4}})
        for method, (before, after) in values.items()
    ]
    page = open_page(write(tmp_path / "report.html", runs))
    assert lines(page, "fine_tuning") == ["FedAvg", "FedBABU"]
    page.locator("#fine_tuning .legend button", has_text="FedAvg").click()
    assert lines(page, "fine_tuning") == ["FedBABU"]
    page.mouse.move(*middle(page.locator("#fine_tuning .scatterlayer .points path").last))
    reported = page.locator("#fine_tuning .hoverlayer .hovertext").text_content() or ""
    for text in ("FedBABU", "mean 75% ± 0% over clients", "worst tenth 75%", "epochs of fine-tuning: 5", "seeds: 1"):
        assert text in reported
    table = page.locator("section:has(#table_fine_tuning-heading)")
    for order in (["FedAvg", "FedBABU"], ["FedBABU", "FedAvg"]):
        table.locator("th button", has_text="5 epochs").click()
        assert table.locator("tbody th").all_text_contents() == order
    # The other tables stay as they were.
    found = page.locator("section:has(#table-heading) tbody th").all_text_contents()
    assert found == ["FedAvg", "FedBABU (start of own models)"]


def test_no_other_script_runs_and_nothing_is_asked_for(report: Path, browser: Browser) -> None:
    context = browser.new_context(offline=True)
    page = context.new_page()
    refused: list[str] = []
    page.expose_function("refuse", lambda rule: refused.append(rule))
    page.add_init_script("addEventListener('securitypolicyviolation', event => refuse(event.effectiveDirective))")
    page.goto(report.as_uri())
    page.wait_for_selector("body.drawn", timeout=MILLISECONDS)
    assert refused == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))")
    page.evaluate("fetch('other.json').catch(() => 0)")
    page.evaluate("Object.assign(new Image(), {src: 'other.png'})")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert sorted(refused) == ["connect-src", "img-src", "script-src-elem"]
    context.close()
