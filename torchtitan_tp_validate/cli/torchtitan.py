"""The installed torchtitan, asked for verdicts. Imported only by the commands that need it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan_tp_validate import job, registry
from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.cli.formats import Location
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, judge
from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.errors import (
    KVReplicationError,
    NotReadError,
    PlanError,
    TPDegreeError,
    TPValidateError,
    UnavailableError,
    UnknownNameError,
)
from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.job import Options, parse_command_line, unguarded
from torchtitan_tp_validate.releases import line_of, read_plan
from torchtitan_tp_validate.search import Search
from torchtitan_tp_validate.wrappers.guard import guardable_functions

TOML_FLAGS = ("--job.config_file", "--job.config-file")
"""What names the file of a job of 0.2.x."""


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Use the torchtitan that is installed, its own output kept away from standard output.

    Raises:
        UnavailableError: there is no torchtitan.
    """
    registry.names()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def judge_run(arguments: Sequence[str], options: Options) -> Report:
    """Return the verdict on the run that torchtitan makes of these arguments.

    Args:
        arguments: torchtitan's own.
        options: how to judge it.

    Raises:
        UnknownNameError: there is no such module or config.
        UnreadableError: the TOML file cannot be read.
        NotReadError: torchtitan does not take the arguments.
        SystemExit: torchtitan's own parser, with its own message.
    """
    location = _check_names(arguments)
    config, assumed = parsed(arguments)
    return replace(judge_job(config, "this run", location, options), assumed=assumed)


def search_layouts(
    arguments: Sequence[str], options: Options, keep: Sequence[str], *, near: bool
) -> tuple[Search, str]:
    """Return a search among the layouts of the run that torchtitan makes of these arguments, and its name.

    Args:
        arguments: torchtitan's own.
        options: how to judge layouts; they say how many ranks there are.
        keep: axes whose degree stays the run's.
        near: whether those that change the least come first.

    Raises:
        NotReadError: torchtitan does not take the arguments, or they name no model.
        UnknownNameError: there is no such module, config or axis.
    """
    _check_names(arguments)
    config, _ = parsed(arguments)
    model = line_of(config).requested_model(config)
    if model is None:
        raise NotReadError("the run names no model that is known.")
    return Search(config, guarded=guardable_functions(), options=options, keep=keep, near=near), model.name


def judge_toml(path: str, options: Options) -> Report:
    """Return the verdict on the run that a TOML file of 0.2.x describes."""
    try:
        _, text = files.read_toml(path)
        location = Location(path, files.line_of(text, Axis.TP.flag))
        config, assumed = parsed([TOML_FLAGS[0], path])
        return replace(judge_job(config, path, location, options), assumed=assumed)
    except UnavailableError as error:
        return Report(path, note=str(error), skipped=True, location=Location(path))
    except TPValidateError as error:
        return Report(path, note=str(error), location=Location(path))
    except SystemExit as stop:
        note = f"torchtitan does not take it (exit status {stop.code})."
        return Report(path, note=note, location=Location(path))


def judge_config(name: str, build: Callable[[], Any], group: str, options: Options) -> Report:
    """Return the verdict on a training config of 0.3.x; what cannot be built here is skipped."""
    code = getattr(build, "__code__", None)
    location = Location(_relative(code.co_filename), code.co_firstlineno) if code else None
    try:
        config, assumed = build_for_its_hardware(build)
    except Exception as error:  # a package or a file that is not here
        return Report(name, group=group, note=f"cannot be built here: {_first_line(error)}", skipped=True)
    report = judge_job(config, name, location, options)
    return replace(report, group=group, skipped=True, assumed=assumed)


def judge_flavor(model: str, flavor: str, choices: Sequence[Degrees], *, listed: bool = False) -> Report:
    """Return the verdict on a flavor at some degrees.

    Args:
        listed: whether it is only shown: what cannot be read is then skipped.

    Raises:
        UnknownNameError: there is no such model or flavor.
        UnavailableError: the model cannot be imported here.
    """
    name, found = f"{model} {flavor}", registry.model(model)
    try:
        spec, assumed = build_for_its_hardware(lambda: found.spec(flavor))
    except UnknownNameError:
        raise
    except Exception as error:
        return Report(name, group=model, note=f"cannot be built here: {_first_line(error)}", skipped=listed)
    problem = unguarded(spec, guarded=guardable_functions())
    if problem is not None:
        return Report(name, group=model, note=problem, skipped=listed)
    try:
        plan = read_plan(spec.config, choices[0])
        return Report(name, judge(plan, choices), plan, group=model, listed=listed, assumed=assumed)
    except PlanError as error:
        return Report(name, group=model, note=str(error), skipped=listed)


def judge_job(config: Any, name: str, location: Location | None, options: Options) -> Report:
    """Return the verdict on a job that torchtitan parsed; the same as the launcher's.

    Raises:
        UnknownNameError: there is no such model or flavor.
        UnavailableError: the model needs a package that is not here.
    """
    try:
        line_of(config).requested_model(config)  # imported, its function can be guarded
        verdict = job.judge_job(config, guarded=guardable_functions(), options=options)
        if verdict is None:
            if named := line_of(config).named_model(config):  # say what there is instead
                registry.model(named[0]).spec(named[1])
            return Report(name, note="the job names no model.", location=location)
    except (TPDegreeError, KVReplicationError) as error:
        return Report(name, note=str(error), location=location)
    except ImportError as error:
        raise UnavailableError(f"the job's model cannot be imported here: {error}.") from error
    if verdict.unread and verdict.error is None:
        return Report(name, note=f"Not validated: {verdict.unread}", location=location)
    judgement = Judgement(verdict.degrees, verdict.error, warnings=verdict.warnings)
    unread = (*filter(None, [verdict.unread]), *verdict.not_judged)
    return Report(name, (judgement,), verdict.plan, location=location, unread=unread, repairs=verdict.repairs)


def parsed(arguments: Sequence[str]) -> tuple[Any, str]:
    """Return the job, and the hardware that was taken for granted when it was made of its arguments.

    Raises:
        NotReadError: torchtitan does not take them.
        SystemExit: torchtitan's own parser, with its own message.
    """
    try:
        return build_for_its_hardware(lambda: parse_command_line(arguments))
    except Exception as error:  # torchtitan's own complaints have many types, Exception among them
        raise NotReadError(f"torchtitan does not take the job: {_first_line(error)}") from error


def _check_names(arguments: Sequence[str]) -> Location | None:
    """Complain of what torchtitan answers with a traceback; where the degree is written, if in a file."""
    toml = value_of(arguments, TOML_FLAGS)
    if toml is not None:
        _, text = files.read_toml(toml)
        return Location(toml, files.line_of(text, Axis.TP.flag))
    module, config = value_of(arguments, ("--module",)), value_of(arguments, ("--config",))
    if module is not None and config is not None and registry.has_configs():
        known = registry.configs(module, own=False)
        if config not in known:
            raise UnknownNameError("config", config, list(known), module)
    return None


def value_of(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """Return what the first of some flags that is among the arguments says, or None."""
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def _relative(file: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if text.endswith(".") else f"{text}."
