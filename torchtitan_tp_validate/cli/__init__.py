"""``tp-validate``: the answer before a GPU is booked. A file per subcommand, the same engine behind all.

Exit status: 0 when everything asked for fits, 1 when something does not, 2 for bad usage and for input
that could not be judged. Standard output carries only the result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torchtitan_tp_validate.cli.arguments import Parser
from torchtitan_tp_validate.errors import TPValidateError

_COMMANDS = {
    "check": "check",
    "table": "table",
    "audit": "audit",
    "hf-audit": "hf_audit",
    "rule": "rules",
    "rules": "rules",
    "doctor": "doctor",
    "completion": "completion",
}
"""Subcommand -> the module here that has it."""
USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: the arguments, this process's by default. What follows ``--`` is torchtitan's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    theirs: list[str] | None = None
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, theirs = arguments[:cut], arguments[cut + 1 :]
    try:
        options = build_parser(next(iter(arguments), None)).parse_args(arguments)
        options.torchtitan_arguments = theirs
        if theirs is not None and options.command != "check":
            options.parser.error("only check takes torchtitan's arguments after --")
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse, and torchtitan's own parser
        return stop.code if isinstance(stop.code, int) else USAGE if stop.code else 0
    except TPValidateError as error:
        print(f"tp-validate: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # Whoever read the output has gone, e.g. `| head`; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED


def build_parser(command: str | None = None) -> Parser:
    """The parser of the whole command line, or of one subcommand: the others need not be imported."""
    from importlib import import_module

    from torchtitan_tp_validate import __version__

    parser = Parser(
        prog="tp-validate",
        description="Say whether a tensor parallel degree fits a model, before a GPU is booked.",
        epilog="Exit status: 0 all fits, 1 something does not, 2 bad usage or input that cannot be judged.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="tp-validate")
    for module in [_COMMANDS[command]] if command in _COMMANDS else dict.fromkeys(_COMMANDS.values()):
        import_module(f"{__name__}.{module}").add_parser(commands)
    return parser
