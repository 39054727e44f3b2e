"""The workflows call sessions that exist, and none of them can write to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

yaml = pytest.importorskip("yaml")
nox = pytest.importorskip("nox")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def content(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text(encoding="utf-8"))


def sessions() -> dict[str, set[str]]:
    """Name of each nox session -> the releases that it can be run for."""
    found = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    releases = set(re.findall(r'^    "(\d[\d.]+)": TORCH', found, flags=re.MULTILINE)) | {"main"}
    assert '@nox.parametrize("torchtitan", [*LINES, MAIN])' in found
    names = re.findall(r"@nox\.session.*?\ndef (\w+)\(", found, flags=re.DOTALL)
    return {name: releases if name == "tests" else set() for name in names}


def named(workflow: Path) -> list[str]:
    """The sessions that a workflow names, in its matrix or on a command line."""
    jobs = content(workflow)["jobs"].values()
    matrices = [job.get("strategy", {}).get("matrix", {}).get("session", []) for job in jobs]
    lines = [step.get("run", "") for job in jobs for step in job["steps"]]
    literal = [found for line in lines for found in re.findall(r"-s (\w+)$", line)]
    return [session for matrix in matrices for session in matrix] + literal


def test_there_is_a_workflow_for_each_occasion() -> None:
    assert {path.stem for path in WORKFLOWS} == {"test", "nightly", "gpu", "release"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_sessions_that_a_workflow_names_exist(workflow: Path) -> None:
    known = sessions()
    for session in named(workflow):
        name, _, release = session.partition("(")
        assert name in known
        assert not release or re.findall(r'"(.*)"', release)[0] in known[name]


def test_all_is_every_supported_release_and_what_the_service_runs_as_the_readme_says() -> None:
    (everything,) = re.findall(r"set -- -s (.*) \"", (ROOT / "scripts" / "test").read_text(encoding="utf-8"))
    assert set(everything.split()) == sessions().keys()
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith("\nexec scripts/test --all\n")
    assert "`scripts/test --all`, which `.ci/run` calls" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_release_is_tested_every_night() -> None:
    known = sessions()
    nightly = named(ROOT / ".github" / "workflows" / "nightly.yml")
    assert {f'tests(torchtitan="{release}")' for release in known["tests"]} | {"hf"} <= set(nightly)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read(workflow: Path) -> None:
    document = content(workflow)
    assert document["permissions"] == {"contents": "read"}
    more = [job["permissions"] for job in document["jobs"].values() if "permissions" in job]
    assert more == ([{"id-token": "write"}] if workflow.stem == "release" else [])
