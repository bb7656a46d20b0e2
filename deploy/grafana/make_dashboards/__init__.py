"""The dashboards: a module with a table of panels for each.

After a change here run `python -m deploy.grafana.make_dashboards` in the root of the repository; what it writes is
committed too.
"""

import json
from typing import Any

from deploy.grafana.make_dashboards.cache import CACHE
from deploy.grafana.make_dashboards.fleet import FLEET
from deploy.grafana.make_dashboards.latency import LATENCY
from deploy.grafana.make_dashboards.overview import OVERVIEW

_FILES = {"overview.json": OVERVIEW, "latency.json": LATENCY, "cache.json": CACHE, "fleet.json": FLEET}
_LINE = 120


def dashboards() -> dict[str, str]:
    """Text of each file, by its name."""
    return {name: _compact(dashboard.as_json()) + "\n" for name, dashboard in _FILES.items()}


def _compact(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) < _LINE or not isinstance(value, dict | list) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        inside = [_compact(item, deeper) for item in value]
    else:
        inside = [f"{json.dumps(key)}: {_compact(item, deeper)}" for key, item in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n" + ",\n".join(deeper + item for item in inside) + f"\n{indent}{closing}"
