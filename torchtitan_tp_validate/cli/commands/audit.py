"""``tp-validate audit``: every training config of a module or folder, with its own degrees."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import files, formats, output
from torchtitan_tp_validate.cli.arguments import (
    Parser,
    add_output,
    add_repairs,
    add_replication,
    positive,
    run_options,
)
from torchtitan_tp_validate.cli.memory import add_memory, check_memory, with_memory
from torchtitan_tp_validate.cli.verdicts import Report, Verdicts, unexpected
from torchtitan_tp_validate.errors import UnavailableError

if TYPE_CHECKING:
    from torchtitan_tp_validate.job import Options as RunOptions

_EXAMPLES = """\
examples:
  tp-validate audit                                    (all that the installed torchtitan 0.3.x ships)
  tp-validate audit qwen3_5 gpt_oss --output-format markdown
  tp-validate audit my_package.configs --output-format github
  tp-validate audit train_configs/                     (TOML files, torchtitan 0.2.x)
  tp-validate audit llama3 --world-size 64 --memory 80GiB
"""


@dataclass(frozen=True)
class _Job:
    """What is to be judged.

    Attributes:
        name: of the config, or of the file.
        judge: gives the verdict.
        file: what it is read from, where that is known.
        arguments: torchtitan's own.
    """

    name: str
    judge: Callable[[], Report]
    file: str | None = None
    arguments: tuple[str, ...] = ()

    def report(self) -> Report:
        """Return the verdict, whatever happens: the other jobs are judged all the same."""
        try:
            return self.judge()
        except Exception as error:
            return Report(self.name, note=unexpected(error))


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "audit",
        help="judge every training config that a module or folder holds",
        description="Judge training configs with their own degrees. Without arguments: all that the "
        "installed torchtitan 0.3.x ships.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODULE_OR_PATH",
        help="torchtitan 0.3.x: a module as for --module, torchtitan's or your own; "
        "0.2.x: a TOML file, or a folder of them",
    )
    parser.add_argument(
        "--world-size", type=positive, action="once", metavar="N", help="judge each as started on N ranks"
    )
    add_memory(
        parser,
        more="every config that fits out on these ranks, which takes a while, and what the fullest then "
        "holds of parameters, gradients and optimizer state (Adam) is told; more than that does not fit",
    )
    add_replication(parser)
    add_repairs(parser)
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="audit")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    from torchtitan_tp_validate.cli import torchtitan

    check_memory(options)
    with torchtitan.installed():
        jobs = _jobs(options)
        if not jobs:
            options.parser.error(f"no training config in {', '.join(options.what)}")
        files.check_not_an_input(options.output_file, [job.file for job in jobs if job.file])
        with output.progress("Judging configs") as track:
            found = [
                with_memory(job.report(), options, lambda _: {}, arguments=job.arguments)
                for job in track(jobs)
            ]
    verdicts = Verdicts("audit", many=len(found) > 1, memory=options.memory is not None)
    with formats.writing(options, verdicts) as write:
        for report in found:
            write(report)
    return 2 if verdicts.judged_none else verdicts.exit_status


def _jobs(options: Any) -> Sequence[_Job]:
    from torchtitan_tp_validate import registry

    if not options.what and not registry.has_configs():
        options.parser.error(
            "this torchtitan keeps its training configs in TOML files, which its package does not bring: "
            "name the files, or a folder of them"
        )
    found: list[_Job] = []
    for what in options.what or registry.names():
        if what.endswith(".toml") or os.path.exists(what):
            found += _toml_jobs(what, run_options(options))
        else:
            found += _module_jobs(what, run_options(options), named=bool(options.what))
    return found


def _toml_jobs(path: str, how: RunOptions) -> Iterator[_Job]:
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    for file in _toml_files(path):
        if registry.has_configs():
            note = "this torchtitan does not read TOML files: its configs are Python functions."
            yield _Job(file, functools.partial(Report, file, note=note), file)
        else:
            judge = functools.partial(torchtitan.judge_toml, file, how)
            yield _Job(file, judge, file, (torchtitan.TOML_FLAGS[0], file))


def _toml_files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    folders = os.walk(path)
    return sorted(
        os.path.join(at, name) for at, _, names in folders for name in names if name.endswith(".toml")
    )


def _module_jobs(name: str, how: RunOptions, *, named: bool) -> Iterator[_Job]:
    """Yield the configs of a module; one that cannot be imported is skipped, unless it was named."""
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    try:
        configs = registry.configs(name)
    except UnavailableError as error:
        yield _Job(name, functools.partial(Report, name, group=name, note=str(error), skipped=not named))
        return
    for config, build in configs.items():
        judge = functools.partial(torchtitan.judge_config, config, build, name, how)
        code = getattr(build, "__code__", None)
        file = code.co_filename if code else None
        yield _Job(config, judge, file, ("--module", name, "--config", config))
