"""The dashboards as Grafana gets them."""

import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest
import yaml

from common.processes import ANY_PORT
from deploy.grafana.make_dashboards import dashboards
from tests.observability.otlp_receiver import OtlpReceiver
from tests.observability.prometheus import DASHBOARDS, ROOT
from tests.system import request, started

GRAFANA = ROOT / "deploy/grafana"
FILES = sorted(DASHBOARDS.glob("*.json"))
every_dashboard = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
WIDTH = 24


def panels(file: Path) -> list[dict]:
    return json.loads(file.read_text())["panels"]


def test_the_committed_dashboards_are_what_the_generator_makes():
    """A change by hand would be lost with the next run of it."""
    assert {file.name: file.read_text() for file in FILES} == dashboards()


def test_dashboards_have_addresses_of_their_own():
    """Grafana keeps the last of two with the same uid."""
    uids = [json.loads(file.read_text())["uid"] for file in FILES]

    assert len(set(uids)) == len(uids) == 4


@every_dashboard
def test_every_panel_asks_a_source_that_is_provisioned(file):
    """A panel with another source shows an error."""
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/paceline.yml").read_text())["datasources"]
    sources = {(source["type"], source["uid"]) for source in provisioned}

    for panel in panels(file):
        assert (panel["datasource"]["type"], panel["datasource"]["uid"]) in sources


@every_dashboard
def test_every_panel_says_what_it_asks_and_what_to_do(file):
    """Whoever looks at it at night has not built it."""
    titles = [panel["title"] for panel in panels(file)]

    assert len(set(titles)) == len(titles)
    for panel in panels(file):
        assert panel["description"].endswith((".", ")")), panel["title"]
        assert panel["targets"], panel["title"]


@every_dashboard
def test_panels_fill_the_grid_and_do_not_overlap(file):
    """Grafana pushes overlapping panels about, and nobody finds them again."""
    taken: set[tuple[int, int]] = set()
    for panel in panels(file):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells


def asking_for_exemplars() -> dict[str, set[str]]:
    """The histograms of the panels that show dots, by the panels' titles."""
    return {
        panel["title"]: {name for one in panel["targets"] for name in re.findall(r"(\w+)_bucket", one["expr"])}
        for file in FILES
        for panel in panels(file)
        if any(target.get("exemplar") for target in panel["targets"])
    }


def test_slow_requests_lead_to_their_traces():
    """A dot on a curve is one request: the way from `slow` to `why`."""
    histograms = set().union(*asking_for_exemplars().values())

    assert histograms == {f"paceline_{name}_seconds" for name in ("first_token", "queue", "prefill", "request")}


async def test_every_panel_that_asks_for_exemplars_has_a_histogram_that_exports_them():
    """A panel without the dots that its dashboard promises looks as if nobody had been slow."""
    receiver = OtlpReceiver()
    async with started(otlp_endpoint=receiver.endpoint) as system:
        assert [one async for one in system.generate(request("hello", 4))]
        await system.idle()
        pages = system.app.pages()
        metrics = await asyncio.to_thread(openmetrics, pages.start(ANY_PORT, "127.0.0.1"))
        pages.stop()
    receiver.close()
    exporting = {name for line in metrics.splitlines() for name in re.findall(r"^(\w+)_bucket.* # \{trace_id=", line)}

    assert {title: asked - exporting for title, asked in asking_for_exemplars().items() if asked - exporting} == {}


def openmetrics(port: int) -> str:
    """The metrics as Prometheus asks for them where it keeps exemplars."""
    accepted = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=accepted)) as answer:
        return answer.read().decode()
