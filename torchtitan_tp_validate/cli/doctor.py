"""``tp-validate doctor``: what is installed here, and which entry points would be guarded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan_tp_validate.cli import output

_PACKAGES = ("torchtitan-tp-validate", "torchtitan", "torch", "transformers")


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="say what was found, and what is guarded",
        description="Which torchtitan, torch and transformers are installed, and which of their entry points "
        "install() and the launcher guard, which not, and why.",
    )
    parser.set_defaults(run=run, parser=parser, command="doctor", output_file=None)


def run(options: Any) -> int:
    """Run the subcommand; the exit status: 1 when something that should be guarded is not."""
    from torchtitan_tp_validate.install import installed

    with _guards():
        states = installed().targets
    output.put(options, list(_lines(states)))
    return 1 if any(state.faulty for state in states) else 0


def _guards() -> Any:
    import warnings

    from torchtitan_tp_validate.errors import InstallWarning
    from torchtitan_tp_validate.install import installed

    warnings.simplefilter("ignore", InstallWarning)  # the states below say the same
    return installed()


def _lines(states: Any) -> Iterator[output.Line]:
    import platform
    from importlib import metadata

    from torchtitan_tp_validate.wrappers.target import package_folder, torchtitan_identity

    yield f"python {platform.python_version()}", ""
    for name in _PACKAGES:
        try:
            by_files = name == "torchtitan" and package_folder(name) is not None
            yield f"{name} {torchtitan_identity() if by_files else metadata.version(name)}", ""
        except metadata.PackageNotFoundError:
            yield f"{name}: not installed", "dim"
    yield "", ""
    for state in states:
        word = "guarded" if state.guarded else "AT FAULT" if state.faulty else "not guarded"
        style = "green" if state.guarded else "bold red" if state.faulty else "dim"
        yield f"{word:12} {state}", style
