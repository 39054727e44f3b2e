"""``tp-validate``: the answer before a GPU is booked. A file per subcommand, the same engine behind all.

Exit status: 0 when everything asked for fits, 1 when something does not, 2 for bad usage and for input
that could not be judged. Standard output carries only the result.
"""

from __future__ import annotations

import contextlib
import gc
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
    "layouts": "layouts",
    "rehearse": "rehearse",
    "doctor": "doctor",
    "completion": "completion",
}
"""Subcommand -> the module of commands/ that has it."""
_TAKE_A_RUN = ("check", "layouts", "rehearse")
_EXAMPLES = """\
examples:
  tp-validate check --hf-config path/to/config.json
  tp-validate check -- --module llama3 --config llama3_8b --parallelism.tensor_parallel_degree 16
  tp-validate table --model llama3
  tp-validate COMMAND --help

Exit status: 0 all fits, 1 something does not, 2 bad usage or input that cannot be judged.
"""
USAGE = 2
_COLLECTED_AFTER = (1_000_000, 50)
"""Objects more than before, and such collections, after which garbage is looked for."""
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    Args:
        argv: the arguments, this process's by default. What follows ``--`` is torchtitan's.
    """
    # Importing torch and torchtitan makes millions of objects that stay: looking through them again and again
    # for garbage takes a quarter of that time.
    gc.set_threshold(*_COLLECTED_AFTER)
    arguments = list(sys.argv[1:] if argv is None else argv)
    theirs: list[str] | None = None
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, theirs = arguments[:cut], arguments[cut + 1 :]
    try:
        status = _run(arguments, theirs)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except TPValidateError as error:
        _complain(str(error), getattr(error, "output", ""))
    except BrokenPipeError:
        # Whoever read the output has gone, e.g. `| head`.
        pass
    except OSError as error:
        from torchtitan_tp_validate.cli.files import reason

        _complain(f"standard output does not take the result: {reason(error)}")
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        from torchtitan_tp_validate.cli.verdicts import unexpected

        _complain(unexpected(error))
    _forget_output()
    return USAGE


def _run(arguments: list[str], theirs: list[str] | None) -> int:
    try:
        options, unknown = build_parser(next(iter(arguments), None)).parse_known_args(arguments)
        options.parser.raise_if_unknown(unknown, getattr(options, "hint", ""))
        options.torchtitan_arguments = theirs
        if theirs is not None and options.command not in _TAKE_A_RUN:
            options.parser.error(f"only {', '.join(_TAKE_A_RUN)} take torchtitan's arguments after --")
        status: int = options.run(options)
        return status
    except SystemExit as stop:  # argparse, and torchtitan's own parser
        return stop.code if isinstance(stop.code, int) else USAGE if stop.code else 0


def _complain(message: str, output: str = "") -> None:
    from torchtitan_tp_validate.cli.formats import block, terminal

    if sys.stderr is not None:
        sys.stderr.write(f"tp-validate: {terminal(message)}\n{output and block(output) + chr(10)}")


def _forget_output() -> None:
    """Have nothing written at exit that standard output did not take before."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(command: str | None = None) -> Parser:
    """Return the parser of the whole command line, or of one subcommand: the others need not be imported."""
    from importlib import import_module

    from torchtitan_tp_validate import __version__

    parser = Parser(
        prog="tp-validate",
        description="Say whether a tensor parallel degree fits a model, before a GPU is booked.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="tp-validate")
    for module in [_COMMANDS[command]] if command in _COMMANDS else dict.fromkeys(_COMMANDS.values()):
        import_module(f"{__name__}.commands.{module}").add_parser(commands)
    return parser
