"""Lint once, then run every suite against every supported torchtitan, each in an environment of its own."""

from __future__ import annotations

import nox

nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "core", "tests", "hf"]
nox.options.default_venv_backend = "venv"

# What each release is run with. 0.2.x and 0.3.0 cannot share a torch: the default backend of 0.3.0 needs
# 2.14 or later, and 0.2.x was last seen to work with 2.13.
LINES = {
    "0.2.0": ["torchtitan==0.2.0", "torch==2.13.*", "triton", "transformers==5.23.*"],
    "0.2.1": ["torchtitan==0.2.1", "torch==2.13.*", "triton", "transformers==5.23.*"],
    "0.2.2": ["torchtitan==0.2.2", "torch==2.13.*", "triton", "transformers==5.23.*"],
    "0.3.0": [
        "torchtitan==0.3.0",
        "torch==2.15.*",
        "torchao",
        "torchvision",
        "flash-linear-attention",
        "transformers==5.23.*",
    ],
}
OLDER = ("0.2.0", "0.2.1")
NEWEST = "0.3.0"

# Native tensor parallelism: the class's plan never takes effect; the same, last of its kind; tied logits are
# doubled; the newest.
TRANSFORMERS = ("5.4.0", "5.13.1", "5.14.1", "5.23.0")


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


@nox.session
@nox.parametrize("torchtitan", list(LINES))
def tests(session: nox.Session, torchtitan: str) -> None:
    """The tests in one process side by side, then those under torchrun one by one, then the patches.

    Arguments after ``--`` go to pytest, in a single run.
    """
    session.install(*LINES[torchtitan])
    session.install(".[test]")
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    session.run("pytest", "tests/torchtitan", "tests/docs", "-n", "auto")
    # What runs under torchrun is the same in the older releases of a line but for the entry points.
    refusals = "tests/torchrun/test_tp_above_n_kv_heads_is_refused.py"
    session.run("pytest", refusals if torchtitan in OLDER else "tests/torchrun")
    session.run("pytest", "tests/patches", "-n", "auto", "--dist", "loadfile")


@nox.session
def hf(session: nox.Session) -> None:
    """Transformers' native tensor parallelism, release after release in one environment.

    Arguments after ``--`` go to pytest, with the newest release only.
    """
    session.install("torch==2.13.*", "accelerate")
    session.install(".[test]")
    for version in TRANSFORMERS[-1:] if session.posargs else TRANSFORMERS:
        session.install(f"transformers=={version}")
        session.run("pytest", *(session.posargs or ["tests/transformers", "tests/docs"]))


@nox.session
def torchtitan_main(session: nox.Session) -> None:
    """The tests in one process against torchtitan's main; not one of the default sessions.

    What fails here tells what the next release will change.
    """
    others = [requirement for requirement in LINES[NEWEST] if not requirement.startswith("torchtitan=")]
    session.install("torchtitan @ git+https://github.com/pytorch/torchtitan", *others)
    session.install(".[test]")
    session.run("pytest", *(session.posargs or ["tests/torchtitan", "-n", "auto"]))
