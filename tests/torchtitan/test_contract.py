"""What is read of the installed torchtitan is there, and what a future one loses is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.torchtitan.installed import HAS_CONFIG_TREES
from torchtitan_tp_validate.degrees import FLAGS, TOKEN_FIELDS
from torchtitan_tp_validate.identity import MARKS, torchtitan_identity
from torchtitan_tp_validate.locate import KNOWN_RELEASES, package_folder
from torchtitan_tp_validate.releases import nearest_line, what_is_gone
from torchtitan_tp_validate.releases.contract import gone_from
from torchtitan_tp_validate.rules import RULES

CONFIG = "config/configs.py" if HAS_CONFIG_TREES else "config/job_config.py"
PARALLELISM = "ParallelismConfig" if HAS_CONFIG_TREES else "Parallelism"


@pytest.fixture
def future(tmp_path: Path) -> Path:
    """A checkout of the installed torchtitan, to be changed."""
    folder = package_folder("torchtitan")
    assert folder is not None
    shutil.copytree(folder, tmp_path / "torchtitan", ignore=shutil.ignore_patterns("__pycache__"))
    # No release any more.
    for file in (tmp_path / "torchtitan" / "models").glob("llama3/**/parallelize.py"):
        file.write_text(file.read_text(encoding="utf-8") + "\n# of the future\n", encoding="utf-8")
    return tmp_path


def change(future: Path, file: str, pattern: str, replacement: str) -> None:
    path = future / "torchtitan" / file
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
    assert count
    path.write_text(text, encoding="utf-8")


def test_everything_that_the_nearest_line_reads_is_there(future: Path) -> None:
    line, folder = nearest_line(), package_folder("torchtitan")
    assert line is not None
    assert folder is not None
    assert gone_from(line.CONTRACT, folder) == what_is_gone() == what_is_gone(future) == ()


def test_a_renamed_field_is_named_with_the_rules_that_want_it(future: Path) -> None:
    change(future, CONFIG, rf"\b{FLAGS['tp']}: int", "tensor_degree: int")
    (gone,) = what_is_gone(future)
    assert (gone.file, gone.names) == (CONFIG, (f"{PARALLELISM}.{FLAGS['tp']}",))
    assert {"TP001", "TP002", "MESH001"} <= set(gone.rules) <= {*RULES, "MESH001"}


def test_a_renamed_length_of_the_sequence_is_named(future: Path) -> None:
    # Of a line that is known, it would be that line's to have.
    (field,) = (field for field in TOKEN_FIELDS if field in (future / "torchtitan" / CONFIG).read_text())
    change(future, CONFIG, rf"\b{field}: int", "sequence: int")
    named = {name.rpartition(".")[2]: gone.rules for gone in what_is_gone(future) for name in gone.names}
    assert {"TP009", "SEQ001", "CP003"} <= set(named[field])


def test_a_parser_that_moved_is_named_and_nothing_is_validated_without_it(future: Path) -> None:
    (future / "torchtitan" / "config" / "manager.py").rename(future / "torchtitan" / "config" / "parser.py")
    (gone,) = what_is_gone(future)
    assert str(gone) == "has no config/manager.py, which is read for every rule: not validated."


def test_a_release_has_no_mark_of_what_came_after_it() -> None:
    folder, name = package_folder("torchtitan"), torchtitan_identity().name
    assert folder is not None
    newest = [mark.after for mark in MARKS if mark.is_in(folder)][-1:]
    assert name == "main" or all(after < name for after in newest)
    assert name in {*KNOWN_RELEASES, "main"}
