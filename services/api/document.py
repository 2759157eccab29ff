"""What the OpenAPI document says beyond what FastAPI reads off the routes: bodies, events, problems."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.contract.problems import MEDIA_TYPE, ProblemDetails
from services.contract.records import SweepEvent
from services.contract.report_records import Report

_REFERENCE = "#/components/schemas/{model}"


def reference(record: type[BaseModel]) -> dict[str, str]:
    """Where the document holds a record's schema."""
    return {"$ref": _REFERENCE.format(model=record.__name__)}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {MEDIA_TYPE: {"schema": reference(ProblemDetails)}}}
    for status, text in {"4XX": "The request cannot be met.", "5XX": "A part of the platform failed."}.items()
}
"""Answers of every route."""


def complete_document(app: FastAPI) -> None:
    """Adds the schemas that ``app``'s document refers to and no route returns."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _, extra = models_json_schema(
            [(record, "validation") for record in (ProblemDetails, SweepEvent, Report)], ref_template=_REFERENCE
        )
        document["components"]["schemas"].update(extra["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
