"""What the pages say of the package is what the package says."""

from __future__ import annotations

import csv
import re
from collections import Counter

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks, parameters, python
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.locate import KNOWN_RELEASES
from torchtitan_tp_validate.rehearsal.truth.layouts import read_rows
from torchtitan_tp_validate.rehearsal.truth.set_ups import read
from torchtitan_tp_validate.rules import RULES

README = ROOT / "README.md"
TRUTH = ROOT / "tests" / "truth"
EXAMPLES = [block for block in blocks("python") if block.shown]
needs_torchtitan = pytest.mark.requires(torchtitan=("0.", "main"))


@pytest.mark.parametrize("block", parameters(EXAMPLES))
def test_a_python_example_prints_what_is_shown(block: Block) -> None:
    result = python(block.text)
    assert result.stdout == block.shown, result.stderr


def test_there_are_python_examples_with_output() -> None:
    assert {block.page.name for block in EXAMPLES} == {"README.md", "kv-replication.md"}


@needs_torchtitan
def test_install_is_called_as_the_readme_says() -> None:
    example = next(block.text for block in blocks("python") if ".install()" in block.text)
    check = "assert torchtitan_tp_validate.installed().guarded\ntorchtitan_tp_validate.uninstall()\n"
    result = python(example + check)
    assert result.returncode == 0, result.stderr


@needs_torchtitan
def test_the_drop_ins_are_imported_as_the_readme_says() -> None:
    example = next(block.text for block in blocks("python") if "wrappers.llama3" in block.text)
    imported = 0
    for line in example.splitlines():
        result = python(line)
        imported += result.returncode == 0
        assert result.returncode == 0 or f"torchtitan {torchtitan_identity().name} has no" in result.stderr
    assert imported == 3  # llama4 or qwen3_5_moe is missing, whichever the line


def test_the_readme_is_read_in_three_minutes_and_shown_whole_on_pypi() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 7168
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https://)([^)#]*)(?:#[\w-]*)?\)", text):
            assert not link or (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:docs|scripts|tests|patches)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_readme_names_every_rule_and_every_release() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(?:TP|EP|FSDP)\d{3}\b", text)) == set(RULES)
    assert set(re.findall(r"\b0\.\d\.\d\b", text.partition("| supported |")[2])) == KNOWN_RELEASES


def judgements(table: str) -> Counter[str]:
    """How often each judgement was recorded; cases that fail at TP = 1 too have none."""
    with (ROOT / "tests" / "truth" / table).open(encoding="utf-8", newline="") as stream:
        counted = Counter(row["judgement"] for row in csv.DictReader(stream))
    counted.pop("invalid", None)
    return counted


def counts(page: str, row: str) -> list[int]:
    """The numbers in the table row that begins so."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^\| {row}[^|]*((?: \| *\d+)+) \|$", text, flags=re.MULTILINE)
    return list(map(int, shown.split(" | ")[1:]))


@pytest.mark.parametrize("release", ["0.2.2", "0.3.0"])
def test_the_counts_of_the_truth_are_those_that_were_recorded(release: str) -> None:
    seen = judgements(f"truth-{release}.csv")
    columns = ("agreed", "refused by decision", "false refusal", "miss")
    assert counts("truth.md", f"torchtitan {release}") == [seen.total(), *(seen[name] for name in columns)]

    table = f"replication-{release}.csv"
    seen = judgements(table)
    columns = ("agreed", "false refusal", "miss")
    row = rf"\[[^|]*{re.escape(table)}"
    assert counts("kv-replication.md", row) == [seen.total(), *(seen[name] for name in columns)]


def test_the_readme_says_how_many_cases_were_recorded() -> None:
    releases = ("0.2.2", "0.3.0")
    trained = sum(judgements(f"truth-{release}.csv").total() for release in releases)
    trained += sum(len(read_rows(table)) for table in TRUTH.glob("layouts-*.csv"))
    set_up = sum(len(read(table)) for table in TRUTH.glob("set-ups-*.csv"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    said = (
        f"{trained:,} recorded runs were compared with one process, {set_up:,} with torchtitan's own set-up"
    )
    assert said in text


def test_the_pages_are_those_that_the_readme_names() -> None:
    named = set(re.findall(r"`docs/([\w-]+\.md)`", README.read_text(encoding="utf-8")))
    assert named == {page.name for page in PAGES if page.parent.name == "docs"}


def test_the_table_of_the_rules_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    between = r"^<!-- begin: tp-validate rules --output-format markdown -->\n\n(.*)\n<!-- end"
    (shown,) = re.findall(between, text, flags=re.MULTILINE | re.DOTALL)
    assert main(["rules", "--output-format", "markdown"]) == 0
    assert capsys.readouterr().out == shown
