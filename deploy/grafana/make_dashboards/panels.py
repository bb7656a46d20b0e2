"""What dashboards are made of: four kinds of panels, and the grid that they stand in.

A panel's title is the question that it answers, its text says what to do about a bad answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

PROMETHEUS = {"type": "prometheus", "uid": "paceline-prometheus"}  # as provisioning/datasources says
WIDTH = 24  # of Grafana's grid
_STAT_HEIGHT, _HEIGHT = 4, 8

Json = dict[str, Any]


class Panel(Protocol):
    """One question and its answer."""

    def as_json(self) -> Json:
        """As Grafana reads it; `gridPos` has its size and no place yet."""
        ...


@dataclass(frozen=True)
class Stat:
    """One number, red where it is bad."""

    title: str
    text: str
    expr: str
    unit: str = "short"
    _: KW_ONLY
    bad_above: float | None = None
    bad_below: float | None = None
    names: str = ""  # the value of this label is shown in place of the number
    bad_name: str = ""  # ... in red where it is this one
    width: int = 4

    def as_json(self) -> Json:
        """As Grafana reads it."""
        queries = {f"{{{{{self.names}}}}}" if self.names else "": self.expr}
        panel = _panel("stat", self.title, self.text, queries, (self.width, _STAT_HEIGHT), instant=True)
        thresholds = {"mode": "absolute", "steps": self._steps()}
        panel["fieldConfig"] = {"defaults": {"unit": self.unit, "thresholds": thresholds}}
        if self.bad_name:
            red = {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}}
            matcher = {"id": "byName", "options": self.bad_name}
            panel["fieldConfig"]["overrides"] = [{"matcher": matcher, "properties": [red]}]
        panel["options"] = {"textMode": "name" if self.names else "value", "graphMode": "none"}
        return panel

    def _steps(self) -> list[Json]:
        if self.bad_below is not None:
            return [{"color": "red", "value": None}, {"color": "green", "value": self.bad_below}]
        bad = [] if self.bad_above is None else [{"color": "red", "value": self.bad_above}]
        return [{"color": "green", "value": None}, *bad]


@dataclass(frozen=True)
class Lines:
    """Curves over time, by what stands in the legend."""

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    _: KW_ONLY
    width: int = 8
    stacked: bool = False
    exemplars: bool = False  # dots that lead to the trace of one request
    line_at: float | None = None  # where bad begins

    def as_json(self) -> Json:
        """As Grafana reads it."""
        target = {"exemplar": True} if self.exemplars else {}
        panel = _panel("timeseries", self.title, self.text, self.queries, (self.width, _HEIGHT), **target)
        custom: Json = {"fillOpacity": 40, "stacking": {"mode": "normal"}} if self.stacked else {"fillOpacity": 5}
        defaults: Json = {"unit": self.unit, "min": 0, "custom": custom}
        if self.line_at is not None:
            custom["thresholdsStyle"] = {"mode": "dashed"}
            steps = [{"color": "transparent", "value": None}, {"color": "red", "value": self.line_at}]
            defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        panel["fieldConfig"] = {"defaults": defaults}
        panel["options"] = {"legend": {"placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
        return panel


@dataclass(frozen=True)
class Heatmap:
    """How many took how many seconds, over time."""

    title: str
    text: str
    histogram: str
    _: KW_ONLY
    exemplars: bool = False  # as in `Lines`

    def as_json(self) -> Json:
        """As Grafana reads it."""
        expr = f"sum by (le) (increase({self.histogram}_bucket[$__rate_interval]))"
        target = {"format": "heatmap", **({"exemplar": True} if self.exemplars else {})}
        panel = _panel("heatmap", self.title, self.text, {"{{le}}": expr}, (8, _HEIGHT), **target)
        panel["options"] = {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "exponent": 0.5},
            "yAxis": {"unit": "s"},
            "tooltip": {"mode": "single", "yHistogram": True},
        }
        return panel


@dataclass(frozen=True)
class Table:
    """What is there now, a line for each series."""

    title: str
    text: str
    expr: str

    def as_json(self) -> Json:
        """As Grafana reads it."""
        panel = _panel("table", self.title, self.text, {"": self.expr}, (8, _HEIGHT), format="table", instant=True)
        hidden = {"Time": True, "Value": True, "__name__": True, "alertstate": True}
        panel["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
        return panel


@dataclass(frozen=True)
class Dashboard:
    """A page of panels, from left to right, then below."""

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]

    def as_json(self) -> Json:
        """As Grafana reads it."""
        others = {"type": "dashboards", "title": "Paceline", "tags": ["paceline"]}
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["paceline"],
            "schemaVersion": 42,
            "editable": False,
            "refresh": "5s",
            "time": {"from": "now-15m", "to": "now"},
            "links": [{**others, "includeVars": False, "keepTime": True}],
            "panels": list(_placed(panel.as_json() for panel in self.panels)),
        }


def _panel(kind: str, title: str, text: str, queries: dict[str, str], size: tuple[int, int], **target: Any) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": PROMETHEUS,
        "gridPos": {"h": size[1], "w": size[0]},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend, **target}
            for number, (legend, expr) in enumerate(queries.items())
        ],
    }


def _placed(panels: Iterable[Json]) -> Iterator[Json]:
    """The panels with their places in the grid, and numbers."""
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        size = panel["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, row_height = 0, y + row_height, 0
        yield {**panel, "gridPos": {**size, "x": x, "y": y}, "id": number}
        x, row_height = x + size["w"], max(row_height, size["h"])
