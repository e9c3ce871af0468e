"""The report's page: what it says, what it escapes, and how it looks in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest

import runs
from penstock.io.timeline import Span
from penstock.offload.reports import page as page_module
from penstock.offload.reports.page import picture_data, render
from penstock.offload.reports.recorded import Recorded

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is found"
)
SIZES = {"phone": (360, 740), "desk": (1280, 800)}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def text_of(page: str) -> str:
    body = page.partition("</head>")[2]
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", body, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def test_the_three_questions_come_first_and_are_answered_with_numbers() -> None:
    text = text_of(render(runs.report(), runs.recorded()))
    places = [
        text.index(part)
        for part in (
            "How fast?",
            "569 tokens a second",
            "What bound it?",
            "The disk",
            "Computing waited 33% of the time for weights from disk.",
            "What to change?",
            "tokens_in_flight: 3328",
            "Timeline",
        )
    ]
    assert places == sorted(places)


def test_what_nobody_predicted_says_so_and_what_somebody_did_stands_beside() -> None:
    page = text_of(render(runs.report(), runs.recorded()))
    assert "tokens a second no prediction 568.9" in page
    assert "bound by no prediction disk" in page
    plan = runs.report()["plan"] | {
        "predicted_tokens_per_second": 601.2,
        "predicted_bound_by": "compute",
    }
    page = text_of(render(runs.report(plan=plan), runs.recorded()))
    assert "tokens a second 601.2 568.9" in page
    assert "bound by compute disk" in page


def test_ranks_are_on_one_page_each_with_its_lanes_and_counters() -> None:
    recorded = runs.of_ranks()
    record = recorded.others[0]
    report = runs.report(per_rank=[{**record.figures(), "rank": 0}, record.figures()])
    page = render(report, recorded)
    assert "a-machine 143.1 MiB 4 (4.0 KiB)" in text_of(page)
    lanes = embedded(page)["lanes"]
    names = [lane["name"] for lane in lanes]
    assert names[0] == "rank 0: compute"
    assert names[-3:] == ["rank 1: compute", "rank 1: ranks", "rank 1: disk"]
    assert lanes[-1]["kind"] == "disk"
    assert "rank" not in render(runs.report(), runs.recorded()).partition("<script")[0]


def test_generation_speaks_of_output_tokens() -> None:
    report = runs.report(
        output_tokens=1200, prompt_tokens=4944, output_tokens_per_second=12.34
    )
    text = text_of(render(report, runs.recorded()))
    assert "12.3 output tokens a second" in text
    assert "1,200 tokens were generated for 52 rows" in text


def test_fallbacks_faults_and_failed_rows_are_told() -> None:
    report = runs.report(
        fallbacks=["no reader 'gds'"], faults={"scale": 3}, rows_failed=2
    )
    text = text_of(render(report, runs.recorded()))
    assert "no reader 'gds'" in text
    assert "scale was used outside of the forward of its module (3×)" in text
    assert "2 rows failed" in text
    assert "Not as asked" not in text_of(render(runs.report(), runs.recorded()))


def test_sizes_in_the_policy_are_as_one_would_write_them() -> None:
    asked = {
        "device_memory": 1 << 29,
        "tokens_in_flight": 2048,
        "links": {"disk": {"bandwidth": 3 << 20}},
        "kv": {"tier": "host", "limits": {"host": 1 << 30}},
    }
    text = text_of(render(runs.report(asked=asked), runs.recorded()))
    assert "device_memory: 512MiB" in text
    assert "tokens_in_flight: 2048" in text
    assert "bandwidth: 3MiB" in text
    assert "host: 1GiB" in text


def test_no_name_becomes_markup() -> None:
    evil = Span("disk", EVIL, 1002.0, 1003.0, 7)
    recorded = Recorded(runs.BEGAN, [evil], runs.samples())
    report = runs.report(
        model=EVIL,
        fallbacks=[EVIL],
        faults={EVIL: 1},
        asked={"dtype": "float32", "io": {"cache": EVIL}},
        policy={"device": "cpu", "placement": {re.escape(EVIL): "disk"}},
        computer=runs.report()["computer"] | {"cpu": EVIL, "gpus": [EVIL]},
        versions={EVIL: EVIL},
        bound=runs.report()["bound"] | {"why": EVIL},
    )
    page = render(report, recorded)
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("</script>") == 2
    assert embedded(page)["names"] == [EVIL]
    assert EVIL in text_of(page)


class _Links(HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = [value or "" for key, value in attrs if key in ("src", "href")]
        self.found += [value for value in wanted if not value.startswith("data:")]


def test_the_page_refers_to_nothing_outside_of_it() -> None:
    page = render(runs.report(), runs.recorded())
    links = _Links()
    links.feed(page)
    assert links.found == []
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\"'\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name, which nobody fetches"


def test_the_pictures_are_in_microseconds_since_the_job_began() -> None:
    data = picture_data(runs.report(), runs.recorded(num_passes=1, num_sites=2))
    lanes = {lane["name"]: lane["spans"] for lane in data["lanes"]}
    assert list(lanes) == ["compute", "micro-batches", "wait", "cast", "disk"]
    first, second = lanes["disk"]
    assert data["names"][first[0]] == "model.layers.0"
    assert first[1:] == [2_000_000, 300_000, 300_000_000]
    assert second[1] == first[1] + first[2]
    assert data["memory"][0] == [0.0, 300 << 20, None]


def test_a_run_in_which_nothing_happened_has_a_page_too() -> None:
    report = runs.report(roofline=None, passes=0, link_bytes_per_second={})
    text = text_of(render(report, Recorded(runs.BEGAN, [], [])))
    assert "Nothing was recorded: no row reached the model." in text
    assert "The run was too short to say." in text


def themes() -> dict[str, dict[str, str]]:
    """The colours of each; the dark one has those of the light one that it leaves."""
    css = (Path(page_module.__file__).parent / "template" / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]
    return {"light": found[0], "dark": found[0] | found[1]}


def contrast(one: str, other: str) -> float:
    """1 to 21, as WCAG 2.2 has it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in parts
        ]
        weights = (0.2126, 0.7152, 0.0722)
        return sum(w * part for w, part in zip(weights, linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_and_blocks_stand_out_from_their_ground(theme: str) -> None:
    colours = themes()[theme]
    words = [(ink, on) for ink in ("ink", "soft", "mark") for on in ("card", "ground")]
    words += [("card", lane) for lane in ("compute", "wait", "disk", "cast", "host")]
    words += [("on-2", f"{lane}-2") for lane in ("compute", "disk", "cast", "host")]
    for ink, on in words:
        assert contrast(colours[ink], colours[on]) >= 4.5, (ink, on)
    for lane in ("compute", "wait", "disk", "cast", "host", "rest"):
        for ground in ("card", "ground"):
            assert contrast(colours[lane], colours[ground]) >= 3, (lane, ground)


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield found
        found.close()


class Shown:
    """A page in a window of a browser, and what it complained of or asked for."""

    def __init__(
        self, browser: Any, path: Path, size: str, scheme: str, **options: Any
    ) -> None:
        width, height = SIZES[size]
        self.complaints: list[str] = []
        self.height = height
        self.window = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            **options,
        )
        self.window.on("console", lambda said: self.complaints.append(said.text))
        self.window.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.window.on("request", self._asked)
        self.window.goto(path.as_uri())
        # What is drawn is drawn in the next frame.
        self.window.evaluate("new Promise(requestAnimationFrame)")
        self.window.evaluate("new Promise(requestAnimationFrame)")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(request.url)

    def picture(self, selector: str) -> Any:
        """float [height, width, 3] of one element."""
        from matplotlib.image import imread

        shot = self.window.locator(selector).screenshot()
        return numpy.asarray(imread(BytesIO(shot), format="png"))[..., :3]

    def pixels(self) -> bytes:
        """What is drawn on the timeline."""
        drawn = self.window.evaluate("document.getElementById('timeline').toDataURL()")
        return base64.b64decode(drawn.partition(",")[2])

    def live(self) -> str:
        self.window.evaluate("new Promise(requestAnimationFrame)")
        return str(self.window.evaluate("document.getElementById('live').textContent"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    report = runs.report(fallbacks=["no reader 'gds': " + "a long reason " * 20])
    found.write_text(render(report, runs.recorded()), encoding="utf-8")
    return found


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_looks_right(browser: Any, path: Path, size: str, scheme: str) -> None:
    shown = Shown(browser, path, size, scheme)
    assert shown.complaints == []
    width, answers_end = shown.window.evaluate(
        "[document.documentElement.scrollWidth, Math.max(..."
        "[...document.querySelectorAll('.answers article')].map("
        "part => part.getBoundingClientRect().bottom))]"
    )
    assert width <= SIZES[size][0], "no scrolling to the side"
    assert answers_end <= shown.height, "the answers are above the fold"
    for selector in ("#timeline", "#memory", "#throughput", "#roofline"):
        assert shown.picture(selector).std() > 0.02, f"{selector} is empty"
    ground = shown.window.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3]))
    assert (brightness > 600) == (scheme == "light")
    shown.window.close()


@needs_chromium
@pytest.mark.slow
def test_the_timeline_moves_by_buttons_keyboard_and_mouse(
    browser: Any, path: Path
) -> None:
    shown = Shown(browser, path, "desk", "light")
    one_pass = shown.live()
    assert "about one pass" in one_pass
    shown.window.get_by_role("button", name="all", exact=True).click()
    everything = shown.live()
    assert "about 3.0 passes" in everything
    before = shown.pixels()
    shown.window.locator("#timeline").focus()
    shown.window.keyboard.press("+")
    assert shown.live() != everything
    assert shown.pixels() != before
    shown.window.keyboard.press("Home")
    assert shown.live() == everything
    box = shown.window.locator("#timeline").bounding_box()
    shown.window.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown.window.mouse.wheel(0, -400)
    shown.window.wait_for_function(
        "text => document.getElementById('live').textContent !== text", arg=everything
    )
    zoomed = shown.pixels()
    shown.window.mouse.down()
    shown.window.mouse.move(box["x"] + 50, box["y"] + 60)
    shown.window.mouse.up()
    shown.live()
    assert shown.pixels() != zoomed
    assert shown.complaints == []
    shown.window.close()


@needs_chromium
@pytest.mark.slow
def test_two_fingers_zoom_and_one_moves(browser: Any, path: Path) -> None:
    shown = Shown(browser, path, "phone", "light", has_touch=True)
    fingers = shown.window.context.new_cdp_session(shown.window)
    shown.window.locator("#timeline").scroll_into_view_if_needed()
    box = shown.window.locator("#timeline").bounding_box()

    def touch(kind: str, *places: float) -> None:
        points = [
            {"x": box["x"] + place, "y": box["y"] + 100, "id": number}
            for number, place in enumerate(places)
        ]
        event = {"type": kind, "touchPoints": points}
        fingers.send("Input.dispatchTouchEvent", event)

    before = shown.live()
    touch("touchStart", 140, 160)
    touch("touchMove", 120, 180)
    touch("touchMove", 80, 220)
    touch("touchEnd")
    zoomed = shown.live()
    assert zoomed != before
    pixels = shown.pixels()
    touch("touchStart", 200)
    touch("touchMove", 170)
    touch("touchMove", 120)
    touch("touchEnd")
    assert shown.live() == zoomed
    assert shown.pixels() != pixels
    assert shown.complaints == []
    shown.window.close()


@needs_chromium
@pytest.mark.slow
def test_pointing_at_a_block_says_what_it_is(browser: Any, path: Path) -> None:
    shown = Shown(browser, path, "desk", "dark")
    box = shown.window.locator("#timeline").bounding_box()
    shown.window.mouse.move(box["x"] + 30, box["y"] + 22 + 17 + 20)
    shown.window.wait_for_selector("#tip:not([hidden])")
    tip = shown.window.locator("#tip").text_content()
    assert "model.layers.0\ncompute: 200.0 ms" in tip
    shown.window.close()


@needs_chromium
@pytest.mark.slow
def test_evil_names_stay_text_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    spans = [Span("compute", EVIL, 1002.0, 1003.0), Span("disk", EVIL, 1002.0, 1002.5)]
    recorded = Recorded(runs.BEGAN, spans, runs.samples())
    path.write_text(render(runs.report(model=EVIL), recorded), encoding="utf-8")
    shown = Shown(browser, path, "phone", "light")
    assert shown.complaints == []
    assert shown.window.evaluate("document.querySelectorAll('img').length") == 0
    assert shown.window.locator(".model").text_content() == EVIL
    shown.window.close()


@needs_chromium
@pytest.mark.slow
def test_a_full_ring_is_drawn(browser: Any, tmp_path: Path) -> None:
    """As many spans as are kept at most."""
    path = tmp_path / "full.html"
    recorded = runs.recorded(num_passes=340)
    assert len(recorded.spans) > 32_000
    path.write_text(render(runs.report(), recorded), encoding="utf-8")
    assert path.stat().st_size < 2 << 20
    shown = Shown(browser, path, "desk", "light")
    assert shown.complaints == []
    assert shown.picture("#timeline").std() > 0.02
    shown.window.close()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [0, 1, 9])
def test_a_run_in_which_nothing_happened_draws_nothing_wrong(
    browser: Any, tmp_path: Path, num_samples: int
) -> None:
    path = tmp_path / "nothing.html"
    report = runs.report(
        roofline=None, passes=0, tokens=0, tokens_per_second=0.0, compute_seconds=0.0
    )
    recorded = Recorded(runs.BEGAN, [], runs.samples(num_samples))
    path.write_text(render(report, recorded), encoding="utf-8")
    shown = Shown(browser, path, "phone", "dark")
    assert shown.complaints == []
    drawn = shown.window.locator("#throughput").text_content()
    assert "too short to say" in drawn
    assert "NaN" not in shown.window.content()
    shown.window.close()
