"""``tp-validate completion``: a script that completes the command line in a shell."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser
from torchtitan_tp_validate.errors import UsageError

_SHELLS = ("bash", "zsh", "tcsh")
_OF_FILES = ("PATH", "FILE", "MODULE_OR_PATH")
"""What help calls an argument that may name a file."""

# Where nothing of ours fits (a second file, a word after --) the shell's own file names do: shtab offers
# nothing there, and in bash breaks names with a space itself.
_FILE_NAMES = {
    "bash": [(r"^complete (?=-.* -F )(?!.*-o default)", "complete -o default ")],
    "zsh": [(r"^(_\w+_check_options=\()$", r'\1\n  "*:file:_files"')],
    "tcsh": [(r"'p/\*/\(\)/'", "'p/*/f/'")],
}

_EXAMPLES = """\
examples:
  eval "$(tp-validate completion bash)"                                (in ~/.bashrc)
  eval "$(tp-validate completion zsh)"                                 (in ~/.zshrc)
  tp-validate completion tcsh > ~/.tp-validate.tcsh
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description='Print a script for your shell, e.g. for bash: eval "$(tp-validate completion bash)"',
        epilog=_EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS, help="which shell")
    parser.set_defaults(run=run, parser=parser, command="completion")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    from torchtitan_tp_validate.cli import build_parser

    try:
        import shtab
    except ModuleNotFoundError:
        raise UsageError(
            "completion needs shtab: pip install shtab (or 'torchtitan-tp-validate[completion]')."
        ) from None
    parser = build_parser()
    if options.shell != "bash":
        for action in _actions(parser):
            if action.metavar in _OF_FILES:
                setattr(action, "complete", shtab.FILE)  # noqa: B010 - shtab's own way, unknown to argparse
    script: str = shtab.complete(parser, shell=options.shell)
    for pattern, instead in _FILE_NAMES[options.shell]:
        script = re.sub(pattern, instead, script, flags=re.MULTILINE)
    with formats.place(None) as put:
        put(f"{line}\n" for line in script.splitlines())
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of the parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _actions(command)
