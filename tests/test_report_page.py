"""The report in a real browser: it loads alone, filters, hovers, compares; and nothing that a model wrote ever runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from otcrl.report.build import content
from otcrl.report.files import read_runs
from otcrl.report.page import page as page_of
from otcrl.rollout.transcripts import Transcript, Transcripts
from otcrl.types import Outcome, Problem, ToolCall
from tests.runs import World, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install 'otcrl[dev]'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
SECONDS = 2.0  # to open with 5,000 trajectories


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("OTCRL_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium, or name one in OTCRL_BROWSER")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # the tests may run as root
        yield found
        found.close()


class Opened:
    """A page, with whatever it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, address: str = "", **settings: Any) -> None:
        self.errors: list[str] = []
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.requests: list[str] = []
        self.page.goto(f"{file.as_uri()}{address}")

    def go(self, name: str) -> Any:
        self.page.click(f"nav a[href='#{name}']")
        return self.page.locator(f"section.{name}")


@pytest.fixture
def open_(browser: Any) -> Iterator[Any]:
    contexts = []

    def opened(file: Path, address: str = "", **settings: Any) -> Opened:
        one = Opened(browser, file, address, **settings)
        contexts.append(one.context)
        return one

    yield opened
    for context in contexts:
        context.close()


def written(folder: Path, *runs: Path, most: int = 5000) -> Path:
    file = folder / "report.html"
    file.write_text(page_of(content(read_runs(runs), most), "a report", "today"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return written(folder, write_run(folder / "first"), write_run(folder / "second", seed=1))


PAGES = ("summary", "training", "calls", "tools", "trajectories", "compare")


# -- alone, and without a complaint ----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_page_opens_alone_without_a_complaint_and_fits_the_screen(open_, report, scheme, width):
    opened = open_(report, viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    for name in PAGES:
        opened.go(name).locator("h2").wait_for()
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert opened.page.locator("section.training .u-wrap canvas").count() > 15
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_report_of_one_run_lacks_leaves_no_trace(open_, tmp_path, steps):
    opened = open_(written(tmp_path, write_run(tmp_path / "run", steps=steps, problems=2, group=2)))
    for name in PAGES:
        shown = opened.go(name).inner_text()
        assert not re.search(r"\b(null|undefined|NaN)\b", shown), f"{name}: {shown}"
    assert opened.errors == []


def test_a_run_with_one_data_set_has_nothing_to_choose_from(open_, tmp_path):
    run = write_run(tmp_path / "run", steps=2, problems=2, group=2)
    for file in run.glob("eval/*/report.json"):
        made = json.loads(file.read_text())
        made["sources"] = dict([*made["sources"].items()][:1])
        made["averages"] = {}
        file.write_text(json.dumps(made))
    opened = open_(written(tmp_path, run))
    assert "null" not in opened.go("summary").inner_text()


def test_over_wall_clock_the_last_step_keeps_its_place_beside_the_evaluation_after_it(open_, tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    for run in runs:
        rows = (run / "metrics.jsonl").read_text().splitlines()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": json.loads(rows[-1])["step"] + 1, "greedy/em": 0.5}) + "\n")
    opened = open_(written(tmp_path, *runs), "#training")
    chart = opened.page.locator(".chart", has_text="calls per trajectory")
    chart.locator(".u-wrap").wait_for()
    by_step = chart.inner_text()
    opened.page.get_by_label("Over", exact=True).select_option("minutes")
    chart.locator(".u-wrap").wait_for()
    assert chart.inner_text() == by_step


def test_a_question_that_was_asked_on_very_many_occasions_is_compared_at_once(open_, tmp_path):
    """Every pair of them would be millions."""
    opened = open_(written(tmp_path, write_run(tmp_path / "run", steps=12_000, problems=1, group=1), most=20_000))
    opened.go("compare").locator("h2").wait_for()
    assert opened.errors == []


def test_a_report_that_is_loaded_at_its_skip_link_shows_its_first_page(open_, report):
    assert open_(report, "#main").page.locator("section.summary h2").count()


def test_charts_are_drawn_anew_when_light_turns_to_dark(open_, report):
    opened = open_(report, "#training", color_scheme="light")
    drawn = "document.querySelector('.u-wrap canvas').toDataURL()"
    opened.page.wait_for_selector(".u-wrap canvas")
    before = opened.page.evaluate(drawn)
    opened.page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 10  # the policy forbids the page to wait for an expression: that is eval
    while opened.page.evaluate(drawn) == before:
        assert time.monotonic() < deadline


def test_text_has_enough_contrast_in_light_and_in_dark(open_, report):
    for scheme in ("light", "dark"):
        opened = open_(report, "#trajectories", color_scheme=scheme)
        opened.page.wait_for_selector(".segment.answer")
        for name, least in CONTRASTS.items():
            found = opened.page.evaluate(CONTRAST, name)
            assert found is not None, name
            assert found >= least, f"{name} in {scheme}: {found:.2f}"


CONTRASTS = {
    **dict.fromkeys(["body", ".count", "nav a", "nav a[aria-current]", ".field label", ".row .line", ".facts dt"], 4.5),
    **dict.fromkeys([".segment.call h4", ".segment.observation h4", ".segment.answer h4", ".mark.right", ".chip"], 4.5),
    **dict.fromkeys([".segment.reasoning h4", ".row[aria-selected=true] .line", ".row[aria-selected=true] .mark"], 4.5),
}
CONTRAST = """(selector) => {
  const element = document.querySelector(selector);
  if (!element) return null;
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  let behind = element;
  while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const colours = [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor];
  const [a, b] = colours.map((colour) => light(rgb(colour)));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


# -- figures ---------------------------------------------------------------------------------------


def test_the_summary_shows_every_evaluation_with_its_interval(open_, report):
    summary = open_(report).page.locator("section.summary")
    rows = summary.locator("table", has_text="95 % bootstrap").locator("tbody tr")
    assert rows.count() == 4
    assert rows.nth(0).locator(".limits").count() == 4
    assert "t0p-s3cret" not in summary.inner_text()
    assert "seed" in summary.locator("table", has_text="Settings that differ").inner_text()


def test_an_evaluation_is_seen_by_data_set_and_as_the_mean_of_several(open_, tmp_path):
    run = write_run(tmp_path / "run", steps=1, problems=2, group=1)
    file = run / "eval" / "after" / "report.json"
    made = json.loads(file.read_text())
    figure = {"value": 0.25, "low": 0.125, "high": 0.5}
    made["averages"] = {"in-domain": {"sets": 2, **dict.fromkeys(("em", "f1", "tc", "tp"), figure)}}
    file.write_text(json.dumps(made))
    opened = open_(written(tmp_path, run))
    chooser, table = opened.page.get_by_label("Data set"), opened.page.locator("table", has_text="95 % bootstrap")
    chooser.select_option("two_hop")
    assert table.locator("tbody tr").count() == 2
    chooser.select_option("in-domain")
    assert table.locator("tbody tr").count() == 1
    assert "2 sets" in table.inner_text()
    assert "0.125 to 0.500" in table.inner_text()
    assert opened.errors == []


def test_curves_can_be_had_over_wall_clock_and_read_with_the_keyboard(open_, report):
    opened = open_(report, "#training")
    plot = opened.page.locator(".chart", has_text="calls per trajectory").locator(".plot")
    assert "TC by step. first from" in plot.get_attribute("aria-label")
    opened.page.get_by_label("Over", exact=True).select_option("minutes")
    assert "TC by minutes." in plot.get_attribute("aria-label")
    plot.focus()
    plot.press("ArrowLeft")
    assert opened.page.locator("#said").inner_text().startswith("minute ")
    assert opened.errors == []


def test_a_chart_leads_to_the_trajectories_of_its_step(open_, report):
    opened = open_(report, "#training")
    plot = opened.page.locator(".chart", has_text="calls per trajectory").locator(".plot")
    plot.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):
        plot.press(key)
    opened.page.wait_for_selector("section.trajectories .row")
    assert "from=9&to=9" in opened.page.url
    assert set(opened.page.locator(".row .when").all_inner_texts()) == {"step 9"}


# -- trajectories ----------------------------------------------------------------------------------


def test_filters_leave_what_fits_and_stand_in_the_address(open_, report):
    opened = open_(report, "#trajectories")
    page = opened.page
    everything = 2 * (4 * 4 * 4 + 24)
    count = page.locator(".count")
    assert count.inner_text().startswith(f"{everything} of {everything}")
    page.get_by_label("Outcome").select_option("wrong")
    assert set(page.locator(".row .mark").all_inner_texts()) == {"✗ wrong"}
    page.get_by_label("Calls from").fill("1")
    page.get_by_label("Step to").fill("3")
    page.get_by_label("Run").select_option("1")
    left = count.inner_text()
    assert 0 < int(left.split()[0]) < everything
    again = open_(report, page.evaluate("location.hash"))
    assert again.page.locator(".count").inner_text() == left
    page.get_by_label("Search").fill("no such question")
    assert count.inner_text().startswith("0 of")
    assert page.locator("section.trajectories").get_by_text("No trajectory fits.").is_visible()
    assert opened.errors == []


def test_questions_are_found_by_their_words_and_by_their_id(open_, report):
    page = open_(report, "#trajectories").page
    page.get_by_label("Search").fill("world/train/13")
    assert page.locator(".count").inner_text().startswith("8 of")
    asked = page.locator(".pane .question").inner_text()
    page.get_by_label("Search").fill(asked.upper())
    assert page.locator(".pane .question").inner_text() == asked


def test_the_list_is_walked_with_the_keyboard(open_, report):
    page = open_(report, "#trajectories").page
    listed = page.get_by_role("listbox", name="Trajectories")
    listed.focus()
    for key, place in (("ArrowDown", 2), ("End", 176), ("ArrowUp", 175), ("Home", 1)):
        listed.press(key)
        selected = page.locator(".row[aria-selected=true]")
        assert selected.get_attribute("aria-posinset") == str(place)
        assert selected.get_attribute("id") == listed.get_attribute("aria-activedescendant")


def test_a_token_says_its_mask_log_prob_advantage_ratio_and_weights_on_hover(open_, report):
    page = open_(report, "#trajectories?callsmin=1&split=training").page
    page.hover(".segment.call .t >> nth=1")
    told = page.locator("#tip").inner_text()
    for word in ("mask", "1, sampled", "log-prob", "advantage", "ratio", "version 3"):
        assert word in told
    page.hover(".segment.observation .t >> nth=1")
    assert "0, injected" in page.locator("#tip").inner_text()
    page.locator(".tokens").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#said").inner_text().startswith("token")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_numbers_on_hover_are_those_of_the_transcript(open_, tmp_path):
    run = write_run(tmp_path / "run", steps=1, problems=1, group=1)
    row = json.loads((run / "transcripts.jsonl").read_text())
    page = open_(written(tmp_path, run), "#trajectories?split=training").page
    places = [
        k for k, name in enumerate(page.locator(".segment .t").evaluate_all("all => all.map(t => t.dataset.k)")) if name
    ]
    assert len(places) == row["tokens"]["sampled"]
    for k in (0, len(places) // 2, len(places) - 1):
        page.hover(f".segment .t >> nth={places[k]}")
        told = page.locator("#tip").inner_text()
        assert f"{row['tokens']['logprobs'][k]:.4f}" in told
        assert f"{row['tokens']['ratios'][k]:.4f}" in told


def test_kinds_of_text_are_told_apart_by_words_and_lines_as_well_as_colours(open_, report):
    page = open_(report, "#trajectories?callsmin=1&split=training").page
    page.wait_for_selector(".segment.answer")
    kinds = ("reasoning", "call", "observation", "answer")
    titles = [page.locator(f".segment.{kind} h4").first.inner_text() for kind in kinds]
    assert [title.split()[0] for title in titles] == list(kinds)
    border = "e => getComputedStyle(e).borderLeftStyle + getComputedStyle(e).borderLeftWidth"
    assert len({page.locator(f".segment.{kind}").first.evaluate(border) for kind in kinds}) == len(kinds)


def test_tokens_can_be_tinted_by_what_is_known_of_them(open_, report):
    page = open_(report, "#trajectories?split=training").page
    page.wait_for_selector(".t")
    assert page.locator(".t[data-heat]:not([data-heat=''])").count() == 0
    page.get_by_label("Tint tokens by").select_option("advantages")
    assert page.locator(".t[data-heat]:not([data-heat=''])").count() > 0


def test_a_trajectory_stands_beside_its_cheapest_right_sibling(open_, report):
    page = open_(report, "#trajectories?split=training&sort=calls&outcome=right").page
    page.get_by_role("button", name="Beside the cheapest right sibling").click()
    panes = page.locator(".panes.two .pane")
    panes.nth(1).wait_for()
    chips = page.locator(".chip").all_inner_texts()
    fewest = min(int(text.split()[1]) for text in chips if text.startswith("✓"))
    assert panes.nth(1).locator(".facts div", has_text="calls").locator("dd").first.inner_text() == str(fewest)
    questions = {panes.nth(k).locator(".question").inner_text() for k in (0, 1)}
    assert len(questions) == 1


def test_a_question_is_compared_before_and_after(open_, report):
    opened = open_(report, "#compare")
    panes = opened.page.locator(".pane")
    panes.nth(1).wait_for()
    assert panes.nth(0).locator(".beside").inner_text() == "first: evaluation before"
    assert panes.nth(1).locator(".beside").inner_text() == "first: evaluation after"
    assert panes.nth(0).locator(".question").inner_text() == panes.nth(1).locator(".question").inner_text()
    opened.page.get_by_label("Right", exact=True).select_option(label="second: evaluation after")
    opened.page.get_by_text("These two share no question.").or_(panes.nth(1)).first.wait_for()
    assert opened.errors == []


# -- hostile text ----------------------------------------------------------------------------------

ATTACK = "window.broken = true"
HOSTILE = [
    f"</script><script>{ATTACK}</script>",
    f"<!--<script>{ATTACK}</script>-->",
    f'<img src=x onerror="{ATTACK}">',
    f'"><svg/onload={ATTACK}>',
    "<iframe srcdoc='<script>parent.broken=true</script>'></iframe>",
    f"javascript:{ATTACK}",
    "</style><style>*{display:none}</style><link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    f"${{{ATTACK}}} {{{{constructor.constructor('{ATTACK}')()}}}}",
    "]]><![CDATA[ &lt;script&gt; &#60;script&#62;",
    "\u202egnirts esrever\u202c \u2066isolate \u200b\ufeff\u2028\u2029 \x00\x07\x1b[31m",
    "half a pair \ud800 and \udfff",
    "a" * 5000,
]


def hostile_run(folder: Path) -> Path:
    world, draw = World(), random.Random(0)
    write_run(folder, steps=3, problems=1, group=1, world=world)
    for each in HOSTILE[:3]:  # in names and settings too
        (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text() + f"evil{len(each)}: {json.dumps(each)}\n"
        )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "time/step_s": 1.0, f"reward/{HOSTILE[0]}": 1.0, HOSTILE[2]: 2.0}) + "\n")
    lines = []
    for number, each in enumerate(HOSTILE):
        problem = Problem(f"world/train/{each}", f"{each}?", (each,), each, 0)
        call = ToolCall(each, each, each, Outcome.MODEL_ERROR, 0.1)
        parts = [
            ("Q", False),
            (f" {each} <search> {each} </search>", True),
            (f" <observation>{each}</observation>", False),
        ]
        t = world.trajectory(problem, [*parts, (f" {each} <answer> {each} </answer>", True)], [call], draw)
        lines.append(Transcript(trajectory=t, group=1000 + number, correct=1.0))
    Transcripts(path=folder / "transcripts.jsonl", tokenizer=world.tokenizer).write(3, lines)
    return folder


HOVER_ALL = "all => all.forEach((token) => token.dispatchEvent(new MouseEvent('mouseover', { bubbles: true })))"


def test_nothing_that_a_model_or_a_tool_wrote_ever_runs(open_, tmp_path):
    name = "a<img src=x onerror=window.broken=1>b"
    opened = open_(written(tmp_path, hostile_run(tmp_path / name)))
    page = opened.page
    for each in PAGES:
        opened.go(each).locator("h2").wait_for()
    listed = page.get_by_role("listbox", name="Trajectories")
    opened.go("trajectories")
    listed.focus()
    seen = set()
    for _ in range(len(HOSTILE) + 30):
        page.wait_for_selector("section.trajectories .side:not([aria-busy])")
        seen.add(page.locator("section.trajectories .pane .question").evaluate("e => e.textContent"))
        page.locator("section.trajectories .t").evaluate_all(HOVER_ALL)
        listed.press("ArrowDown")
    assert {f"{each}?" for each in HOSTILE if "\ud800" not in each} <= seen
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main iframe, main script, main link, main style, main svg").count() == 0
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


def test_were_a_text_ever_made_markup_the_policy_would_stop_it(open_, report):
    opened = open_(report)
    refused = opened.page.evaluate("""() => {
      const attack = "<img src=x onerror='window.broken = true'>";
      try { document.body.innerHTML = attack; } catch (error) { return error.name; }
    }""")
    assert refused == "TypeError"
    opened.page.evaluate("""() => {
      const script = document.createElement("script");
      try { script.textContent = "window.broken = true"; document.body.append(script); } catch {}
      fetch("http://127.0.0.1:9/").catch(() => {});
    }""")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.broken") is None


# -- many ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 trajectories of about 200 tokens: ten steps of 31 groups of 16, alike but for their names."""
    folder = tmp_path_factory.mktemp("large")
    run = write_run(folder / "run", steps=1, problems=31, group=16, world=World(words=100))
    rows = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    with (run / "transcripts.jsonl").open("w") as file:
        for step in range(10):
            for row in rows:
                again = {"step": step, "group": row["group"] + 31 * step, "id": f"{row['id']}/{step}"}
                file.write(json.dumps(row | again) + "\n")
    return written(folder, run)


@pytest.mark.slow
def test_five_thousand_trajectories_open_in_under_two_seconds_and_stay_fast(open_, large):
    def seconds() -> float:
        begun = time.monotonic()
        open_(large, "#trajectories?at=4900").page.wait_for_selector(".segment.answer")
        return time.monotonic() - begun

    assert min(seconds() for _ in range(3)) < SECONDS  # three: the machine may be busy with other tests
    opened = open_(large, "#trajectories?at=4900")
    page = opened.page
    total = int(page.locator(".count").inner_text().split()[0].replace(",", ""))
    assert 4900 < total <= 5000
    assert page.locator(".row").count() < 40, "only what can be seen is on the page"
    spent = page.evaluate(SEARCH, "world/train/1")
    assert 0 < int(page.locator(".count").inner_text().split()[0].replace(",", "")) < total
    assert spent < 200
    assert opened.errors == []


SEARCH = """(text) => {
  const box = document.querySelector("input[type=search]");
  const begun = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input"));
  return performance.now() - begun;  // milliseconds
}"""
