"""The alert rules and the scrape configuration, held by Prometheus's own tool."""

import re

import pytest
import yaml

from tests.observability.prometheus import ALERT_TESTS, ALERTS, CONFIG, ROOT, promtool

RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
every_alert = pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])


def test_the_scrape_configuration_is_one_that_prometheus_takes():
    """A Prometheus that does not start is found out when something else is wrong already."""
    done = promtool("check", "config", CONFIG)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_ones_that_prometheus_takes():
    """One wrong rule keeps all of them from being loaded."""
    done = promtool("check", "rules", ALERTS)

    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_not_when_they_should_not():
    """An alert that never fires is worse than none, and one that always does is not read."""
    done = promtool("test", "rules", ALERT_TESTS)

    assert done.returncode == 0, done.stdout + done.stderr


@every_alert
def test_an_alert_was_seen_firing_and_seen_silent(rule):
    """A new rule comes with both halves of its test."""
    cases = [case for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    own = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]

    assert set(own) == {True, False}


@every_alert
def test_an_alert_says_what_is_wrong_how_much_and_what_to_do(rule):
    """Whoever is woken by it knows nothing yet: the paragraph it points to has to be there."""
    notes = rule["annotations"]
    path, _, anchor = notes["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)

    assert rule["labels"]["severity"] in ("critical", "warning")
    assert notes["summary"]
    assert "$value" in notes["description"]
    assert anchor == rule["alert"].lower()
    assert anchor in {heading.lower() for heading in headings}
