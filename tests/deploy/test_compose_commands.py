"""The commands of the compose file, run as it says but for the places: no engine is here to try it."""

import sys

import pytest
import yaml

from paceline import AsyncClient
from tests.deploy.test_compose import COMPOSE
from tests.scheduler_svc.test_service import expected_text

SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture
def compose_run(services, tmp_path):
    """Runs the entry point of a service with some variables, places of a container being places here."""
    program = tmp_path / "paceline"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m paceline_cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "models").mkdir()

    def run(name, **variables):
        shell, option, text = SERVICES[name]["entrypoint"]
        text = text.replace("$$", "$").replace("/models/", f"{tmp_path}/models/")
        text = text.replace("$(hostname):50061", services.address_of(name))
        settings = " ".join(f"{key}='{value}'" for key, value in variables.items())
        words = [shell, option, f"export PATH='{tmp_path}':\"$PATH\" {settings}; {text}"]
        return services.run("-c", f"import os; os.execvp({shell!r}, {words!r})")

    return run


async def test_without_a_model_everything_else_comes_up(services, compose_run):
    """`MODEL=fake docker compose up` is the quick way to see dashboards and traces: nothing is downloaded."""
    prepare = compose_run("prepare", PACELINE_MODEL="fake")
    assert await prepare.exit_code() == 0, prepare.printed
    scheduler = compose_run("scheduler", PACELINE_LISTEN=services.address)
    await scheduler.has_printed("scheduler ready")
    where = {"PACELINE_LISTEN": services.address_of("executor"), "PACELINE_SCHEDULER": services.address}
    await compose_run("executor", **where).has_printed("executor ready")

    async with AsyncClient(services.address, max_retries=100) as client:
        output = await client.generate("Hello", max_output_tokens=20, stream=False)
    assert output.text == expected_text("Hello", 20)


async def test_what_is_served_is_what_the_link_names(services, compose_run, tmp_path):
    """The link is read, not passed on: a restarted container must not mix two models when the link has moved."""
    (tmp_path / "models/current").symlink_to(tmp_path / "models/mine")

    scheduler = compose_run("scheduler", PACELINE_LISTEN=services.address)

    assert await scheduler.exit_code() == 2
    assert f"{tmp_path}/models/mine" in scheduler.printed
