"""Logs of every service: structlog, lines for people on a terminal, JSON everywhere else, always on stderr."""

import logging
import sys

import structlog


def configure_logs(service: str, level: str = "info") -> None:
    """Set up structlog for this process; `service` stands in every line. `level` as in `logging`.

    Tracebacks have no local variables, on a terminal neither: prompts are among them.
    """
    pretty = sys.stderr.isatty()
    for_people = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer = for_people if pretty else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not pretty),
            structlog.processors.format_exc_info if not pretty else _unchanged,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=service)


def _unchanged(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return event
