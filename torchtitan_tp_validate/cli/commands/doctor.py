"""``tp-validate doctor``: what is installed here, and which entry points would be guarded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.cli.arguments import Parser, add_output

if TYPE_CHECKING:
    from torchtitan_tp_validate.install import TargetState

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
    add_output(parser, ("full", "json"))
    parser.set_defaults(run=run, parser=parser, command="doctor")


def run(options: Any) -> int:
    """Run the subcommand; the exit status: 1 when something that should be guarded is not."""
    from torchtitan_tp_validate.install import installed
    from torchtitan_tp_validate.supported import unsupported_torchtitan

    with _guards():
        states = installed().targets
    problem = unsupported_torchtitan()
    if options.output_format == "json":
        import json

        output.put_document(options, [json.dumps(_as_json(states, problem), indent=2)])
    else:
        output.put(options, _lines(states, problem))
    if problem is not None:
        return 2
    return 1 if any(state.faulty for state in states) else 0


def _guards() -> Any:
    import warnings

    from torchtitan_tp_validate.errors import InstallWarning
    from torchtitan_tp_validate.install import installed

    warnings.simplefilter("ignore", InstallWarning)  # the states below say the same
    return installed()


def _versions() -> dict[str, str | None]:
    """What is installed: its name -> its version, or None."""
    import platform
    from importlib import metadata

    from torchtitan_tp_validate.wrappers.target import package_folder, torchtitan_identity

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


def _lines(states: Sequence[TargetState], problem: str | None) -> Iterator[output.Line]:
    for name, version in _versions().items():
        yield (f"{name} {version}", "") if version else (f"{name}: not installed", "dim")
    yield "", ""
    if problem is not None:
        yield problem, "bold red"
        yield "", ""
    for state in states:
        word = "guarded" if state.guarded else "AT FAULT" if state.faulty else "not guarded"
        style = "green" if state.guarded else "bold red" if state.faulty else "dim"
        yield f"{word:12} {state}", style
