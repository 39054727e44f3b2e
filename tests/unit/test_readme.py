"""What the README shows is what happens."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.unit.optional import needs_qwen3_5

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
only_0_3 = pytest.mark.skipif(
    not version("torchtitan").startswith("0.3"), reason="the README shows torchtitan 0.3"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def assert_shows(shown: str, real: str) -> None:
    """Every part between ``[...]`` is in ``real``, in order."""
    position = 0
    for part in shown.split("[...]\n"):
        found = real.find(part, position)
        assert found >= 0, f"the README shows\n{part}\nbut the real output is\n{real}"
        position = found + len(part)


@only_0_3
@needs_qwen3_5
def test_the_quickstart_prints_what_the_readme_shows() -> None:
    result = subprocess.run(
        [ROOT / "scripts" / "quickstart"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_shows(blocks("text")[0], result.stdout)


@only_0_3
def test_the_python_examples_print_what_the_readme_shows() -> None:
    examples = re.findall(r"```python\n([^`]*)```\n\n```text\n([^`]*)```", README)
    assert len(examples) == 2
    for example, shown in examples:
        result = subprocess.run(
            [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.stdout == shown, result.stderr


def test_install_is_called_as_the_readme_says() -> None:
    example = next(block for block in blocks("python") if ".install()" in block)
    check = "assert torchtitan_tp_validate.installed().guarded\ntorchtitan_tp_validate.uninstall()\n"
    subprocess.run([sys.executable, "-c", example + check], cwd=ROOT, check=True, timeout=120)


def test_the_drop_ins_are_imported_as_the_readme_says() -> None:
    example = next(block for block in blocks("python") if "wrappers.llama3" in block)
    imported = 0
    for line in example.splitlines():
        result = subprocess.run(
            [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        imported += result.returncode == 0
        assert result.returncode == 0 or f"torchtitan {version('torchtitan')} has no" in result.stderr
    assert imported == 3  # llama4 or qwen3_5_moe is missing, whichever the line


def test_the_codes_in_the_readme_are_the_codes_of_the_engine() -> None:
    from torchtitan_tp_validate.rules import RULES

    rows = re.findall(r"^\| ([A-Z]+\d+) \|.*?`(\w+)`", README, flags=re.MULTILINE)
    assert rows == [(rule.code, rule.dim) for rule in RULES.values()]


def judgements(table: str) -> Counter[str]:
    """How often each judgement was recorded; cases that fail at TP = 1 too have none."""
    with (ROOT / "tests" / "truth" / table).open(encoding="utf-8", newline="") as stream:
        counted = Counter(row["judgement"] for row in csv.DictReader(stream))
    counted.pop("invalid", None)
    return counted


@pytest.mark.parametrize("release", ["0.2.2", "0.3.0"])
def test_the_counts_of_the_truth_are_those_that_were_recorded(release: str) -> None:
    numbers = r"((?: \| *\d+)+) \|$"
    (shown,) = re.findall(rf"^\| torchtitan {release}[^|]*{numbers}", README, flags=re.MULTILINE)
    seen = judgements(f"truth-{release}.csv")
    columns = ("agreed", "refused by decision", "false refusal", "miss")
    assert list(map(int, shown.split(" | ")[1:])) == [seen.total(), *(seen[name] for name in columns)]

    table = f"replication-{release}.csv"
    (shown,) = re.findall(rf"^\| \[[^|]*{re.escape(table)}[^|]*{numbers}", README, flags=re.MULTILINE)
    seen = judgements(table)
    columns = ("agreed", "false refusal", "miss")
    assert list(map(int, shown.split(" | ")[1:])) == [seen.total(), *(seen[name] for name in columns)]
