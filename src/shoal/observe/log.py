"""Logs: one event per line, for people on a terminal or for programs as JSON.

Whoever starts a process calls `set_up_logs` once and hands loggers on.  Prompts and answers are not logged: fields
with their names are dropped on the way out, so that a careless call does not leak what a user wrote (ADR 12).
"""

import logging
from enum import StrEnum
from typing import TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from shoal.errors import SettingsError

PRIVATE_FIELDS = frozenset(
    {"prompt", "messages", "content", "text", "answer", "completion", "token_ids", "tokens", "tensors"}
)
WITHHELD = "(withheld)"


class LogStyle(StrEnum):
    """For whom lines are written."""

    CONSOLE = "console"
    JSON = "json"


def set_up_logs(stream: TextIO, style: LogStyle = LogStyle.CONSOLE, level: str = "info") -> FilteringBoundLogger:
    """Make and return this process's logger, writing to *stream*; raises SettingsError for an unknown level."""
    numeric = logging.getLevelNamesMapping().get(level.upper())
    if numeric is None:
        raise SettingsError(f"no log level {level!r}", hint="use debug, info, warning or error", param="log_level")
    render: Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if style is LogStyle.CONSOLE
        else structlog.processors.JSONRenderer()
    )
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            withhold,
            render,
        ],
    )
    return logger


def withhold(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace the values of private fields."""
    return {name: WITHHELD if name in PRIVATE_FIELDS else value for name, value in event.items()}
