"""``tp-validate check``: does this run, model or Hugging Face config fit its degrees?"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchtitan_tp_validate.cli import files, formats
from torchtitan_tp_validate.cli.arguments import (
    Parser,
    add_degrees,
    add_output,
    add_repairs,
    degrees,
    positive,
    run_options,
    tp_degrees,
)
from torchtitan_tp_validate.cli.formats import Location
from torchtitan_tp_validate.cli.verdicts import Report, Verdicts, judge, possessive, unexpected
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import NotAModelConfigError, PlanError, UnreadableError
from torchtitan_tp_validate.releases import huggingface

_EXAMPLES = """\
examples:
  tp-validate check -- --module qwen3_5 --config qwen35_35b_a3b --parallelism.tensor_parallel_degree 4
  tp-validate check -- --job.config_file llama3_8b.toml --parallelism.tensor_parallel_degree 16
  tp-validate check --model qwen3_5 --flavor 35B-A3B --tp 4
  tp-validate check --hf-config path/to/config.json                 (the degrees that work)
  tp-validate check --hf-config path/to/config.json --tp 1-64 --output-format json
  cat config.json | tp-validate check --hf-config - --tp 8 --framework transformers
"""

_OPTIONS = {
    "tp": "--tp",
    "flavor": "--flavor",
    "framework": "--framework",
    "ep": "--ep",
    "cp": "--cp",
    "seq_len": "--seq-len",
    "spmd_backend": "--spmd-backend",
    "replicate_kv_heads": "--replicate-kv-heads",
    "skip_unrelated": "--skip-unrelated",
    "repair": "--repair",
    "allow": "--allow",
    "world_size": "--world-size",
    "gpus_per_node": "--gpus-per-node",
}
"""What not every verdict looks at: its destination -> its name."""

_DEGREES = {"ep", "cp", "seq_len", "spmd_backend", "replicate_kv_heads"}
_OF_A_CONFIG = {"tp", "framework", "skip_unrelated"}
_LOOKED_AT = {
    "a run": {"replicate_kv_heads", "repair", "allow", "world_size", "gpus_per_node"},
    "a model": {"tp", "flavor", *_DEGREES},
    "torchtitan": _OF_A_CONFIG | _DEGREES,
    "transformers": _OF_A_CONFIG,
}
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_OF_A_MODEL = ('"model_type"', '"architectures"', '"num_attention_heads"')


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "check",
        help="judge a run, a model or Hugging Face configs",
        description="Judge a torchtitan run (its own arguments after --), one of torchtitan's models, or "
        "Hugging Face configs.",
        epilog=_EXAMPLES,
        usage="tp-validate check [options] -- TORCHTITAN'S ARGUMENTS\n"
        "       tp-validate check [options] --model MODEL --flavor FLAVOR --tp N\n"
        "       tp-validate check [options] --hf-config PATH [PATH ...] [--tp N]",
    )
    what = parser.add_argument_group("what to judge")
    what.add_argument(
        "--model", action="once", help="a model of torchtitan, or the dotted path of a package of your own"
    )
    what.add_argument("--flavor", action="once", help="which of its flavors")
    what.add_argument(
        "--hf-config",
        action="collect",
        nargs="+",
        metavar="PATH",
        help="config.json files, folders that hold one, or - for standard input; neither torch nor "
        "transformers is needed, and nothing is fetched",
    )
    what.add_argument(
        "--tp",
        action="collect",
        type=tp_degrees,
        metavar="N",
        help="TP degree: 4, or a range 1-64, or 2,4,8; without it the degrees that work for a Hugging Face "
        "config are listed",
    )
    what.add_argument(
        "--framework",
        "--plan",
        action="once",
        choices=[framework.value for framework in huggingface.Framework],
        help="whose rule judges a Hugging Face config: torchtitan (default; every kind of head is split "
        "whole) or transformers (native tensor parallelism: query and key-value heads alone)",
    )
    what.add_argument(
        "--skip-unrelated",
        action="store_true",
        help="skip files that are no model config at all, instead of exit status 2",
    )
    ranks = parser.add_argument_group("of a run")
    ranks.add_argument(
        "--world-size",
        type=positive,
        action="once",
        metavar="N",
        help="how many ranks it will have (default: WORLD_SIZE, where it is set)",
    )
    ranks.add_argument(
        "--gpus-per-node",
        type=positive,
        action="once",
        metavar="N",
        help="how many of them share a node: degrees that cross nodes are told",
    )
    add_repairs(ranks)
    add_degrees(parser)
    add_output(parser)
    hint = "files follow --hf-config, and a run's arguments follow --"
    parser.set_defaults(run=run, parser=parser, command="check", hint=hint)


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    requested = [
        options.torchtitan_arguments is not None,
        options.model is not None,
        options.hf_config is not None,
    ]
    if sum(requested) != 1:
        options.parser.error(
            "name one thing to judge: -- and torchtitan's arguments, --model, or --hf-config"
        )
    _check_options(options)
    files.check_not_an_input(options.output_file, _inputs(options))
    verdicts = Verdicts("check", options.tp or (), many=len(options.hf_config or ()) > 1)
    if options.hf_config is None:
        report = _model(options) if options.torchtitan_arguments is None else _run(options)
        with formats.writing(options, verdicts) as write:
            write(report)
    else:
        # Without a TP degree, whatever else is requested must fit at TP 1.
        choices = [degrees(options, tp) for tp in options.tp or (1,)]
        with formats.writing(options, verdicts) as write:
            for name in options.hf_config:
                write(_hf_config(name, choices, options))
    return verdicts.exit_status


def _check_options(options: Any) -> None:
    """Refuse what the verdict would not look at: whoever gives it takes it to be judged."""
    parser = options.parser
    if options.torchtitan_arguments is not None:
        kind, name = "a run", "a run, which has its own: give it after --"
        if options.tp is not None:
            parser.error("the run has its own TP degree: give it after --")
    elif options.model is not None:
        kind, name = "a model", "a model of torchtitan"
        if options.flavor is None:
            parser.error("--flavor is missing: which flavor of the model?")
        if options.tp is None:
            parser.error("--tp is missing: which degree, or range of degrees?")
    else:
        kind = options.framework or huggingface.Framework.TORCHTITAN.value
        name = f"a Hugging Face config by {possessive(kind)} rule"
        if options.cp is not None and options.seq_len is None:
            parser.error("--cp changes nothing without --seq-len: the sequence is what both cut")
        if options.hf_config.count(files.STDIN) > 1:
            parser.error("--hf-config: standard input (-) can be read once only")
    for option, flag in _OPTIONS.items():
        if getattr(options, option) not in (None, False) and option not in _LOOKED_AT[kind]:
            parser.error(f"{flag} changes nothing for {name}")


def _inputs(options: Any) -> list[str]:
    if options.hf_config is not None:
        return [_file(name) for name in options.hf_config]
    if options.torchtitan_arguments is None:
        return []
    return [word.partition("=")[2] or word for word in options.torchtitan_arguments]


def _run(options: Any) -> Report:
    from torchtitan_tp_validate.cli import torchtitan

    with torchtitan.installed():
        report = torchtitan.judge_run(options.torchtitan_arguments, run_options(options))
    if options.world_size is None:
        return report
    searched = ["layouts", "--near", "--world-size", str(options.world_size)]
    return replace(report, search=shlex.join(["tp-validate", *searched, "--", *options.torchtitan_arguments]))


def _model(options: Any) -> Report:
    from torchtitan_tp_validate.cli import torchtitan

    with torchtitan.installed():
        return torchtitan.judge_flavor(
            options.model, options.flavor, [degrees(options, tp) for tp in options.tp]
        )


def _hf_config(name: str, choices: Sequence[Degrees], options: Any) -> Report:
    """Return the verdict on one file, whatever happens: the others are judged all the same."""
    framework = options.framework or huggingface.Framework.TORCHTITAN.value
    file, called, at, skipped = _file(name), files.shown(name), None, False
    if name != files.STDIN:
        called, at = name, Location(file)
    try:
        content, text = files.read_json(file)
        plan = huggingface.read(content, content, choices[0], framework=huggingface.Framework(framework))
        judgements = judge(plan, choices)
        broken = next((judgement.error for judgement in judgements if judgement.error), None)
        if at and broken:
            at = Location(file, files.line_of(text, f'"{broken.violations[0].dim}"'))
        listed = options.tp is None and broken is None
        shown = () if listed else judgements
        return Report(called, shown, plan, framework=framework, location=at, listed=listed)
    except NotAModelConfigError as error:
        note, skipped = str(error), options.skip_unrelated
    except UnreadableError as error:
        note = f"{error}{_about_the_hub(name) if error.missing else ''}"
        # Broken, or never meant to be a model's: a config that transformers wrote says what it is.
        unrelated = error.text is not None and not any(word in error.text for word in _OF_A_MODEL)
        skipped = options.skip_unrelated and unrelated
    except PlanError as error:
        note = str(error)
    except Exception as error:
        note = unexpected(error)
    return Report(called, note=note, framework=framework, location=at, skipped=skipped)


def _file(name: str) -> str:
    return os.path.join(name, "config.json") if name != files.STDIN and os.path.isdir(name) else name


def _about_the_hub(name: str) -> str:
    """Return what to say of a missing file whose name may be that of a model on the Hugging Face Hub."""
    if not _HUB_ID.fullmatch(name) or name.endswith(".json"):
        return ""
    folder = name.rpartition("/")[2]
    return (
        " If that is a model on the Hugging Face Hub: nothing is fetched here. Get its config first, with "
        f"'hf download {name} config.json --local-dir {folder}', and name that folder."
    )
