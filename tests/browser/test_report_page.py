"""The page of `moe-dist report` in Chromium: what its script does, how it looks on wide and narrow screens, and that a
results file can't make it do anything."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.chromium import PROGRAM, Chromium
from reports import RECORDED, document, evil, many, rows_of, written

from moe_dist.report.page import page
from moe_dist.report.recorded import read_files

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here (Debian: apt-get install chromium)"),
]
SIZES = [(1600, 1200), (390, 844)]
# Of every chart: texts that leave it, and pairs of texts that lie on each other by more than a line's edge.
WRONG_TEXTS = """[...document.querySelectorAll("svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map((each) => [each.textContent, each.getBoundingClientRect()]);
  const outside = texts.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => `outside: ${text}`);
  const pairs = texts.flatMap(([text, one], place) => texts.slice(place + 1).filter(([, other]) =>
    one.left < other.right - 1 && other.left < one.right - 1 && one.top < other.bottom - 3
    && other.top < one.bottom - 3).map(([other]) => `${text} on ${other}`));
  return [...outside, ...pairs].map((wrong) => `${svg.getAttribute("aria-label")}: ${wrong}`);
})"""
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
SHOWN = '[...document.querySelectorAll("#all tbody tr:not([hidden])")]'


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def made(folder: Path, *paths: str) -> Path:
    target = folder / "report.html"
    target.write_text(page(read_files(paths)))
    return target


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("recorded"), *map(str, RECORDED))


def problems(chromium: Chromium) -> list[str]:
    """Errors of scripts, what the page's policy refused, and every address that was asked for but the page's own."""
    wrong = [str(said) for name, said in chromium.events if name in ("Runtime.exceptionThrown", "Log.entryAdded")]
    asked = [said["request"]["url"] for name, said in chromium.events if name == "Network.requestWillBeSent"]
    assert asked[0].startswith("file://")
    return [*wrong, *asked[1:], *(name for name, _ in chromium.events if name == "Page.javascriptDialogOpening")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_recorded_files_on_this_screen(chromium, recorded, size, dark):
    chromium.open(recorded, *size, dark=dark)
    chromium.run('document.querySelectorAll("details").forEach((each) => { each.open = true; })')
    assert problems(chromium) == []
    assert chromium.run("document.documentElement.scrollWidth") <= size[0]  # the page itself does not scroll sideways
    assert chromium.run(WRONG_TEXTS) == []
    smallest = chromium.run(
        '[...document.querySelectorAll("svg")].reduce((least, svg) => Math.min(least, 12 * svg.clientWidth /'
        " svg.viewBox.baseVal.width), 99)"
    )
    assert smallest >= 9.5  # pixels of a chart's text
    colors = chromium.run("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
    background, ink = (sum(map(int, re.findall(r"\d+", color))) for color in colors)
    assert (background < ink) == dark


def test_rows_are_sorted_with_what_was_not_recorded_last(chromium, recorded):
    chromium.open(recorded)
    column = chromium.run('[...document.querySelectorAll("#all th")].findIndex((each) => each.textContent === "± µs")')
    cells = f"{SHOWN}.map((row) => row.cells[{column}].textContent)"
    for direction in ("ascending", "descending"):
        chromium.run(f'document.querySelectorAll("#all th button")[{column}].click()')
        assert chromium.run(f'document.querySelectorAll("#all th")[{column}].getAttribute("aria-sort")') == direction
        found = chromium.run(cells)
        known = [float(cell.replace(",", "")) for cell in found if cell not in ("not recorded", "-")]
        assert known == sorted(known, reverse=direction == "descending")
        assert len(known) == 88  # rows of the two files that have scatter
        assert set(found[len(known) :]) <= {"not recorded", "-"}


def test_rows_are_filtered(chromium, recorded):
    chromium.open(recorded)
    total = chromium.run(f"{SHOWN}.length")
    choose = """((name, value) => {
      const labels = [...document.querySelectorAll("#filters label")];
      const select = labels.find((each) => each.firstChild.textContent === name).querySelector("select");
      select.value = value;
      select.dispatchEvent(new Event("change"));
    })"""
    chromium.run(f'{choose}("backend", "cutlass")')
    few = chromium.run(f"{SHOWN}.length")
    assert 0 < few < total
    chromium.run(f'{choose}("exchange", "nvlink")')
    assert chromium.run(f"{SHOWN}.length") == 8
    assert chromium.run('document.getElementById("count").textContent') == f"8 of {total} rows"
    chromium.run(
        'const box = document.querySelector("#filters input"); box.value = "TP4 nvlink"; box.dispatchEvent(new'
        ' Event("input"))'
    )
    assert chromium.run(f"{SHOWN}.length") == 4
    chromium.run('document.querySelector("#filters > button").click()')
    assert chromium.run(f"{SHOWN}.length") == total


def test_a_row_opens_all_of_its_keys(chromium, recorded):
    chromium.open(recorded)
    chromium.run(f"{SHOWN}[0].querySelector('button').focus()")
    chromium.press("Enter")
    text = chromium.run('document.getElementById("row").innerText')
    for said in ("Row 1", "round_p50_us", "unstaged_us", "not recorded", "tuned"):
        assert said in text
    chromium.press("Escape")
    assert chromium.run('document.getElementById("row").open') is False


def test_marks_speak_to_the_pointer_and_to_the_keys(chromium, recorded):
    chromium.open(recorded)
    tip = '(document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent)'
    assert chromium.run(tip) == ""
    chromium.run('document.querySelector("svg").focus()')
    chromium.run(SETTLED)  # the page has scrolled there, and scrolling hides what a mark says
    chromium.press("ArrowRight")
    first = chromium.run(tip)
    assert first == chromium.run('document.querySelector("svg .pt").dataset.tip') != ""
    chromium.press("ArrowRight")
    assert chromium.run(tip) not in ("", first)
    chromium.press("Escape")
    assert chromium.run(tip) == ""
    chromium.run('document.querySelector("svg .pt").scrollIntoView({block: "center"})')
    chromium.run(SETTLED)
    x, y = chromium.run(
        '(({x, y, width, height}) => [x + width / 2, y + height / 2])(document.querySelector("svg .pt")'
        ".getBoundingClientRect())"
    )
    chromium.move_to(x, y)
    assert chromium.run(tip) != ""


def test_it_is_read_without_its_script(chromium, recorded):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(recorded, 390, 844)
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    text = chromium.run("document.body.innerText")
    assert "EP4 nvlink cutlass is fastest: 6,897 µs" in text
    assert chromium.run('document.querySelector("svg .pt title").textContent') != ""
    assert chromium.run('document.getElementById("filters").hidden')


def test_text_of_a_file_does_nothing(chromium, tmp_path):
    for size in SIZES:
        chromium.open(made(tmp_path, evil(tmp_path)), *size)
        chromium.run('document.querySelectorAll("details").forEach((each) => { each.open = true; })')
        chromium.run(f"{SHOWN}[0].querySelector('button').click()")
        assert problems(chromium) == []
        assert chromium.run("document.documentElement.scrollWidth") <= size[0]
        assert "alert(1)" in chromium.run('document.getElementById("row").innerText')
        assert chromium.run('document.querySelectorAll("script").length') == 2


def test_what_got_into_the_page_all_the_same_would_not_run(chromium, tmp_path):
    path = made(tmp_path, written(tmp_path, "file.json", document(rows_of([100.0], [120.0]))))
    path.write_text(path.read_text().replace("<main>", "<main><script>document.title = 'ran'</script>"))
    chromium.open(path)
    assert chromium.run("document.title").startswith("moe-dist report")
    assert any("Content Security Policy" in problem for problem in problems(chromium))


def test_ten_thousand_rows(chromium, tmp_path):
    chromium.open(made(tmp_path, written(tmp_path, "many.json", many(10_000))))
    assert problems(chromium) == []
    ms = chromium.run(
        '(() => { const start = performance.now(); document.querySelectorAll("#all th button")[12].click();'
        " document.body.offsetHeight; return performance.now() - start; })()"
    )
    assert ms < 5_000  # of sorting
    assert chromium.run(f"{SHOWN}.length") == 1_000
    assert "10,000 rows, the first 1,000" in chromium.run('document.getElementById("count").textContent')
    chromium.run('document.querySelector("#count + button").click()')
    assert chromium.run(f"{SHOWN}.length") == 10_000


def test_on_paper_everything_is_there(chromium, recorded):
    chromium.open(recorded)
    closed = chromium.run('document.querySelectorAll("details:not([open])").length')
    assert closed > 0
    chromium.call("Emulation.setDeviceMetricsOverride", width=1050, height=740, deviceScaleFactor=1, mobile=False)
    chromium.call("Emulation.setEmulatedMedia", media="print")  # as wide as a landscape page of 28 cm
    assert chromium.run("document.documentElement.scrollWidth") <= 1050  # so that nothing is cut
    chromium.call("Emulation.setEmulatedMedia", media="")
    paper = base64.b64decode(chromium.call("Page.printToPDF", landscape=True)["data"])
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") > 10
    assert chromium.run('document.querySelectorAll("details:not([open])").length') == closed
