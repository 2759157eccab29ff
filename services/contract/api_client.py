"""The REST API from Python: one method per route, records out, the error tree raised.

Used by the command line and the dashboard, which both talk to the API over HTTP only.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import SecretStr, ValidationError

from services.contract.annotation_records import Annotation, AnnotationList, AnnotatorAgreement, NewAnnotation
from services.contract.errors import ApiUnavailableError, SmoothKDError
from services.contract.event_stream import parse_event_stream
from services.contract.problems import ProblemDetails, revive
from services.contract.records import (
    Artifact,
    ArtifactList,
    CaseStudyPage,
    GenerationPage,
    MetricList,
    MetricPoint,
    Readiness,
    Record,
    RunPage,
    RunRecord,
    Score,
    ScoreList,
    Summary,
    SweepEvent,
    SweepPage,
    SweepPlan,
    SweepRecord,
)
from services.contract.spec import SweepSpec
from services.contract.states import ENDED

RECONNECTS = 6
"""Connections in a row that ``events`` tries; with doubling waits from 0.25 s they span about 15 seconds."""

REPORT_SECONDS = 300.0

RecordT = TypeVar("RecordT", bound=Record)


class ApiClient:
    """A synchronous client of one API; usable as a context manager, safe to share between threads.

    Every method raises the error that the API met, revived from its problem details, and
    ApiUnavailableError when nothing answers at ``url``.
    """

    def __init__(self, url: str, key: SecretStr | None = None, *, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._timeout = timeout
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit_sweep(self, spec: SweepSpec, *, idempotency_key: str | None = None) -> SweepRecord:
        """Stores and queues a sweep. The same key with the same specification gives the same sweep."""
        return self._post_spec("/v1/sweeps", SweepRecord, body=_as_json(spec), idempotency_key=idempotency_key)

    def submit_yaml(self, text: str, *, idempotency_key: str | None = None) -> SweepRecord:
        """Like ``submit_sweep``, from the text of a YAML file."""
        return self._post_spec("/v1/sweeps", SweepRecord, body=_as_yaml(text), idempotency_key=idempotency_key)

    def check_sweep(self, spec: SweepSpec) -> SweepPlan:
        """Expands a sweep and checks what can be known before it runs; stores nothing."""
        return self._post_spec("/v1/sweeps:validate", SweepPlan, body=_as_json(spec))

    def check_yaml(self, text: str) -> SweepPlan:
        """Like ``check_sweep``, from the text of a YAML file."""
        return self._post_spec("/v1/sweeps:validate", SweepPlan, body=_as_yaml(text))

    def sweeps(self, *, limit: int = 50, cursor: str | None = None) -> SweepPage:
        """Newest first."""
        return self._get("/v1/sweeps", SweepPage, limit=limit, cursor=cursor)

    def sweep(self, sweep_id: str) -> SweepRecord:
        return self._get(f"/v1/sweeps/{_part(sweep_id)}", SweepRecord)

    def cancel_sweep(self, sweep_id: str) -> SweepRecord:
        """Asks a sweep to stop: what is queued will not start, what is running ends soon."""
        response = self._request("POST", f"/v1/sweeps/{_part(sweep_id)}/cancel")
        return self._read(response, SweepRecord)

    def runs(self, sweep_id: str, *, limit: int = 50, cursor: str | None = None) -> RunPage:
        """In the order of ``expand``."""
        return self._get(f"/v1/sweeps/{_part(sweep_id)}/runs", RunPage, limit=limit, cursor=cursor)

    def all_runs(self, sweep_id: str) -> list[RunRecord]:
        """Every page of ``runs``."""
        page = self.runs(sweep_id, limit=200)
        runs = list(page.items)
        while page.next_cursor:
            page = self.runs(sweep_id, limit=200, cursor=page.next_cursor)
            runs.extend(page.items)
        return runs

    def run(self, run_id: str) -> RunRecord:
        return self._get(f"/v1/runs/{_part(run_id)}", RunRecord)

    def metrics(self, run_id: str, *, names: list[str] | None = None, after_step: int = -1) -> list[MetricPoint]:
        """Ordered by name and step; ``names`` None means all of them."""
        path = f"/v1/runs/{_part(run_id)}/metrics"
        return self._get(path, MetricList, names=names, after_step=after_step).items

    def generations(
        self, run_id: str, *, benchmark: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> GenerationPage:
        path = f"/v1/runs/{_part(run_id)}/generations"
        return self._get(path, GenerationPage, benchmark=benchmark, limit=limit, cursor=cursor)

    def scores(self, run_id: str) -> list[Score]:
        return self._get(f"/v1/runs/{_part(run_id)}/scores", ScoreList).items

    def artifacts(self, run_id: str) -> list[Artifact]:
        return self._get(f"/v1/runs/{_part(run_id)}/artifacts", ArtifactList).items

    def summary(self, sweep_id: str) -> Summary:
        return self._get(f"/v1/sweeps/{_part(sweep_id)}/summary", Summary)

    def case_studies(
        self,
        sweep_id: str,
        *,
        benchmark: str | None = None,
        metric: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> CaseStudyPage:
        """Where SFT and KD differ most first, either way; ``metric`` None goes by the share of unsupported words."""
        path = f"/v1/sweeps/{_part(sweep_id)}/case-studies"
        return self._get(path, CaseStudyPage, benchmark=benchmark, metric=metric, limit=limit, cursor=cursor)

    def report(self, sweep_id: str, *, form: str = "json") -> str:
        """The sweep's report as json, md, csv, tex or html; a large sweep takes the API a while."""
        path = f"/v1/sweeps/{_part(sweep_id)}/report"
        return self._request("GET", path, params={"format": form}, timeout=REPORT_SECONDS).text

    def write_annotation(self, run_id: str, annotation: NewAnnotation) -> Annotation:
        """Replaces an earlier one of the same person on the same output."""
        path = f"/v1/runs/{_part(run_id)}/annotations"
        content, headers = annotation.model_dump_json(), {"Content-Type": "application/json"}
        return self._read(self._request("POST", path, content=content, headers=headers), Annotation)

    def annotations(self, sweep_id: str, *, annotator: str | None = None) -> list[Annotation]:
        """What people marked in the outputs of a sweep's runs."""
        path = f"/v1/sweeps/{_part(sweep_id)}/annotations"
        return self._get(path, AnnotationList, annotator=annotator).items

    def annotator_agreement(self, sweep_id: str) -> AnnotatorAgreement:
        return self._get(f"/v1/sweeps/{_part(sweep_id)}/annotations/agreement", AnnotatorAgreement)

    def lens_labels(self, sweep_id: str, *, annotator: str | None = None) -> str:
        """People's judgements as JSON lines for ``smoothkd lens train``; the majority's, or one person's."""
        given = {"annotator": annotator} if annotator is not None else {}
        return self._request("GET", f"/v1/sweeps/{_part(sweep_id)}/annotations/export", params=given).text

    def ready(self) -> Readiness:
        """Raises QueueUnavailableError or SmoothKDError naming the part that is not ready."""
        return self._get("/readyz", Readiness)

    def events(self, sweep_id: str) -> Iterator[SweepEvent]:
        """Where the sweep stands, again whenever it changed, until it has ended.

        A connection that breaks is opened again where it stopped; ApiUnavailableError after RECONNECTS
        failures in a row.
        """
        last_event_id, failures = "", 0
        while True:
            try:
                for event_id, data in self._stream(sweep_id, last_event_id):
                    last_event_id, failures = event_id, 0
                    event = SweepEvent.model_validate_json(data)
                    yield event
                    if event.state in ENDED:
                        return
                failures += 1
            except httpx.TransportError as error:
                failures += 1
                if failures == RECONNECTS:
                    raise self._unreachable(error) from error
            if failures == RECONNECTS:
                raise ApiUnavailableError(
                    f"the API at {self.url} keeps closing the events of sweep {sweep_id}", fix="See the API's log."
                )
            time.sleep(0.25 * 2**failures)

    def _stream(self, sweep_id: str, last_event_id: str) -> Iterator[tuple[str, str]]:
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        path = f"/v1/sweeps/{_part(sweep_id)}/events"
        # The API sends a comment every 15 seconds, so silence for a minute is a dead connection.
        timeout = httpx.Timeout(self._timeout, read=60.0)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
            self._raise_for(response)
            yield from parse_event_stream(response.iter_lines())

    def _get(self, path: str, record: type[RecordT], **query: Any) -> RecordT:
        given = {name: value for name, value in query.items() if value is not None}
        return self._read(self._request("GET", path, params=given), record)

    def _post_spec(
        self, path: str, record: type[RecordT], *, body: dict[str, Any], idempotency_key: str | None = None
    ) -> RecordT:
        headers = {**body["headers"], "Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._read(self._request("POST", path, content=body["content"], headers=headers), record)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._translated():
            try:
                response = self._http.request(method, path, **options)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A kept-alive connection that the server has closed. Every request here may be sent twice:
                # GET, cancel and annotations change nothing the second time; a specification has its Idempotency-Key.
                response = self._http.request(method, path, **options)
        self._raise_for(response)
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ApiUnavailableError(
                f"{self.url} is no address of an API: {error}", fix="Set SMOOTHKD_API_URL, e.g. http://127.0.0.1:8440."
            ) from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> ApiUnavailableError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return ApiUnavailableError(
                f"the API at {self.url} did not answer in time", fix="See its log, and GET /readyz; then try again."
            )
        return ApiUnavailableError(
            f"no API answers at {self.url} ({error})",
            fix="Start everything with `smoothkd up`, or the API alone with `smoothkd api`; "
            "if it runs elsewhere, set SMOOTHKD_API_URL.",
        )

    def _raise_for(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            problem = ProblemDetails.model_validate_json(response.content)
        except ValidationError:
            raise self._not_an_api(f"status {response.status_code} without problem details") from None
        raise revive(problem)

    def _read(self, response: httpx.Response, record: type[RecordT]) -> RecordT:
        try:
            return record.model_validate_json(response.content)
        except ValidationError as error:
            raise self._not_an_api(f"a body that is no {record.__name__}: {error.errors()[0]['msg']}") from error

    def _not_an_api(self, answer: str) -> SmoothKDError:
        return SmoothKDError(
            f"{self.url} answers, but not as this release of the smoothkd API does: {answer}",
            fix="Check SMOOTHKD_API_URL, and that API and client are of the same release.",
        )


def _as_json(spec: SweepSpec) -> dict[str, Any]:
    return {"content": spec.model_dump_json(), "headers": {"Content-Type": "application/json"}}


def _as_yaml(text: str) -> dict[str, Any]:
    return {"content": text.encode(), "headers": {"Content-Type": "application/yaml"}}


def _part(identifier: str) -> str:
    return quote(identifier, safe="")
