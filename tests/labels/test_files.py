"""Label files: bit for bit what was written, in bounded memory, and every damage named."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from services.contract.errors import InvalidInputError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    ExactLabels,
    FullLabels,
    ProjectedLabels,
    SampledLabels,
    ScoredSequence,
    TopKLabels,
    checked_positions,
    decode_labels,
    hash_sequence,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.labels import cache as cache_module
from services.labels import files as files_module
from services.labels import rows as rows_module
from services.labels.cache import LabelCache, label_key
from services.labels.files import LabelFiles, LabelWriter, import_labels
from services.labels.manifest import HEAD, MANIFEST, Manifest

REPOSITORY = Path(__file__).parents[2]
VOCAB, WIDTH = 50, 8
OPTIONS = {
    "exact": LabelOptions(),
    "top_k": LabelOptions(encoding="top_k", k=3, temperature=2.0),
    "full": LabelOptions(encoding="full"),
    "sampled": LabelOptions(encoding="sampled", draws=7, seed=2**63, temperature=0.5),
    "projected": LabelOptions(encoding="projected", student_head="ab" * 32),
}


def manifest(encoding: str = "exact", *, fingerprint: str = "f" * 32) -> Manifest:
    teacher = pb.GetTeacherResponse(
        model="a/teacher",
        fingerprint=fingerprint,
        tokenizer_fingerprint="t" * 32,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        max_length=128,
        label_dtype=pb.TENSOR_TYPE_BFLOAT16,
        special_token_ids={"eos": 2},
        probe_ids=[pb.TokenIds(ids=[1, 2, 3])],
        engine="mock",
    )
    return Manifest(teacher=teacher, options=OPTIONS[encoding], probe_texts=("a probe",))


def sequence(number: int) -> TokenSequence:
    draw = np.random.default_rng(number)
    length = int(draw.integers(3, 40))
    first = int(draw.integers(1, length))
    return TokenSequence(
        id=f"s{number}", token_ids=draw.integers(0, VOCAB, length).tolist(), label_positions=range(first, length)
    )


def scored(sequence: TokenSequence, encoding: str = "exact", *, width: int = WIDTH) -> ScoredSequence:
    draw = np.random.default_rng(len(sequence.token_ids))
    n = len(sequence.label_positions)
    labels = {
        "exact": lambda: ExactLabels(hidden_ND=draw.normal(size=(n, width)).astype(ml_dtypes.bfloat16)),
        "top_k": lambda: TopKLabels(
            ids_NK=draw.integers(0, VOCAB, (n, 3), dtype=np.int32),
            logprobs_NK=draw.normal(size=(n, 3)).astype(np.float16),
            tail_mass_N=draw.random(n, dtype=np.float32),
        ),
        "full": lambda: FullLabels(logprobs_NV=np.where(draw.random((n, VOCAB)) < 0.1, -np.inf, -1).astype(np.float16)),
        "sampled": lambda: SampledLabels(
            ids_M=draw.integers(0, VOCAB, 2 * n, dtype=np.int32),
            counts_M=draw.integers(1, 5, 2 * n).astype(np.uint8),
            lengths_N=np.full(n, 2, dtype=np.uint16),
        ),
        "projected": lambda: ProjectedLabels(embedding_NS=draw.normal(size=(n, 4)).astype(np.float16)),
    }
    return ScoredSequence(
        id=sequence.id,
        sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
        token_logprobs_P=-draw.random(n, dtype=np.float32)[checked_positions(n, encoding)],
        labels=labels[encoding](),
    )


def assert_same_bits(found: ScoredSequence, expected: ScoredSequence) -> None:
    assert found.sequence_hash == expected.sequence_hash
    assert type(found.labels) is type(expected.labels)
    arrays = {"token_logprobs_P": (found.token_logprobs_P, expected.token_logprobs_P)}
    arrays |= {name: (getattr(found.labels, name), value) for name, value in vars(expected.labels).items()}
    for name, (left, right) in arrays.items():
        if right is None:
            assert left is None
            continue
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        assert left.tobytes() == right.tobytes(), name


def write(directory: Path, numbers: range, encoding: str = "exact", **changes: str) -> None:
    with LabelWriter(directory, manifest(encoding, **changes), head=None) as writer:
        for number in numbers:
            writer.write(sequence(number), scored(sequence(number), encoding))


@pytest.mark.parametrize("encoding", OPTIONS)
def test_labels_come_back_bit_for_bit(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "GROUP_BYTES", 2000)
    monkeypatch.setattr(files_module, "SHARD_BYTES", 8000)
    write(tmp_path, range(60), encoding)
    assert len(list(tmp_path.glob("*.parquet"))) > 1
    files = LabelFiles(tmp_path)
    assert files.manifest == manifest(encoding)
    assert len(files) == len({hash_sequence(sequence(n).token_ids, sequence(n).label_positions) for n in range(60)})
    for number in random.Random(0).sample(range(60), 60):
        expected = scored(sequence(number), encoding)
        labelled = files.read(expected.sequence_hash)
        assert labelled.token_ids.tolist() == sequence(number).token_ids
        assert labelled.label_positions.tolist() == list(sequence(number).label_positions)
        assert_same_bits(labelled.scored, expected)
    assert sum(1 for _ in files) == len(files)
    assert files.read(b"0" * 32) is None
    files.close()


def test_any_reader_of_parquet_can_use_them(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    (row,) = pq.read_table(tmp_path / "labels-00000.parquet").to_pylist()
    assert row["token_ids"] == sequence(0).token_ids
    assert row["encoding"] == "exact"
    (hidden,) = row["labels"]
    assert (hidden["name"], hidden["dtype"]) == ("hidden", "bfloat16")
    array = np.frombuffer(hidden["data"], dtype=ml_dtypes.bfloat16).reshape(hidden["shape"])
    np.testing.assert_array_equal(array, scored(sequence(0)).labels.hidden_ND)


def test_the_head_comes_back_bit_for_bit(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    head = LmHead(
        weight_VD=draw.normal(size=(VOCAB, WIDTH)).astype(ml_dtypes.bfloat16),
        bias_V=draw.normal(size=VOCAB).astype(ml_dtypes.bfloat16),
        logit_scale=1 / 3,
        soft_cap=30.0,
    )
    with LabelWriter(tmp_path, manifest(), head=head):
        pass
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "all may be read by those who may read one"
    found = LabelFiles(tmp_path).lm_head()
    assert found.weight_VD.dtype == head.weight_VD.dtype
    assert found.weight_VD.tobytes() == head.weight_VD.tobytes()
    assert found.bias_V.tobytes() == head.bias_V.tobytes()
    assert (found.logit_scale, found.soft_cap) == (1 / 3, 30.0)
    content = bytearray((tmp_path / HEAD).read_bytes())
    content[-1] ^= 1
    (tmp_path / HEAD).write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"head\.safetensors is damaged"):
        LabelFiles(tmp_path).lm_head()


def test_a_second_export_adds_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    before = (tmp_path / "labels-00000.parquet").read_bytes()
    with LabelWriter(tmp_path, manifest(), head=None) as writer:
        expected = {scored(sequence(number)).sequence_hash for number in range(5)}
        assert writer.already == expected
        for number in range(3, 9):
            writer.write(sequence(number), scored(sequence(number)))
    files = LabelFiles(tmp_path)
    assert len(files) == 9
    assert sum(1 for _ in files) == 9
    assert (tmp_path / "labels-00000.parquet").read_bytes() == before
    write(tmp_path, range(9))
    assert len(list(tmp_path.glob("*.parquet"))) == 2


@pytest.mark.parametrize("other", [{"fingerprint": "g" * 32}, {"encoding": "full"}])
def test_labels_of_different_teachers_or_kinds_do_not_mix(other: dict, tmp_path: Path) -> None:
    write(tmp_path / "a", range(3))
    with pytest.raises(InvalidInputError, match="a/teacher"):
        write(tmp_path / "a", range(4), **other)
    write(tmp_path / "b", range(3), **other)
    shutil.copy(tmp_path / "b" / "labels-00000.parquet", tmp_path / "a" / "labels-00001.parquet")
    with pytest.raises(InvalidInputError, match=r"labels-00001\.parquet.*other labels"):
        LabelFiles(tmp_path / "a")


def test_labels_of_another_release_are_to_be_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is damaged: releases may tell labels apart in other ways, write other columns, or know other kinds."""
    import pyarrow as pa

    again = "Export the labels again with this release"
    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_KEY_VERSION", 99)
        write(tmp_path / "keys", range(3))
    with pytest.raises(InvalidInputError, match=r"teacher\.json was not exported by this release") as caught:
        LabelFiles(tmp_path / "keys")
    assert again in caught.value.fix
    # Of older exports the manifest does not say how they tell labels apart, but their files do.
    content = json.loads((tmp_path / "keys" / MANIFEST).read_text())
    del content["identity"]
    (tmp_path / "keys" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=r"labels-00000\.parquet holds other labels.*another release") as caught:
        LabelFiles(tmp_path / "keys")
    assert again.lower() in caught.value.fix

    write(tmp_path / "rows", range(3))
    path = tmp_path / "rows" / "labels-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("more", pa.array([1, 2, 3])), path)
    with pytest.raises(InvalidInputError, match=r"not exported by this release.*other columns") as caught:
        LabelFiles(tmp_path / "rows")
    assert again in caught.value.fix
    rows = table.to_pylist()
    for row in rows:
        row["encoding"] = "entropic"
        row["checksum"] = rows_module._checksum("entropic", row["labels"], np.float32(row["token_logprobs"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    files = LabelFiles(tmp_path / "rows")
    with pytest.raises(InvalidInputError, match=r"unknown labels in row 2 .*entropic") as caught:
        files.read(rows[1]["sequence_hash"])
    assert again in caught.value.fix


def test_two_exports_at_once_are_refused(tmp_path: Path) -> None:
    with (
        LabelWriter(tmp_path, manifest(), head=None),
        pytest.raises(InvalidInputError, match="another export"),
    ):
        LabelWriter(tmp_path, manifest(), head=None)
    write(tmp_path, range(1))


def test_an_export_killed_with_9_leaves_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom services.labels import files\n"
        "from tests.labels.test_files import manifest, scored, sequence\n"
        "files.GROUP_BYTES, files.SHARD_BYTES = 500, 20_000\n"
        "with files.LabelWriter(Path(sys.argv[1]), manifest(), head=None) as writer:\n"
        "    for number in range(100000):\n"
        "        writer.write(sequence(number), scored(sequence(number)))\n"
        "        print('.', flush=True)\n"
    )
    for seed in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(random.Random(seed).randrange(120, 400)):
            process.stdout.readline()
        process.kill()
        process.communicate()
        files = LabelFiles(tmp_path)
        assert len(files) > 20
        for labelled in files:
            assert_same_bits(labelled.scored, scored(as_sequence(labelled)))
    write(tmp_path, range(5))
    assert not list(tmp_path.glob(".labels*"))


def as_sequence(labelled) -> TokenSequence:
    return TokenSequence(id="", token_ids=labelled.token_ids.tolist(), label_positions=labelled.label_positions)


def test_no_flipped_bit_is_ever_served(tmp_path: Path) -> None:
    """Wherever one bit differs, the labels are the same or an error names the file; nothing else is raised."""
    write(tmp_path / "good", range(6))
    expected = {bytes(item.message.sequence_hash): item.scored for item in LabelFiles(tmp_path / "good")}
    content = (tmp_path / "good" / "labels-00000.parquet").read_bytes()
    draw = random.Random(1)
    refused = unnamed = 0
    bad = tmp_path / "bad"
    shutil.copytree(tmp_path / "good", bad)
    for place in [*range(8), *range(len(content) - 60, len(content)), *draw.sample(range(len(content)), 400)]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        (bad / "labels-00000.parquet").write_bytes(changed)
        try:
            for labelled in LabelFiles(bad):
                found = labelled.scored
                assert_same_bits(found, expected[found.sequence_hash])
        except InvalidInputError as error:
            refused += 1
            unnamed += "labels-00000.parquet" not in error.what
    assert unnamed == 0
    assert refused > 250


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    from services.labels.rows import SCHEMA

    write(tmp_path, range(4))
    path = tmp_path / "labels-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[2]["token_ids"][0] = (rows[2]["token_ids"][0] + 1) % VOCAB
    rows[3]["token_logprobs"][0] = -0.125
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    assert pq.read_schema(path).equals(SCHEMA)
    files = LabelFiles(tmp_path)
    hashes = [row["sequence_hash"] for row in rows]
    assert files.read(hashes[0]) is not None
    with pytest.raises(InvalidInputError, match=r"row 3 of .*labels-00000\.parquet.*tokens"):
        files.read(hashes[2])
    with pytest.raises(InvalidInputError, match=r"row 4 of .*labels-00000\.parquet.*checksum"):
        files.read(hashes[3])


@pytest.mark.parametrize("content", [b"", b"not parquet at all, but long enough to be read as such" * 9, None])
def test_a_foreign_or_cut_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    write(tmp_path, range(4))
    path = tmp_path / "labels-00000.parquet"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(InvalidInputError, match=r"labels-00000\.parquet is damaged") as caught:
        LabelFiles(tmp_path)
    assert "export" in caught.value.fix


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "teacher": {"vocab_size": "many"}}', "\x00"]
)
def test_a_manifest_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    write(tmp_path, range(1))
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InvalidInputError, match=r"teacher\.json"):
        LabelFiles(tmp_path)


def test_a_directory_without_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no label files"):
        LabelFiles(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot write label files"):
        LabelWriter(tmp_path / "file", manifest(), head=None)


def test_imported_labels_are_what_the_cache_serves(tmp_path: Path) -> None:
    write(tmp_path / "files", range(10))
    files = LabelFiles(tmp_path / "files")
    with LabelCache(tmp_path / "cache", max_bytes=2**30) as cache:
        import_labels(files, cache)
        assert cache.stats().entries == 10
        for number in range(10):
            expected = scored(sequence(number))
            key = label_key(
                fingerprint="f" * 32,
                sequence_hash=expected.sequence_hash,
                options=LabelOptions(),
                label_dtype="bfloat16",
            )
            message = pb.ScoreSequencesResponse.FromString(cache.get(key))
            assert message.id == ""
            assert_same_bits(decode_labels(message), expected)


def test_memory_is_bounded_by_a_row_group(tmp_path: Path) -> None:
    """200 MB of labels pass through a process that may hold 60 MB more than it does at the start."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport numpy as np, ml_dtypes\n"
        "from services.contract.soft_labels import ExactLabels\nfrom services.labels.files import *\n"
        "from dataclasses import replace\n"
        "from tests.labels.test_files import manifest, scored\nfrom services.contract.sequences import TokenSequence\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def item(n):\n"
        "    s = TokenSequence(id='', token_ids=[n, 1, *range(398)], label_positions=range(1, 400))\n"
        "    return s, scored(s, width=640)\n"
        "item(0); before = peak()\n"
        "with LabelWriter(Path(sys.argv[1]), manifest(), head=None) as writer:\n"
        "    for n in range(400): writer.write(*item(n))\n"
        "files = LabelFiles(Path(sys.argv[1]))\n"
        "assert sum(len(x.message.exact.hidden.data) for x in files) == 400 * 399 * 640 * 2\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 60


def test_a_label_of_other_tokens_is_not_written(tmp_path: Path) -> None:
    with LabelWriter(tmp_path, manifest(), head=None) as writer, pytest.raises(AssertionError):
        writer.write(sequence(1), replace(scored(sequence(1)), sequence_hash=b"0" * 32))
