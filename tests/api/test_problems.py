"""Every refusal is problem+json and says what to do."""

import logging
from collections.abc import Callable

import httpx
import pytest
from pydantic import SecretStr

from services.api.body import MAX_BODY_BYTES
from services.contract.api_client import ApiClient
from services.contract.errors import (
    ApiUnavailableError,
    AuthenticationError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    SmoothKDError,
    SpecError,
)
from services.contract.problems import ProblemDetails, describe, revive
from services.contract.spec import SweepSpec
from services.store.store import Store

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "reason"),
    [
        ("GET", "/nowhere", {}, 404, "not_found"),
        ("GET", "/v1/sweeps/sw-none", {}, 404, "not_found"),
        ("DELETE", "/v1/sweeps", {}, 405, "invalid_input"),
        ("GET", "/v1/sweeps?limit=many", {}, 422, "invalid_input"),
        ("GET", "/v1/sweeps?limit=0", {}, 422, "invalid_input"),
        ("GET", "/v1/sweeps?cursor=nonsense", {}, 422, "invalid_input"),
        ("POST", "/v1/sweeps", {"content": "{", "headers": JSON}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": "[" * 100_000, "headers": JSON}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": '{"name": NaN}', "headers": JSON}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": '{"name": "a", "name": "b"}', "headers": JSON}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": b"\xff", "headers": JSON}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": "a: [", "headers": {"Content-Type": "text/yaml"}}, 422, "invalid_spec"),
        ("POST", "/v1/sweeps", {"content": "name: x"}, 415, "unsupported"),
        ("POST", "/v1/sweeps", {"data": {"name": "x"}}, 415, "unsupported"),
        ("POST", "/v1/sweeps:validate", {"content": "{}", "headers": JSON}, 422, "invalid_spec"),
    ],
)
def test_refusals(api: ApiClient, method: str, path: str, options: dict[str, object], status: int, reason: str) -> None:
    response = httpx.request(method, api.url + path, **options)  # type: ignore[arg-type]
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = ProblemDetails.model_validate_json(response.content)
    assert (response.status_code, problem.status, problem.reason) == (status, status, reason)
    assert problem.type == f"urn:smoothkd:problem:{reason}"
    assert problem.instance == path.partition("?")[0]
    assert problem.title
    assert problem.detail
    assert problem.fix
    assert ("Allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("key", ["", "k" * 201])
def test_an_idempotency_key_has_a_length(api: ApiClient, spec: SweepSpec, key: str) -> None:
    headers = JSON | {"Idempotency-Key": key}
    response = httpx.post(f"{api.url}/v1/sweeps", content=spec.model_dump_json(), headers=headers)
    assert response.status_code == 422
    assert "header.Idempotency-Key" in response.json()["detail"]


def test_a_large_body_is_refused(api: ApiClient, store: Store) -> None:
    body = b'{"name": "' + b"x" * MAX_BODY_BYTES + b'"}'

    def chunks() -> object:
        yield from (body[place : place + 65536] for place in range(0, len(body), 65536))

    for content in (body, chunks()):
        response = httpx.post(f"{api.url}/v1/sweeps", content=content, headers=JSON)  # type: ignore[arg-type]
        problem = ProblemDetails.model_validate_json(response.content)
        assert (response.status_code, problem.reason) == (413, "limit_exceeded")
        assert str(MAX_BODY_BYTES) in problem.detail


def test_an_unknown_error_stays_in_the_log(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(Store, "sweeps", broken)
    with caplog.at_level(logging.ERROR):
        response = httpx.get(f"{api.url}/v1/sweeps")
    problem = ProblemDetails.model_validate_json(response.content)
    assert (response.status_code, problem.reason) == (500, "internal")
    assert "secret" not in response.text
    assert problem.details["number"] in caplog.text
    assert caplog.text.count("ZeroDivisionError: the secret of the house") == 1


def test_a_key_is_wanted_everywhere_but_for_health(serve: Callable[..., str], spec: SweepSpec) -> None:
    url = serve(api_key=SecretStr("right"))
    for key in (None, "wrong", "rightt", "röng"):
        response = httpx.get(f"{url}/v1/sweeps", headers=_bearer(key))
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert httpx.post(f"{url}/v1/sweeps", headers=_bearer(key)).status_code == 401
    with pytest.raises(AuthenticationError, match="has none"), ApiClient(url) as client:
        client.sweeps()
    with ApiClient(url, SecretStr("right")) as client:
        assert client.submit_sweep(spec).id == client.sweeps().items[0].id
        assert list(client.runs(client.sweeps().items[0].id).items)
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").status_code == 200
    # With a key it may go by any name.
    assert httpx.get(f"{url}/v1/sweeps", headers=_bearer("right") | {"Host": "api.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Host": "attacker.example:8440"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Host": "127.0.0.1@attacker.example"},
        {"Host": ""},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
    ],
)
def test_a_foreign_page_gets_nothing_from_loopback(api: ApiClient, headers: dict[str, str]) -> None:
    assert httpx.get(f"{api.url}/v1/sweeps", headers=headers).status_code == 403
    assert httpx.post(f"{api.url}/v1/sweeps/sw-1/cancel", headers=headers).status_code == 403
    assert httpx.get(f"{api.url}/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{"Host": "localhost:1"}, {"Host": "[::1]"}, {"Origin": "http://127.0.0.1:8441"}])
def test_loopback_by_any_of_its_names(api: ApiClient, headers: dict[str, str]) -> None:
    assert httpx.get(f"{api.url}/v1/sweeps", headers=headers).status_code == 200


def test_errors_survive_the_wire() -> None:
    classes = [SmoothKDError]
    for error_class in classes:
        if error_class.__module__ == "services.contract.errors":
            classes.extend(error_class.__subclasses__())
            error = error_class("what", fix="fix", details={"a": "b"})
            again = revive(ProblemDetails.model_validate_json(describe(error, instance="/x").model_dump_json()))
            assert (type(again), again.what, again.fix, again.details) == (error_class, "what", "fix", {"a": "b"})


def test_the_client_says_what_to_do_when_nothing_answers(api: ApiClient) -> None:
    with pytest.raises(ApiUnavailableError, match="smoothkd up"), ApiClient("http://127.0.0.1:1") as client:
        client.sweeps()
    with pytest.raises(ApiUnavailableError, match="SMOOTHKD_API_URL"), ApiClient("nonsense") as client:
        client.sweeps()
    with pytest.raises(SmoothKDError, match="not as this release"), ApiClient(f"{api.url}/v1/docs?") as client:
        client.sweeps()


def test_refusals_reach_the_client_as_their_own_errors(api: ApiClient) -> None:
    cases: list[tuple[type[SmoothKDError], Callable[[], object]]] = [
        (SpecError, lambda: api.submit_yaml("name: [")),
        (LimitExceededError, lambda: api.submit_yaml("#" * (MAX_BODY_BYTES + 1))),
        (NotFoundError, lambda: api.sweep("sw-none")),
        (NotFoundError, lambda: api.sweep("../../healthz")),
        (InvalidInputError, lambda: api.sweeps(limit=0)),
    ]
    for error_class, ask in cases:
        with pytest.raises(error_class) as caught:
            ask()
        assert type(caught.value) is error_class
        assert caught.value.fix


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}".encode()} if key else {}  # type: ignore[dict-item]
