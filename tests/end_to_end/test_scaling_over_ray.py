"""The number of executors follows the load over a real cluster of Ray: processes, sockets, nodes; no model."""

import re
import sys

import pytest
import yaml

from paceline import Client, Unavailable
from tests.end_to_end.asking import ask, asking
from tests.end_to_end.processes import Process
from tests.paceline_cli.conftest import wait_until

pytest.importorskip("ray")

STORE_BYTES = 80 * 1024 * 1024


@pytest.fixture
def cluster():
    """A head without room for executors, and a node with room for two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1, resources={"executor": 2}, object_store_memory=STORE_BYTES)
        yield cluster
        cluster.shutdown()


def scaling_file(folder, cluster, scheduler):
    """A file whose executors are real ones, on the nodes that have the resource."""
    words = ["-m", "paceline_cli", "executor", "fake", "--scheduler", scheduler, "--fake-step-us", "20000"]
    command = [sys.executable, *words, "--executor-id", "{executor_id}", "--listen", "127.0.0.1:0"]
    path = folder / "scaling.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "executors": {"min": 0, "max": 2},
                "policies": [{"kind": "threshold", "target": 4, "down_window": "1s"}],
                "cooldowns": {"down": "1s", "zero": "2s"},
                "times": {"interval": "200ms", "finish": 0},
                "node_types": [{"name": "cpu", "price_per_hour": 0.1}],
                "actuator": {
                    "kind": "ray",
                    "address": cluster.address,
                    "command": command,
                    "resources": {"cpu": {"num_cpus": 0, "executor": 1}},
                },
            }
        )
    )
    return path


def test_executors_come_and_go_on_the_nodes_of_a_cluster(cluster, tmp_path):
    """Ray places and starts them; requests, drains and tokens go the way they always go."""
    scheduler = Process(tmp_path / "scheduler", "-m", "paceline_cli", "scheduler", "fake", "--listen", "127.0.0.1:0")
    address = wait_until(lambda: re.search(r"127\.0\.0\.1:[1-9]\d*", scheduler.printed))[0]
    file = scaling_file(tmp_path, cluster, address)
    autoscaler = Process(tmp_path / "autoscaler", "-m", "paceline_cli", "autoscaler", "run", str(file), "-s", address)
    try:
        wait_until(lambda: "an autoscaler follows the load" in scheduler.printed)
        with Client(address) as client:
            with asking(client, 12) as token_counts:
                wait_until(lambda: client.model().executor_count == 2)
            assert token_counts() == {100}
            wait_until(lambda: client.model().executor_count == 0)
            assert ask(client, 99) == 100
    except Unavailable:
        pytest.fail(autoscaler.printed)
    finally:
        autoscaler.terminate()
        wait_until(lambda: autoscaler.has_ended)
        scheduler.kill()

    assert "SIGTERM" not in autoscaler.printed  # Ray would have ended it on its own
    assert autoscaler.printed.count("has drained") >= 2
    assert "Traceback" not in autoscaler.printed
    assert "executor lost" not in scheduler.printed
