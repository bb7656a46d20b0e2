"""What dashboards and rules ask: Prometheus understands it, and it is about metrics that there are."""

import re

import pytest

from tests.observability.metric_names import METRICS
from tests.observability.prometheus import (
    MAY_BE_EMPTY_OR_ABSENT,
    QueryError,
    expressions,
    running_prometheus,
    selectors,
)

every_expression = pytest.mark.parametrize(
    "expr", [expr for _, expr in expressions()], ids=[where for where, _ in expressions()]
)


def test_prometheus_understands_every_expression(tmp_path):
    """A panel with a broken expression shows an error on the day it is needed."""
    wrong = {}
    with running_prometheus({"scrape_configs": []}, tmp_path) as prometheus:
        for where, expr in expressions():
            try:
                prometheus.query(expr)
            except QueryError as error:
                wrong[where] = str(error)

    assert not wrong


@every_expression
def test_an_expression_reads_metrics_and_labels_that_there_are(expr):
    """A misspelt name is no error to Prometheus: the panel is empty, the alert silent for ever."""
    for name, matchers in selectors(expr):
        assert name in METRICS
        for label, (operator, value) in matchers.items():
            assert label in METRICS[name], f"{name} has no label {label}"
            known = METRICS[name][label]
            named = {value} if operator in ("=", "!=") else set(value.split("|"))
            assert not known or re.search(r"[.*+]", value) or named <= known, f"{label} of {name} is never {value}"


@every_expression
def test_an_expression_groups_by_labels_that_there_are(expr):
    """Grouped by a label that no series has, everything falls into one line."""
    known = {label for name, _ in selectors(expr) for label in METRICS[name]}

    for labels in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expr):
        assert set(labels.replace(" ", "").split(",")) - {""} <= known


def test_what_may_be_empty_is_there_to_be_asked_for():
    """An excuse for a metric that nobody reads hides the next one that is really missing."""
    read = {name for _, expr in expressions() for name, _ in selectors(expr)}

    assert set(MAY_BE_EMPTY_OR_ABSENT) <= read


def test_selectors_are_found_with_their_matchers():
    """The tests above see nothing that this does not find."""
    expr = 'sum by (le) (rate(a_bucket{x="b(c)",y=~"d|e"}[5m])) / scalar(f) > 0.1 and ignoring(g) h{i!="by (j)"} == 1e6'

    assert selectors(expr) == [
        ("a_bucket", {"x": ("=", "b(c)"), "y": ("=~", "d|e")}),
        ("f", {}),
        ("h", {"i": ("!=", "by (j)")}),
    ]
