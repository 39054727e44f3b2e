"""``tp-validate completion``: a script that completes the command line in a shell."""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.cli.arguments import UsageError

_SHELLS = ("bash", "zsh", "tcsh")


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description='Print a script for your shell, e.g. for bash: eval "$(tp-validate completion bash)"',
    )
    parser.add_argument("shell", choices=_SHELLS, help="which shell")
    parser.set_defaults(run=run, parser=parser, command="completion", output_file=None)


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    from torchtitan_tp_validate.cli import build_parser

    try:
        import shtab
    except ModuleNotFoundError:
        raise UsageError(
            "completion needs shtab: pip install shtab (or 'torchtitan-tp-validate[completion]')."
        ) from None
    script = shtab.complete(build_parser(), shell=options.shell)
    output.put(options, [(line, "") for line in script.splitlines()])
    return 0
