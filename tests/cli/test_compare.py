"""``smoothkd compare`` on directories, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

from services.contract.records import Generation, Score


def write(folder: Path, *, supports: list[float], source: str = "source") -> Path:
    folder.mkdir()
    generations = [
        Generation(
            benchmark="demo_news",
            item_id=str(number),
            source=f"{source} {number}",
            reference="reference",
            output="output",
            scores={"support": support},
            spans=[],
        )
        for number, support in enumerate(supports)
    ]
    (folder / "generations.jsonl").write_text("".join(f"{one.model_dump_json()}\n" for one in generations))
    score = Score(benchmark="demo_news", metric="support", value=sum(supports) / len(supports), items=len(supports))
    (folder / "scores.json").write_text(json.dumps([score.model_dump()]))
    return folder


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "160", "MPLCONFIGDIR": "/nonexistent"},
    )


def test_directories(tmp_path: Path) -> None:
    a = write(tmp_path / "a", supports=[50.0 + number for number in range(30)])
    b = write(tmp_path / "b", supports=[54.0 + number + number % 2 for number in range(32)])
    shown = compare(a, b)
    assert shown.returncode == 0, shown.stderr
    assert "demo_news  Support  64.50  69.00  +4.50" in shown.stdout
    assert "30 items on both sides; left out 0 that only A has and 2 that only B has." in shown.stdout
    assert f"{b} makes up less than {a}, by Support of demo_news (+4.50" in shown.stdout
    found = json.loads(compare(a, b, "--json").stdout)
    assert (found["items"], found["differences"][0]["difference"]) == (30, 4.5)


def test_values_by_different_judges_are_not_compared(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / name, supports=[50.0 + step + number for number in range(30)])
        for step, name in ((0, "a"), (9, "b"))
    ]
    for folder, encoder, idf, length in ((folders[0], "one", "2", 64), (folders[1], "one", "3", 128)):
        judged_by = {"support of xsum": encoder, "support of demo_news": idf}
        subject = {"model": folder.name, "max_new_tokens": length, "judged_by": judged_by}
        (folder / "evaluated.json").write_text(json.dumps(subject))
    shown = compare(*folders)
    assert shown.returncode == 0, shown.stderr
    assert f"demo_news Support: – ({folders[0]} has it by 2, {folders[1]} by 3)" in shown.stdout
    assert "No measure of faithfulness is on both sides." in shown.stdout
    assert f"Outputs of {folders[0]} have up to 64 tokens, those of {folders[1]} up to 128" in shown.stdout
    (folders[1] / "evaluated.json").write_text((folders[0] / "evaluated.json").read_text())
    shown = compare(*folders)
    assert "+9.00" in shown.stdout
    assert "up to" not in shown.stdout
    for text in ("{", "null", json.dumps({"model": "x", "max_new_tokens": 3, "judged_by": []})):
        (folders[1] / "evaluated.json").write_text(text)
        broken = compare(*folders)
        assert broken.returncode == 2
        assert "evaluated.json does not say whose outputs lie beside it" in broken.stderr
        assert "Traceback" not in broken.stderr


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a", supports=[50.0, 60.0])
    other = write(tmp_path / "b", supports=[50.0, 60.0], source="another")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, complaint in (
        (other, "2 of 2 items have another source or reference"),
        (empty, "has no generations.jsonl: it holds no finished evaluation"),
        (tmp_path / "nothing", "there is no directory"),
    ):
        shown = compare(a, name)
        assert shown.returncode == 2
        assert complaint in shown.stderr
        assert "Traceback" not in shown.stderr
    (other / "generations.jsonl").write_text('{"broken\n')
    assert "generations.jsonl, line 1 is no generation" in compare(a, other).stderr
