"""The process of a rank but the first: computes what rank 0 tells it to, and ends with it."""

import json
import sys
from multiprocessing.connection import Connection

import structlog

from common.logs import configure_logs
from executor_svc.config import ExecutorConfig
from executor_svc.ranks.lifetime import end_with_rank_0


def main() -> None:
    """Follow rank 0, which is at the other end of the line whose number is the last word of the command."""
    connection = Connection(int(sys.argv[-1]))
    said = end_with_rank_0(connection)
    introduction = json.loads(said.get())
    rank, port = introduction["rank"], introduction["port"]
    configure_logs("executor", "warning")  # what goes well, rank 0 says
    structlog.contextvars.bind_contextvars(rank=rank)
    from executor_svc.ranks.follower import follow

    follow(rank, port, ExecutorConfig(**introduction["config"]), said, connection)


if __name__ == "__main__":
    main()
