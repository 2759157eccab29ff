"""Labels from a judge that answers over real HTTP."""

import json
from pathlib import Path

import pytest

from services.contract.errors import ApiUnavailableError, AuthenticationError, InvalidInputError
from services.evaluation.lookback.judge import Judge, judge_summaries
from services.evaluation.lookback.labels import LabelledSummary, read_labels
from tests.evaluation.lookback.fake_judge import serve_judge

DOCUMENT = "Fourteen ferries of Ostrel were repaired."


def unlabelled(*summaries: str) -> list[LabelledSummary]:
    return [LabelledSummary(document=DOCUMENT, summary=summary, labelled=False) for summary in summaries]


def test_the_judges_parts_become_spans(tmp_path: Path) -> None:
    answers = [
        '```json\n{"unsupported": ["Forty ferries", "of ostrel", "in May"]}\n```',
        '{"unsupported": []}',
        "I cannot say.",
    ]
    items = unlabelled("Forty ferries of Ostrel sank.", "Ferries were repaired.", "They sank.")
    done = LabelledSummary(document=DOCUMENT, summary="Done.", spans=((0, 4),))
    out = tmp_path / "labels" / "out.jsonl"
    with serve_judge(answers) as server:
        judged = judge_summaries([*items, done], Judge(url=server.url, model="m", api_key="k"), out=out)
    assert [item.labelled for item in judged.summaries] == [True, True, False, True]
    assert judged.summaries[0].spans == ((0, 13), (14, 23))
    assert judged.summaries[3] is done
    assert (judged.unusable, judged.not_found) == (1, 1)
    assert read_labels(out) == judged.summaries[:2]
    assert server.keys == ["Bearer k"] * 3
    request = server.requests[0]
    assert request["model"] == "m"
    assert DOCUMENT in request["messages"][0]["content"]
    assert "Forty ferries of Ostrel sank." in request["messages"][0]["content"]


def test_labels_so_far_survive_a_judge_that_falls_silent(tmp_path: Path) -> None:
    items = unlabelled("One.", "Two.")
    out = tmp_path / "out.jsonl"
    with serve_judge(['{"unsupported": ["One"]}', 503, 429, 500, 502, 503]) as server:
        judge = Judge(url=server.url, model="m", pause=0)
        with pytest.raises(ApiUnavailableError, match="no answer in 5 attempts: status 503"):
            judge_summaries(items, judge, out=out)
        server.answers += [503, '{"unsupported": ["Two"]}']
        judged = judge_summaries(items, judge, out=out)
    assert [item.spans for item in judged.summaries] == [((0, 3),), ((0, 3),)]
    assert len(server.requests) == 8
    assert [json.loads(line)["summary"] for line in out.read_text().splitlines()] == ["One.", "Two."]


def test_a_label_that_was_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    items = unlabelled("One.", "Two.")
    out = tmp_path / "out.jsonl"
    with serve_judge(['{"unsupported": ["One"]}', '{"unsupported": ["Two"]}', '{"unsupported": ["Two"]}']) as server:
        judge = Judge(url=server.url, model="m", pause=0)
        whole = judge_summaries(items, judge, out=out)
        # As after kill -9 while the second was written.
        out.write_bytes(out.read_bytes()[:-20])
        assert judge_summaries(items, judge, out=out) == whole
    assert len(server.requests) == 3
    assert read_labels(out) == whole.summaries


@pytest.mark.parametrize(("status", "error"), [(401, AuthenticationError), (404, InvalidInputError)])
def test_a_refusal_ends_at_once(tmp_path: Path, status: int, error: type[Exception]) -> None:
    with serve_judge([status]) as server, pytest.raises(error, match=server.url):
        judge_summaries(unlabelled("One."), Judge(url=server.url, model="m"), out=tmp_path / "out.jsonl")
    assert len(server.requests) == 1


def test_an_absent_judge_is_named(tmp_path: Path) -> None:
    judge = Judge(url="http://127.0.0.1:9", model="m", pause=0)
    with pytest.raises(ApiUnavailableError, match=r"127\.0\.0\.1:9"):
        judge_summaries(unlabelled("One."), judge, out=tmp_path / "out.jsonl")
