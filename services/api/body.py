"""A sweep out of a request's body, JSON or YAML, within limits."""

import json
from typing import Any, NoReturn

from fastapi import Request

from services.api.document import reference
from services.contract.errors import LimitExceededError, SpecError, UnsupportedError
from services.contract.spec import SweepSpec
from services.contract.spec_reading import parse_sweep, read_yaml

MAX_BODY_BYTES = 1 << 20
JSON = ("application/json",)
YAML = ("application/yaml", "application/x-yaml", "text/yaml")

SWEEP_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            media_type: {"schema": reference(SweepSpec)} for media_type in ("application/json", "application/yaml")
        },
    }
}
"""What the OpenAPI document says about the body that ``read_sweep`` reads."""


class BodyTooLargeError(LimitExceededError):
    """The request's body is larger than the API takes."""

    http_status = 413


class MediaTypeError(UnsupportedError):
    """The request's body is of a type that the API does not read."""

    http_status = 415


async def read_sweep(request: Request) -> SweepSpec:
    """The body as a sweep. SpecError, LimitExceededError or UnsupportedError says what is wrong with it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in JSON + YAML:
        raise MediaTypeError(
            f"a sweep comes as JSON or YAML, not as {media_type or 'a body without Content-Type'}",
            fix="Send Content-Type: application/json or application/yaml.",
        )
    try:
        text = (await _read_body(request)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"the body is not UTF-8: {error}", fix="Save the specification as UTF-8.") from None
    return parse_sweep(read_json(text) if media_type in JSON else read_yaml(text, source="the body"))


def read_json(text: str) -> object:
    """The plain data of a JSON text; SpecError where it does not parse, or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the body is not JSON: {error}", fix="Mend it at the place named above.") from None


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLargeError(
                f"the body is larger than {MAX_BODY_BYTES} bytes",
                fix="A sweep names its data set and models and does not hold them; split a larger grid.",
            )
    return bytes(body)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
