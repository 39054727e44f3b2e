"""``tp-validate doctor``: what is installed here, and which entry points would be guarded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser, add_output
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Annotation, Findings, Line

if TYPE_CHECKING:
    from torchtitan_tp_validate.guards import TargetState
    from torchtitan_tp_validate.releases.contract import Gone

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-doctor.json`` describes."""

_PACKAGES = ("torchtitan-tp-validate", "torchtitan", "torch", "transformers")
_EXAMPLES = """\
examples:
  tp-validate doctor
  tp-validate doctor --module my_package
  tp-validate doctor --output-format json
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "doctor",
        help="say what was found, and what is guarded",
        description="Which torchtitan, torch and transformers are installed, and which of their entry points "
        "install() and the launcher guard, which not, and why. Exit status 1 when something that should be "
        "guarded is not, or something that is read of torchtitan is not there, 2 when the installed "
        "torchtitan is not supported.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--module",
        metavar="PACKAGE",
        help="also look for the parallelize functions of a package of your own",
    )
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="doctor")


def run(options: Any) -> int:
    """Run the subcommand; the exit status: 1 when something that should be guarded is not."""
    from torchtitan_tp_validate.guards import installed
    from torchtitan_tp_validate.releases import what_is_gone
    from torchtitan_tp_validate.supported import unsupported_torchtitan

    with _guards():
        states = (*installed().targets, *_own_states(options.module))
    problem = unsupported_torchtitan()
    gone = () if problem else what_is_gone()
    problems = [_Problem(problem)] if problem else [_Problem(f"torchtitan {part}") for part in gone]
    with formats.writing(options, _Doctor(states, problem, gone)) as write:
        for found in problems:
            write(found)
        for state in states:
            write(state)
    if problem is not None:
        return 2
    return 1 if problems or any(state.faulty for state in states) else 0


class _Problem(str):
    """Why the installed torchtitan is not supported, or what is read of it and is not there."""


class _Doctor(Findings["TargetState | _Problem"]):
    """What is said of the entry points, and of a torchtitan that is not supported, or not in all."""

    columns = ("state", "model", "entry point", "detail")

    def __init__(self, states: Sequence[TargetState], problem: str | None, gone: Sequence[Gone]) -> None:
        self._states, self._problem, self._gone = states, problem, gone

    def opening(self) -> Iterator[Line]:
        for name, version in _versions().items():
            yield (f"{name} {version}", "") if version else (f"{name}: not installed", QUIET)
        yield "", ""

    def full(self, thing: TargetState | _Problem) -> Iterator[Line]:
        if isinstance(thing, _Problem):
            yield from ((thing, BAD), ("", ""))
        else:
            yield f"{_word(thing):12} {thing}", GOOD if thing.guarded else BAD if thing.faulty else QUIET

    def line(self, thing: TargetState | _Problem) -> str:
        return str(thing) if isinstance(thing, _Problem) else f"{_word(thing)}: {thing}"

    def annotation(self, thing: TargetState | _Problem) -> Annotation | None:
        if isinstance(thing, _Problem):
            return Annotation("error", "torchtitan", thing)
        return Annotation("error", thing.model, str(thing)) if thing.faulty else None

    def cells(self, thing: TargetState | _Problem) -> list[Line]:
        if isinstance(thing, _Problem):
            return [("AT FAULT", BAD), ("", ""), ("torchtitan", ""), (thing, "")]
        state = (_word(thing), BAD if thing.faulty else "")
        return [state, (thing.model, ""), (thing.entry_point, ""), (thing.detail, "")]

    def document(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": _versions(),
            "problem": self._problem,
            "gone": [asdict(part) for part in self._gone],
            "targets": [asdict(state) for state in self._states],
        }


def _own_states(package: str | None) -> Iterator[TargetState]:
    """Yield the state of every entry point of somebody's own package; nothing of it is imported."""
    from torchtitan_tp_validate.guards import TargetState
    from torchtitan_tp_validate.shape import own_entry_points, own_name

    found = list(own_entry_points(package)) if package else []
    for point in found:
        yield TargetState(own_name(point.module), str(point), True, "guarded when a job starts, by its shape")
    if package and not found:
        absent = "has no parallelize_*(model, parallel_dims) of which it is known what it splits"
        yield TargetState(package, package, False, absent, faulty=True)


def _guards() -> Any:
    import warnings

    from torchtitan_tp_validate.errors import InstallWarning
    from torchtitan_tp_validate.guards import installed

    warnings.simplefilter("ignore", InstallWarning)  # the states below say the same
    return installed()


def _versions() -> dict[str, str | None]:
    """Return what is installed: its name -> its version, or None."""
    import platform
    from importlib import metadata

    from torchtitan_tp_validate.identity import torchtitan_identity
    from torchtitan_tp_validate.locate import package_folder

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            by_files = name == "torchtitan" and package_folder(name) is not None
            found[name] = str(torchtitan_identity()) if by_files else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _word(state: TargetState) -> str:
    return "guarded" if state.guarded else "AT FAULT" if state.faulty else "not guarded"
