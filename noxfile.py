"""Lint once, then run every suite against every supported release.

Sessions whose torch is the same share an environment, since torch is most of what is installed.
"""

from __future__ import annotations

import os
import sys

import nox

nox.options.error_on_external_run = True
nox.options.default_venv_backend = "venv"

# What each release is run with. 0.2.x and 0.3.0 cannot share a torch: the default backend of 0.3.0 needs
# 2.14 or later, and 0.2.x was last seen to work with 2.13. What 0.2.x calls MX is in no later torchao.
TORCH_2_13 = ("torch==2.13.*", "triton", "torchao==0.16.*", "transformers==5.23.*")
TORCH_2_15 = ("torch==2.15.*", "torchao", "torchvision", "flash-linear-attention", "transformers==5.23.*")
LINES = {
    "0.2.0": TORCH_2_13,
    "0.2.1": TORCH_2_13,
    "0.2.2": TORCH_2_13,
    "0.3.0": TORCH_2_15,
}
MAIN = "main"
"""torchtitan's own main: what ``TORCHTITAN_SOURCE`` names to pip, a checkout for example."""
OLDER = ("0.2.0", "0.2.1")
RANKS = tuple(
    f"tests/torchrun/test_{name}.py"
    for name in ("tp_above_n_kv_heads_is_refused", "tp_equal_to_n_kv_heads_trains", "replication", "launcher")
)
"""Where it is no release: refusals first, and all that needs no record."""
NEWEST = "0.3.0"

# Native tensor parallelism: the class's plan never takes effect; the same, last of its kind; tied logits are
# doubled; the newest.
TRANSFORMERS = ("5.4.0", "5.13.1", "5.14.1", "5.23.0")

nox.options.sessions = ["lint", "core", f'tests(torchtitan="{NEWEST}")']


def install(session: nox.Session, torch: str, *requirements: str) -> str:
    """Return the Python of the environment of a torch, with these and what the tests need installed in it."""
    folder = f".nox/{torch.replace('==', '-').rstrip('.*')}"
    python = f"{folder}/bin/python"
    session.run(sys.executable, "-m", "venv", folder)
    session.run(python, "-m", "pip", "install", "--quiet", torch, *requirements, ".[test]")
    return python


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def core(session: nox.Session) -> None:
    """What needs neither torch nor torchtitan, both distributions, and the workflows.

    Arguments after ``--`` go to pytest.
    """
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", *(session.posargs or ["tests/core", "tests/docs"]))


@nox.session(python=False)
@nox.parametrize("torchtitan", [*LINES, MAIN])
def tests(session: nox.Session, torchtitan: str) -> None:
    """Tests in one process, patches and rehearsals, then those under torchrun, which wait for each other.

    Arguments after ``--`` go to pytest, in a single run.
    """
    requirement = f"torchtitan=={torchtitan}"
    if torchtitan == MAIN:
        requirement = os.environ.get("TORCHTITAN_SOURCE", "")
        if not requirement:
            session.skip("TORCHTITAN_SOURCE names no torchtitan")
    python = install(session, *LINES.get(torchtitan, TORCH_2_15), requirement)
    if session.posargs:
        session.run(python, "-m", "pytest", *session.posargs)
        return
    # The older releases of a line differ in their entry points, and in nothing that is run behind them.
    patches, folders, ranks = "tests/patches", ["tests/rehearsal", "tests/docs"], RANKS
    if torchtitan in OLDER:
        folders = [f"tests/rehearsal/test_{name}.py" for name in ("older_releases", "validation")]
        ranks = RANKS[:1]
    elif torchtitan == MAIN:  # what was recorded is of releases
        patches, folders = "tests/patches/test_upstream.py", ["tests/docs"]
    else:
        ranks = ("tests/torchrun",)
    for run in (["tests/torchtitan", patches, *folders], ranks):
        session.run(python, "-m", "pytest", *run, "-n", "auto", "--dist", "loadgroup")


@nox.session(python=False)
def hf(session: nox.Session) -> None:
    """Transformers' native tensor parallelism, release after release, without torchtitan.

    Arguments after ``--`` go to pytest, with the newest release only.
    """
    for version in TRANSFORMERS[-1:] if session.posargs else TRANSFORMERS:
        python = install(session, TORCH_2_13[0], "accelerate", f"transformers=={version}")
        session.run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchtitan", "torchao")
        folders = ["tests/transformers", "tests/docs/test_commands.py"]
        session.run(
            python, "-m", "pytest", *(session.posargs or [*folders, "-n", "auto", "--dist", "loadfile"])
        )
