"""The OpenAPI document: ``python -m services.api.openapi`` writes docs/openapi.json."""

import json
from pathlib import Path
from typing import cast

from services.api.app import create_app
from services.contract.settings import Settings
from services.store.queue import Queue
from services.store.store import Store

PATH = Path(__file__).parents[2] / "docs" / "openapi.json"


def openapi_text() -> str:
    """The document as it is committed; the same on every machine."""
    # A description asks nothing of store and queue.
    app = create_app(Settings(api_host="127.0.0.1"), cast(Store, None), cast(Queue, None))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(openapi_text(), encoding="utf-8")
