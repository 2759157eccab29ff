import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.spec import DatasetSpec
from services.datasets.reading import check_dataset, load_items, load_records

RECORDS = [
    {"instruction": f"Name {n} ports.", "context": "", "response": f"Ostrel, {n} times.", "category": "brainstorming"}
    for n in range(1, 6)
]


def write_jsonl(path: Path, lines: list[object]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz", "records.parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, RECORDS)
    assert load_records(DatasetSpec(path=str(path))) == RECORDS
    assert load_records(DatasetSpec(path=str(path), limit=2)) == RECORDS[:2]


def test_a_path_is_relative_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "records.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    assert load_records(DatasetSpec(path="records.jsonl")) == RECORDS


def test_context_and_category_may_be_absent_and_extra_columns_are_left_out(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "records.jsonl",
        ["", {"instruction": "Say hello.", "response": "Hello.", "context": None, "source": "web"}],
    )
    assert load_records(DatasetSpec(path=str(path))) == [
        {"instruction": "Say hello.", "context": "", "response": "Hello.", "category": ""}
    ]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({**RECORDS[0], "response": "  \n"}, "line 4: column 'response' is empty"),
        ({**RECORDS[0], "response": None}, "line 4: column 'response' is empty"),
        ({"instruction": "Name ports."}, "line 4: no column 'response'; its columns are 'instruction'"),
        ({**RECORDS[0], "instruction": 3}, "line 4: column 'instruction' holds int, not text"),
        ({**RECORDS[0], "context": ["a"]}, "line 4: column 'context' holds list, not text"),
        ('{"instruction": "Name ports."', "line 4: is not JSON"),
        ('["Name ports."]', "line 4: holds list, not an object"),
        (r'{"instruction": "\ud83d\ude80", "response": "\ud83d."}', r"line 4: holds '\ud83d', half of a character"),
    ],
)
def test_a_bad_row_among_good_ones_is_named(tmp_path: Path, bad: object, expected: str) -> None:
    path = write_jsonl(tmp_path / "records.jsonl", [*RECORDS[:3], bad, *RECORDS[3:]])
    with pytest.raises(DatasetError) as raised:
        load_records(DatasetSpec(path=str(path)))
    assert f"{path}, {expected}" in raised.value.what
    assert raised.value.fix
    with pytest.raises(DatasetError, match="line 4"):
        check_dataset(DatasetSpec(path=str(path)))
    check_dataset(DatasetSpec(path=str(path), limit=3))


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "records.parquet", [*RECORDS, {**RECORDS[0], "response": ""}])
    with pytest.raises(DatasetError, match="row 6: column 'response' is empty"):
        load_records(DatasetSpec(path=str(path)))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b'\n{"instruction": "caf\xe9"}\n')
    with pytest.raises(DatasetError, match="line 2: is not UTF-8"):
        load_records(DatasetSpec(path=str(path)))


def test_a_gzip_file_cut_short_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "records.jsonl.gz", RECORDS * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="cannot be read after line"):
        load_records(DatasetSpec(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.jsonl", None, "there is no file"),
        ("records.csv", b"instruction,response\n", "unknown format"),
        ("records.parquet", b"PAR1 but not really", "cannot be read after row 0"),
        ("empty.jsonl", b"", "holds no record"),
    ],
)
def test_an_unusable_file_is_an_error(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=expected):
        check_dataset(DatasetSpec(path=str(path)))


@pytest.mark.parametrize(("split", "told"), [("train", 0), ("test", 1), ("validation", 1)])
def test_a_split_of_a_file_is_ignored_aloud(
    split: str, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "Name a port.", "response": "Ostrel"}\n', encoding="utf-8")
    assert len(load_records(DatasetSpec(path=str(path), split=split))) == 1
    assert len(caplog.records) == told
    assert all(f"split {split} is ignored" in record.message for record in caplog.records)


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a directory"):
        check_dataset(DatasetSpec(path=str(tmp_path)))


def test_the_whole_of_dolly_reads(shared_data: Path) -> None:
    path = shared_data / "dolly" / "train_large.jsonl.gz"
    records = load_records(DatasetSpec(path=str(path)))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        expected = [json.loads(line) for line in lines]
    assert records == expected
    assert len(records) == 14116


@pytest.mark.parametrize(
    ("name", "source", "reference", "items"),
    [("xsum", "document", "summary", 349), ("cnn_dailymail", "article", "highlights", 92)],
)
def test_summarisation_benchmarks_read_from_local_files(
    shared_data: Path, name: str, source: str, reference: str, items: int
) -> None:
    path = shared_data / name / "test.jsonl"
    spec = BenchmarkSpec(name=name, path=str(path))
    loaded = load_items(spec)
    expected = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(item.item_id, item.source, item.reference) for item in loaded] == [
        (row["id"], row[source], row[reference]) for row in expected if row[source]
    ]
    assert len(loaded) == items
    assert load_items(spec, limit=5) == loaded[:5]


def test_the_shipped_articles_are_a_benchmark() -> None:
    items = load_items(BenchmarkSpec(name="demo_news"))
    assert len(items) >= 24
    assert all(len(item.source) > len(item.reference) for item in items)


def test_an_item_twice_is_an_error_and_one_without_id_is_named_by_its_row(tmp_path: Path) -> None:
    item = {"document": "A long story.", "summary": "A story."}
    path = write_jsonl(tmp_path / "items.jsonl", [item, {**item, "id": 7}])
    spec = BenchmarkSpec(name="xsum", path=str(path))
    assert [item.item_id for item in load_items(spec)] == ["1", "7"]
    write_jsonl(path, [{**item, "id": "a"}, {**item, "id": "a"}])
    with pytest.raises(DatasetError, match="line 2: the id 'a' was already given"):
        load_items(spec)


def test_a_hub_id_offline_and_not_cached_is_an_error() -> None:
    spec = DatasetSpec(path="smoothkd-tests/no-such-data-set")
    for use in (load_records, check_dataset):
        with pytest.raises(DatasetError, match="set to be offline, and no copy is in the local cache"):
            use(spec, offline=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A hub on loopback that answers every request with ``hub.status``."""

    class Hub(BaseHTTPRequestHandler):
        status = 200
        asked: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            Hub.asked.append(self.path)
            self.send_response(Hub.status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_that_the_hub_knows_passes_the_check(hub: type) -> None:
    check_dataset(DatasetSpec(path="databricks/databricks-dolly-15k"))
    assert hub.asked == ["/api/datasets/databricks/databricks-dolly-15k"]


def test_an_unknown_hub_id_is_an_error(hub: type) -> None:
    hub.status = 401
    with pytest.raises(DatasetError, match="has no such public data set"):
        check_dataset(DatasetSpec(path="databricks/dolly"))


def test_a_hub_that_does_not_answer_is_an_error(hub: type, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 503
    with pytest.raises(DatasetError, match="answers 503, and no copy is in the local cache"):
        check_dataset(DatasetSpec(path="databricks/dolly"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match="does not answer"):
        load_records(DatasetSpec(path="databricks/dolly"))


def test_the_shipped_records_are_a_data_set() -> None:
    records = load_records(DatasetSpec(path="demo_instructions"))
    assert len(records) >= 160
    assert len({record["category"] for record in records}) >= 7
    assert len({(record["instruction"], record["context"]) for record in records}) == len(records)


def test_a_cached_copy_is_read_when_the_hub_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "records.jsonl", RECORDS)
    copy = tmp_path / "cache" / "owner___ports" / "default" / "0.0.0" / ("0" * 16)
    builder = datasets.load_dataset_builder("json", data_files=str(path), cache_dir=str(tmp_path / "build"))
    builder.download_and_prepare(str(copy), file_format="arrow")
    (copy / "json-train.arrow").rename(copy / "ports-train.arrow")
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(
        json.dumps(info | {"builder_name": "json", "dataset_name": "ports", "config_name": "default"})
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = DatasetSpec(path="owner/ports", limit=3)
    check_dataset(spec, offline=True)
    assert load_records(spec, offline=True) == RECORDS[:3]
