"""The status page in a real browser, against a server that answers as the scheduler does."""

import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from paceline.v1 import fleet_pb2 as fleet
from paceline.v1 import observation_pb2 as observation
from tests.browser.chromium import chromium
from tests.browser.sample import CACHED, FREE, HELD, as_json, sample_account, sample_overview, sample_trace

PAGE = Path(__file__).parent.parent.parent / "scheduler_svc/status_page/index.html"
expect.set_options(timeout=15_000)
EVIL = "\"><img src=x onerror='window.broken=1'><script>window.broken=1</script>"

# What each cell of a block map is, by the size of what is drawn there and not by its colour.
CELL_SIZES = """(canvas, count) => {
  const columns = Number(canvas.dataset.columns), side = Number(canvas.dataset.side), width = canvas.width;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, canvas.height).data;
  const isDrawn = (x, y) => pixels[4 * (y * width + x) + 3] > 127;
  return Array.from({ length: count }, (_, index) => {
    const x = index % columns * side, y = Math.floor(index / columns) * side + Math.floor(side / 2) - 1;
    return isDrawn(x, y) ? 2 : isDrawn(x + Math.round(.2 * (side - 1)), y) ? 1 : 0;
  });
}"""


class StandIn:
    """A server with the answers of a scheduler. It can die and come back at the same port."""

    def __init__(self, overview: observation.GetOverviewResponse) -> None:
        self.overview = overview
        self.asked: list[str] = []
        self._server: http.server.ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.asked.append(self.path)
                kind, body = stand_in.answer(self.path)
                with suppress(ConnectionError):  # the page was closed meanwhile
                    self.send_response(200 if body else 404)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str) -> tuple[str, bytes]:
        path = path.split("?")[0]
        if path == "/":
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if path == "/api/overview":
            return "application/json", as_json(self.overview)
        request_id = urllib.parse.unquote(path.removeprefix("/api/trace/"))
        found = [request for request in self.overview.requests if request.request_id == request_id]
        return "application/json", sample_trace(found[0]) if found else b""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def scheduler() -> Iterator[StandIn]:
    stand_in = StandIn(sample_overview())
    stand_in.start()
    yield stand_in
    stand_in.stop()


@contextmanager
def opened(browser: Browser, scheduler: StandIn, *expected: str, **look: object) -> Iterator[Page]:
    """The page, drawn once. Its console says nothing but what is `expected`, and it asks nobody else for anything."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **look})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(scheduler.url)
    expect(page.locator("#tile-running")).to_be_visible()
    yield page
    page.close()

    assert [line for line in said if not any(part in line for part in expected)] == []
    assert [url for url in asked if not url.startswith((scheduler.url, "data:"))] == []


def of(request: observation.RequestOverview) -> str:
    """What its row says of where it is."""
    names = {observation.REQUEST_STAGE_QUEUE: "queue", observation.REQUEST_STAGE_DECODE: "decode"}
    return request.outcome or names[request.stage]


def test_shows_the_figures_of_the_scheduler(browser, scheduler, tmp_path):
    """An operator decides by these numbers: each must be the one that the scheduler gave, in its unit."""
    with opened(browser, scheduler) as page:
        expect(page.locator("#model")).to_have_text("Llama-3.1-8B-Instruct")
        expect(page.locator("#facts")).to_have_text("release 0.2.0 · up 2 h 5 min")
        expect(page.locator("#durability")).to_have_text("✓ durable, journal 17.9 MiB")
        expect(page.locator("#tile-running")).to_contain_text("14 requests")
        expect(page.locator("#tile-waiting")).to_contain_text("6 requests")
        oldest = scheduler.overview.load.oldest_waiting_ms
        expect(page.locator("#tile-waiting")).to_contain_text(f"oldest for {oldest / 1000:.2f} s")
        expect(page.locator("#tile-tokens")).to_contain_text(
            f"{scheduler.overview.history[-1].tokens_per_s:.0f} tokens/s"
        )
        expect(page.locator("#tile-first")).to_contain_text("412 ms")
        expect(page.locator("#tile-first")).to_contain_text("95 % within 1.39 s")
        load = scheduler.overview.load
        expect(page.locator("#tile-blocks")).to_contain_text(f"{100 * load.held_block_count / load.block_count:.0f} %")
        expect(page.locator("#scaling")).to_contain_text("wants 4 executors: 2 ready, 1 starting")
        expect(page.locator("#scaling")).to_contain_text("6 requests wait; up by at most 2")
        expect(page.locator("#scaling")).to_contain_text("cost per hour 9.42")
        assert page.title() == "14 running, 6 waiting · Paceline"
        page.screenshot(path=tmp_path / "status_page.png", full_page=True)

    assert (tmp_path / "status_page.png").stat().st_size > 20_000


def test_an_empty_scheduler_is_shown_as_one(browser, scheduler):
    """Default values are left out of the answer: the first thing that a newcomer sees must not be `NaN`."""
    scheduler.overview = observation.GetOverviewResponse(at_unix_ms=1_790_000_000_000)
    with opened(browser, scheduler) as page:
        expect(page.locator("#tile-running")).to_contain_text("0 requests")
        expect(page.locator("#tile-waiting")).to_contain_text("nobody waits")
        expect(page.locator("#executors-title")).to_have_text("Executors: none has joined")
        expect(page.locator("#shown")).to_have_text("No request yet.")
        expect(page.locator("#scaling")).to_contain_text("executors come and go by hand")

        assert not re.search("NaN|undefined|null|Infinity", page.inner_text("body"))


@pytest.mark.parametrize("has_decided", [True, False])
def test_an_autoscaler_without_prices_is_shown_as_one(browser, scheduler, has_decided):
    """Few say what an executor costs: what is left out must leave nothing behind, least of all the word `false`."""
    scheduler.overview.scaling.decision.ClearField("cost_per_hour")
    if not has_decided:
        scheduler.overview.scaling.ClearField("decision")
    with opened(browser, scheduler) as page:
        expect(page.locator("#scaling")).to_contain_text("2 ready, 1 starting")
        expect(page.locator("#scaling")).to_contain_text("held by autoscale…de9a")

        assert not re.search("cost|false|true|NaN|undefined|null", page.inner_text("#scaling"))


def test_executors_show_what_they_do_and_where_a_step_goes(browser, scheduler):
    """A slow executor is told apart from a starved one by the phases of its steps, and the share of idle time."""
    with opened(browser, scheduler) as page:
        cards = page.locator(".executor")
        expect(cards).to_have_count(3)
        expect(cards.nth(0)).to_contain_text("executor-0")
        expect(cards.nth(0)).to_contain_text("6 of 256")
        expect(cards.nth(2)).to_contain_text("draining")
        expect(cards.nth(0).locator(".idle")).not_to_contain_text("▲")
        expect(cards.nth(1).locator(".idle")).to_have_text("▲ idle 3.1 %")
        widths = cards.nth(0).locator(".stack i").evaluate_all("all => all.map(it => parseFloat(it.style.width))")

    assert widths == pytest.approx([100 * us / 11_065 for us in (5, 420, 9_630, 1_010)], abs=0.1)


def test_a_chart_tells_what_was_then(browser, scheduler):
    """A peak is of use when it has a time and a figure, to be found again in logs."""
    with opened(browser, scheduler) as page:
        chart = page.locator(".chart").nth(1)
        label = chart.locator("svg")
        expect(label).to_have_attribute("aria-label", "Requests: running 14, waiting 6")
        label.hover(position={"x": 60, "y": 40})
        expect(chart.locator("figcaption")).to_contain_text(re.compile(r"\d\d:\d\d:\d\d"))
        shown = int(re.search(r"running (\d+)", label.get_attribute("aria-label")).group(1))
        then = round(300 * 60 / label.bounding_box()["width"])
        near = {sample.running_request_count for sample in scheduler.overview.history[then - 2 : then + 3]}
        assert shown in near - {14}

        page.mouse.move(0, 0)
        expect(label).to_have_attribute("aria-label", "Requests: running 14, waiting 6")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_block_map_has_the_cells_of_the_cache(browser, scheduler, scheme):
    """What is free, kept or held is told by the size of a cell, so that nobody needs to see colours."""
    with opened(browser, scheduler, color_scheme=scheme) as page:
        for card, it in zip(page.locator(".executor").all(), scheduler.overview.executors, strict=True):
            sizes = card.locator("canvas").evaluate(CELL_SIZES, len(it.block_cells))

            assert sizes == list(it.block_cells)
            held, cached, free = (4 * it.block_cells.count(kind) for kind in (HELD, CACHED, FREE))
            label = card.locator("canvas").get_attribute("aria-label").replace(",", "")
            assert label == f"Block map: {held} held {cached} cached {free} free of 4096 blocks"


def test_requests_stand_in_the_scheduler_s_order_with_their_stages(browser, scheduler):
    """The order is what waits for what: running, waiting, ended."""
    with opened(browser, scheduler) as page:
        rows = page.locator("#requests tbody tr")
        expect(rows).to_have_count(len(scheduler.overview.requests))
        ids = rows.locator("td.id button").evaluate_all("all => all.map(it => it.title)")
        stages = rows.locator("td.stage .chip").all_inner_texts()
        recent = rows.nth(0).locator(".track i").evaluate_all("all => all.map(it => it.className)")

        assert ids == [request.request_id for request in scheduler.overview.requests]
        assert [stage.split(" ", 1)[1] for stage in stages] == [of(request) for request in scheduler.overview.requests]
        assert recent[:3] == ["queue", "prefill", "decode"]

        latest = scheduler.overview.requests[20]
        del scheduler.overview.requests[20]
        scheduler.overview.requests.insert(0, latest)
        expect(rows.nth(0).locator("button")).to_have_attribute("title", latest.request_id)


def test_the_filter_finds_by_id_tenant_and_outcome(browser, scheduler):
    """Among hundreds of requests an operator looks for one user, or for what went wrong."""
    requests = scheduler.overview.requests
    searches = {
        requests[4].request_id[:10]: 1,
        "support-bot": sum(request.tenant == "support-bot" for request in requests),
        "CANCELLED": sum(request.outcome == "cancelled" for request in requests),
        "no such thing": 0,
    }
    with opened(browser, scheduler) as page:
        for text, count in searches.items():
            page.get_by_label("Filter requests").fill(text)
            expect(page.locator("#requests tbody tr")).to_have_count(count)


def test_a_request_opens_the_waterfall_of_its_trace(browser, scheduler):
    """Where did the time of this one request go? That is asked when a user complains, without a tracing backend."""
    request = next(request for request in scheduler.overview.requests if request.outcome == "error")
    stages = [observation.RequestStage.Name(phase.stage)[len("REQUEST_STAGE_") :].lower() for phase in request.phases]
    spans = [name for stage in stages for name in ([stage] if stage == "queue" else [stage, *["step"] * 5])]
    with opened(browser, scheduler) as page:
        page.get_by_title(request.request_id).focus()
        page.keyboard.press("Enter")
        detail = page.get_by_role("dialog")
        names = detail.locator(".spans summary span:first-child")
        expect(names.first).to_contain_text("generate")
        expect(detail.locator(".spans details")).to_have_count(1 + len(spans))
        shown = names.all_inner_texts()
        detail.locator("summary").nth(0).click()
        expect(detail.locator("details").nth(0)).to_contain_text(request.error)
        expect(detail.locator("details").nth(0)).to_contain_text("first token")
        assert detail.locator(".account p").all_inner_texts() == sample_account(request)
        link = detail.get_by_role("link", name="Download")
        with page.expect_download() as download:
            link.click()
        loaded = json.loads(download.value.path().read_text())
        page.keyboard.press("Escape")
        expect(detail).to_be_hidden()
        expect(page.get_by_title(request.request_id)).to_be_focused()

    assert [name.split()[-2] for name in shown] == ["generate", *spans]
    assert loaded == json.loads(sample_trace(request))


def test_a_loss_is_told_by_its_name_and_spans_by_their_executors(browser, scheduler):
    """A diamond without a word, and `forward` without a place, leave open the two questions that one has."""
    request = next(request for request in scheduler.overview.requests if request.recomputation_count)
    place = next(phase.executor_id for phase in request.phases if phase.executor_id)
    with opened(browser, scheduler) as page:
        page.get_by_title(request.request_id).click()
        detail = page.get_by_role("dialog")
        expect(detail.locator(".spans .event.bad")).to_contain_text(f"◆ executor lost {place}")
        expect(detail.locator(".spans .event").first).to_contain_text("first token")
        expect(detail.locator(".spans summary").filter(has_text="decode").first).to_contain_text(place)
        expect(detail.locator(".spans summary").filter(has_text="queue").first).to_contain_text("scheduler")


def test_one_request_alone_makes_no_executor_red(browser, scheduler):
    """In the few steps of a single request a pause of a moment is a large share, and nothing to be mended."""
    scheduler.overview.executors[1].executor.running_request_count = 1
    with opened(browser, scheduler) as page:
        expect(page.locator(".executor").nth(1).locator(".idle")).to_have_text("idle 3.1 %")


def test_a_request_that_is_forgotten_is_said_to_be(browser, scheduler):
    """The scheduler keeps only the last timelines: a click in that moment must say so, not fail."""
    with opened(browser, scheduler, "status of 404") as page:
        page.get_by_role("button", name="Pause").click()
        del scheduler.overview.requests[:]
        page.locator("#requests button").nth(0).click()
        expect(page.get_by_role("dialog")).to_contain_text("nothing is known of it any more")


def test_a_dead_scheduler_is_announced_and_its_return_noticed(browser, scheduler):
    """A page that goes on showing old figures as if they were new is worse than none."""
    with opened(browser, scheduler, "ERR_CONNECTION_REFUSED") as page:
        scheduler.stop()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(re.compile(r"No answer from the scheduler since \d\d:\d\d:\d\d"))
        expect(page.locator("#tile-running")).to_contain_text("14 requests")
        assert page.title() == "✕ no answer · Paceline"

        scheduler.overview.load.running_request_count = 15
        scheduler.start()
        expect(page.locator("#tile-running")).to_contain_text("15 requests", timeout=10_000)
        expect(alert).not_to_contain_text("No answer")


def test_warns_of_a_lost_journal_and_of_refused_requests(browser, scheduler):
    """Both are promises that no longer hold, and neither shows in a stream of tokens."""
    with opened(browser, scheduler) as page:
        expect(page.get_by_role("alert")).to_have_text("")
        scheduler.overview.durability = fleet.DURABILITY_LOST
        scheduler.overview.refused_in_last_minute_count = 5
        expect(page.get_by_role("alert")).to_contain_text("The journal cannot be written")
        expect(page.get_by_role("alert")).to_contain_text("5 requests were refused in the last minute")
        expect(page.locator("#durability")).to_have_text("▲ journal lost")


def test_names_that_users_chose_are_only_ever_text(browser, scheduler):
    """Whoever may send a request chooses its id and tenant, and an operator's browser must not run them."""
    request = scheduler.overview.requests[0]
    request.request_id, request.tenant, request.error = EVIL, EVIL, EVIL
    request.outcome = "error"
    scheduler.overview.executors[0].executor.executor_id = EVIL
    scheduler.overview.scaling.holder_id = scheduler.overview.scaling.decision.reason = EVIL
    scheduler.overview.load.model = EVIL
    with opened(browser, scheduler, "requires 'TrustedHTML'") as page:
        page.locator("#requests button").nth(0).click()
        expect(page.get_by_role("dialog").locator("h2")).to_have_text(EVIL)
        expect(page.get_by_role("dialog").locator(".spans details")).not_to_have_count(0)

        assert page.locator("#model").inner_text() == EVIL
        assert page.locator("#requests .tenant").nth(0).inner_text() == EVIL
        assert page.locator("img, body script").count() == 1  # that of the page itself
        assert page.evaluate("window.broken") is None
        assert (
            page.evaluate("() => { try { document.body.innerHTML = '<p>' } catch { return 'refused' } }") == "refused"
        )


def test_pause_holds_everything_still(browser, scheduler):
    """To read a row, or to show it to a colleague, it must stop moving; and not ask the scheduler meanwhile."""
    with opened(browser, scheduler) as page:
        page.get_by_role("button", name="Pause").click()
        page.wait_for_timeout(300)
        count = len(scheduler.asked)
        scheduler.overview.load.running_request_count = 99
        page.wait_for_timeout(1500)
        assert len(scheduler.asked) == count
        expect(page.locator("#tile-running")).to_contain_text("14 requests")

        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#tile-running")).to_contain_text("99 requests")


def test_fits_a_phone(browser, scheduler):
    """Who is woken at night looks at it on a phone first."""
    with opened(browser, scheduler, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        expect(page.locator("#requests tbody tr").nth(0).locator(".track")).to_be_visible()
