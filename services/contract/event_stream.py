"""Server-sent events, as text."""

from collections.abc import Iterator


def parse_event_stream(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(last event id, data) of each event in a text/event-stream.

    Source: WHATWG HTML, section 9.2.6. Comments and event names are dropped; ``lines`` come without their ends.
    """
    event_id = ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield event_id, "\n".join(data)
            data = []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            event_id = value
