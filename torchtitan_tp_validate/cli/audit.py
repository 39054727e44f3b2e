"""``tp-validate audit``: every training config of a module or folder, with its own degrees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.cli.arguments import Parser, add_output
from torchtitan_tp_validate.cli.report import Report, Status, exit_status


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "audit",
        help="judge every training config that a module or folder holds",
        description="Judge training configs with their own degrees. Without arguments: all that the "
        "installed torchtitan 0.3.x ships.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODULE_OR_PATH",
        help="torchtitan 0.3.x: a module as for --module, torchtitan's or your own; "
        "0.2.x: a TOML file, or a folder of them",
    )
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="audit")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    from torchtitan_tp_validate.cli import torchtitan

    with torchtitan.at_hand():
        jobs = _jobs(options)
        if not jobs:
            options.parser.error(f"no training config in {', '.join(options.what)}")
        with output.progress("Judging configs") as track:
            reports = [judge() for judge in track(jobs)]
    output.emit(options, reports, lambda: output.verdicts(reports))
    if all(report.status is Status.SKIPPED for report in reports):
        return 2  # nothing was judged
    return exit_status(reports)


def _jobs(options: Any) -> Sequence[Callable[[], Report]]:
    from torchtitan_tp_validate import registry

    if not options.what and not registry.has_configs():
        options.parser.error(
            "this torchtitan keeps its training configs in TOML files, which its package does not bring: "
            "name the files, or a folder of them"
        )
    found: list[Callable[[], Report]] = []
    for what in options.what or registry.names():
        if what.endswith(".toml") or os.path.exists(what):
            found += _toml_jobs(what)
        else:
            found += _module_jobs(what, named=bool(options.what))
    return found


def _toml_jobs(path: str) -> Iterator[Callable[[], Report]]:
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    for file in _toml_files(path):
        if registry.has_configs():
            note = "this torchtitan does not read TOML files: its configs are Python functions."
            yield lambda file=file, note=note: Report(file, note=note)  # type: ignore[misc]
        else:
            yield lambda file=file: torchtitan.judge_toml(file)  # type: ignore[misc]


def _toml_files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    folders = os.walk(path)
    return sorted(
        os.path.join(at, name) for at, _, names in folders for name in names if name.endswith(".toml")
    )


def _module_jobs(name: str, *, named: bool) -> Iterator[Callable[[], Report]]:
    """The configs of a module; one that cannot be imported is skipped, unless it was named."""
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    try:
        configs = registry.configs(name)
    except registry.UnavailableError as error:
        note = str(error)
        yield lambda: Report(name, group=name, note=note, skipped=not named)
        return
    for config, build in configs.items():
        yield lambda config=config, build=build: torchtitan.judge_config(config, build, name)  # type: ignore[misc]
