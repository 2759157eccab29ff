"""How services log: one line per event on stderr, for people or as JSON for whatever collects logs."""

import json
import logging
import logging.config
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_fields: ContextVar[dict[str, str]] = ContextVar("log fields", default={})  # noqa: B039 - never changed in place
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure_logging(log_format: LogFormat, *, levels: dict[str, str]) -> None:
    """Log to stderr; ``levels`` by logger name, "" is the root's."""
    logging.config.dictConfig(logging_config(log_format, levels=levels))


def logging_config(log_format: LogFormat, *, levels: dict[str, str]) -> dict[str, Any]:
    """The same as ``logging.config.dictConfig`` takes it."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"text": {"format": _TEXT}, "json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": log_format}},
        "root": {"level": levels.get("", "INFO"), "handlers": ["stderr"]},
        "loggers": {name: {"level": level} for name, level in levels.items() if name},
    }


@contextmanager
def log_fields(**fields: str) -> Iterator[None]:
    """Every JSON line from within the block, and from tasks that it starts, carries these fields."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message; then log_fields and ``extra``; trace_id and span_id where a span
    is current; exception where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields.get(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
            **_current_span(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _current_span() -> dict[str, str]:
    try:
        from opentelemetry import trace
    except ImportError:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
