"""``tp-validate doctor``: what is installed here, and which entry points would be guarded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser, add_output
from torchtitan_tp_validate.cli.formats import Annotation, Findings
from torchtitan_tp_validate.cli.output import BAD, GOOD, QUIET, Line

if TYPE_CHECKING:
    from torchtitan_tp_validate.guards import TargetState

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-doctor.json`` describes."""

_PACKAGES = ("torchtitan-tp-validate", "torchtitan", "torch", "transformers")
_EXAMPLES = """\
examples:
  tp-validate doctor
  tp-validate doctor --output-format json
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "doctor",
        help="say what was found, and what is guarded",
        description="Which torchtitan, torch and transformers are installed, and which of their entry points "
        "install() and the launcher guard, which not, and why. Exit status 1 when something that should be "
        "guarded is not, 2 when the installed torchtitan is not supported.",
        epilog=_EXAMPLES,
    )
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="doctor")


def run(options: Any) -> int:
    """Run the subcommand; the exit status: 1 when something that should be guarded is not."""
    from torchtitan_tp_validate.guards import installed
    from torchtitan_tp_validate.supported import unsupported_torchtitan

    with _guards():
        states = installed().targets
    problem = unsupported_torchtitan()
    problems = [] if problem is None else [_Problem(problem)]
    findings = Findings[Any](
        [*problems, *states],
        full=lambda _: _lines(states, problem),
        line=lambda found: str(found) if isinstance(found, _Problem) else f"{_word(found)}: {found}",
        annotation=_annotation,
        columns=["state", "model", "entry point", "detail"],
        cells=_cells,
        document=lambda _: _as_json(states, problem).items(),
    )
    formats.emit(options, findings)
    if problem is not None:
        return 2
    return 1 if any(state.faulty for state in states) else 0


class _Problem(str):
    """Why the installed torchtitan is not supported."""


def _guards() -> Any:
    import warnings

    from torchtitan_tp_validate.errors import InstallWarning
    from torchtitan_tp_validate.guards import installed

    warnings.simplefilter("ignore", InstallWarning)  # the states below say the same
    return installed()


def _versions() -> dict[str, str | None]:
    """What is installed: its name -> its version, or None."""
    import platform
    from importlib import metadata

    from torchtitan_tp_validate.locate import package_folder, torchtitan_identity

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            by_files = name == "torchtitan" and package_folder(name) is not None
            found[name] = str(torchtitan_identity()) if by_files else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _as_json(states: Sequence[TargetState], problem: str | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": _versions(),
        "problem": problem,
        "targets": [asdict(state) for state in states],
    }


def _lines(states: Sequence[TargetState], problem: str | None) -> Iterator[Line]:
    for name, version in _versions().items():
        yield (f"{name} {version}", "") if version else (f"{name}: not installed", QUIET)
    yield "", ""
    if problem is not None:
        yield problem, BAD
        yield "", ""
    for state in states:
        yield f"{_word(state):12} {state}", GOOD if state.guarded else BAD if state.faulty else QUIET


def _word(state: TargetState) -> str:
    return "guarded" if state.guarded else "AT FAULT" if state.faulty else "not guarded"


def _annotation(found: TargetState | _Problem) -> Annotation | None:
    if isinstance(found, _Problem):
        return Annotation("error", "torchtitan", found)
    return Annotation("error", found.model, str(found)) if found.faulty else None


def _cells(found: TargetState | _Problem) -> list[Line]:
    if isinstance(found, _Problem):
        return [("AT FAULT", BAD), ("", ""), ("torchtitan", ""), (found, "")]
    state = (_word(found), BAD if found.faulty else "")
    return [state, (found.model, ""), (found.entry_point, ""), (found.detail, "")]
