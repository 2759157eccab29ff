"""The committed description of the API."""

import json
import re

from services.api.openapi import PATH, openapi_text
from services.contract.problems import MEDIA_TYPE


def test_the_committed_document_is_current() -> None:
    assert PATH.read_text(encoding="utf-8") == openapi_text(), "run python -m services.api.openapi"


def test_the_document_is_whole() -> None:
    document = json.loads(openapi_text())
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) == set(schemas)
    assert schemas["SweepSpec"]["required"] == ["name", "student", "dataset"]
    operations = [(path, operation) for path, item in document["paths"].items() for operation in item.values()]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations) == 22
    for path, operation in operations:
        if path.startswith("/v1/"):
            assert operation["security"] == [{"HTTPBearer": []}]
            assert list(operation["responses"]["4XX"]["content"]) == [MEDIA_TYPE]
            assert list(operation["responses"]["5XX"]["content"]) == [MEDIA_TYPE]
    body = document["paths"]["/v1/sweeps"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/yaml"}
