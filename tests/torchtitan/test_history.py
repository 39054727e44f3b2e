"""The judge of torchtitan's history: the installed release is judged right, and a planted fault is found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.core.fake_torchtitan import ROOT
from tests.forked import in_forks, run_module

pytestmark = in_forks

JUDGE = ROOT / "scripts" / "judge_tree.py"
PROGRAM = """
import runpy
from torchtitan_tp_validate.plan import Split
{fault}
runpy.run_path({judge!r}, run_name="__main__")
"""


def judged(folder: Path, *models: str, fault: str = "") -> list[dict[str, Any]]:
    (folder / "judge.py").write_text(PROGRAM.format(fault=fault, judge=str(JUDGE)), encoding="utf-8")
    out = folder / "judged.jsonl"
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ended = run_module("judge", [str(out), "--models", *models], out=folder, cwd=folder, env=env)
    assert ended.returncode == 0, ended
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_the_release_is_judged_right_and_the_guards_come_out(tmp_path: Path) -> None:
    *flavors, last = judged(tmp_path, "flux", "llama3", "qwen3")
    assert len(flavors) > 10
    for flavor in flavors:
        # Without a package some flavors cannot be built; else all 64 degrees are right.
        assert not flavor["wrong"], flavor
        assert flavor["right"] == 64 or any("No module named" in reason for reason in flavor["open"]), flavor
    assert sum(flavor["right"] == 64 for flavor in flavors) > 10
    assert last["guards"]["guarded"] >= 2
    assert last["guards"]["missed"] == last["guards"]["left"] == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("Split.allows = lambda *_: True", "TP 3 is accepted: "),
        ("Split.allows = lambda *_: False", "TP 2 is refused: the tree can share everything"),
        ("Split.allows = lambda *_: 1 // 0", "there is no verdict: ZeroDivisionError"),
    ],
)
def test_a_wrong_verdict_is_found(fault: str, said: str, tmp_path: Path) -> None:
    debugmodel, *_ = judged(tmp_path, "llama3", fault=fault)
    assert debugmodel["flavor"] == "llama3 debugmodel"
    assert debugmodel["wrong"][0].startswith(said), debugmodel
