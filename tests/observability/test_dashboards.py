"""The dashboards as Grafana gets them."""

import json
from pathlib import Path

import pytest
import yaml

from deploy.grafana.make_dashboards import dashboards
from tests.observability.prometheus import DASHBOARDS, ROOT

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


def test_slow_requests_lead_to_their_traces():
    """A dot on a curve is one request: the way from `slow` to `why`."""
    with_exemplars = {
        target["expr"]
        for panel in panels(DASHBOARDS / "latency.json")
        for target in panel["targets"]
        if "exemplar" in target
    }

    for histogram in ("first_token", "queue", "prefill", "request"):
        assert any(f"paceline_{histogram}_seconds_bucket" in expr for expr in with_exemplars)
