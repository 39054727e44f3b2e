"""The patched torchtitan: its own tests, its verdicts beside ours, and real runs without us."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.forked import in_forks, run_module, run_torchrun
from tests.patches.trees import RELEASE, ROOT
from torchtitan_tp_validate.rehearsal.models import installed_line

pytestmark = in_forks
IS_0_2 = RELEASE.startswith("0.2")
NAMES = {"llama3": "Llama 3", "llama4": "Llama 4", "qwen3": "Qwen3", "qwen3_5": "Qwen3.5"}


def environment(patched: Path) -> dict[str, str]:
    path = [str(patched), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}


def test_the_patchs_own_tests_pass(patched: Path, tmp_path: Path) -> None:
    words = ["-q", "-p", "no:cacheprovider", "tests/unit_tests"]
    env = {**environment(patched), "PYTHONPATH": str(patched)}
    result = run_module("pytest", words, out=tmp_path, cwd=patched, env=env)
    assert result.returncode == 0, result
    assert f"{7 if IS_0_2 else 9} passed" in result.output


def test_the_patched_release_is_still_that_release(patched: Path, tmp_path: Path) -> None:
    code = """
        import torchtitan_tp_validate as tpv
        from torchtitan_tp_validate.identity import torchtitan_identity
        tpv.install(strict=True)
        print(torchtitan_identity())
        """
    (tmp_path / "identity.py").write_text(textwrap.dedent(code), encoding="utf-8")
    result = run_module("identity", [], out=tmp_path, cwd=tmp_path, env=environment(patched))
    assert result.output == f"{RELEASE} with the patch of torchtitan-tp-validate\n", result


@pytest.fixture(scope="module")
def verdicts(patched: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("verdicts")
    records = out / "records.json"
    result = run_module("tests.patches.verdicts", [str(records)], out=out, env=environment(patched))
    assert result.returncode == 0, result
    read: list[dict[str, Any]] = json.loads(records.read_text())
    return read


def test_the_patch_and_this_package_agree_on_the_shared_cases(verdicts: list[dict[str, Any]]) -> None:
    wrong = [
        record
        for record in verdicts
        if record["alone"][1:] != record["ours"][1:] or record["alone"][0] not in ("ValueError", "accepted")
    ]
    assert not wrong
    refused = {
        record["alone"][1].split(" must divide ")[1].split()[0]
        for record in verdicts
        if len(record["alone"]) > 1
    }
    assert refused == {"n_heads", "n_kv_heads"} | (set() if IS_0_2 else {"n_key_heads", "n_value_heads"})
    accepted = [record for record in verdicts if record["alone"] == ["accepted"]]
    assert len(accepted) > 10
    assert len(verdicts) - len(accepted) > 10


def test_with_this_package_on_top_there_is_one_error_and_it_is_ours(verdicts: list[dict[str, Any]]) -> None:
    for record in verdicts:
        assert record["together"] == record["ours"], record
        assert not record["chained"], record
        assert record["together"][0] in ("TPCompatError", "accepted"), record


@pytest.mark.requires(torchtitan="0.3")  # 0.2.x has no config-time check
def test_the_config_time_check_follows_the_same_rule(verdicts: list[dict[str, Any]]) -> None:
    checked = [record for record in verdicts if record["config"] is not None]
    assert len(checked) > 40
    for record in checked:
        assert record["config"] == record["alone"], record


def test_the_patched_torchtitan_alone_refuses_on_every_rank_and_trains(patched: Path, tmp_path: Path) -> None:
    families = [family for family in NAMES if family in installed_line().FAMILIES]
    assert len(families) == 3
    result = run_torchrun(
        "tests.patches.worker",
        ["--out", str(tmp_path)],
        nproc=4,
        timeout=420,
        out=tmp_path,
        cwd=ROOT,
        env=environment(patched),
    )
    assert result.returncode == 0, result
    assert not result.leftover, result
    reports = [
        report
        for path in sorted(tmp_path.glob("rank*.json"))
        for report in json.loads(path.read_text(encoding="utf-8"))
    ]
    assert [report["rank"] for report in reports] == [rank for rank in range(4) for _ in families], result
    for report in reports:
        headline = (
            "Tensor parallel degree (4) must divide n_kv_heads (2). "
            f"For {NAMES[report['family']]}, max supported TP is 2."
        )
        assert report["torchtitan"] == str(patched / "torchtitan"), result
        assert report["refused"] == headline, result
        assert report["touched"] == [0, 0, 0], result
        if not IS_0_2:
            assert report["refused_config"] == headline, result
        assert report["sharded"] > 0, result
        assert report["losses"] == pytest.approx(report["reference_losses"], rel=1e-5), result
        assert report["losses"][0] != report["losses"][1], result
    assert {report["family"] for report in reports} == set(families), result
