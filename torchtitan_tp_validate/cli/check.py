"""``tp-validate check``: does this run, model or Hugging Face config fit its degrees?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torchtitan_tp_validate.cli import files, output
from torchtitan_tp_validate.cli.arguments import add_degrees, add_output, degrees, tp_degrees
from torchtitan_tp_validate.cli.report import Location, Report, exit_status, judge
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plans import huggingface

_EXAMPLES = """\
examples:
  tp-validate check -- --module qwen3_5 --config qwen35_35b_a3b --parallelism.tensor_parallel_degree 4
  tp-validate check -- --job.config_file llama3_8b.toml --parallelism.tensor_parallel_degree 16
  tp-validate check --model qwen3_5 --flavor 35B-A3B --tp 4
  tp-validate check --hf-config path/to/config.json --tp 1-64
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "check",
        help="judge a run, a model or Hugging Face configs",
        description="Judge a torchtitan run (its own arguments after --), one of torchtitan's models, or "
        "Hugging Face configs.",
        epilog=_EXAMPLES,
        usage="tp-validate check [options] -- TORCHTITAN'S ARGUMENTS\n"
        "       tp-validate check [options] --model MODEL --flavor FLAVOR --tp N\n"
        "       tp-validate check [options] --hf-config PATH [PATH ...] --tp N",
    )
    what = parser.add_argument_group("what to judge")
    what.add_argument("--model", help="a model of torchtitan, or the dotted path of a package of your own")
    what.add_argument("--flavor", help="which of its flavours")
    what.add_argument(
        "--hf-config",
        nargs="+",
        metavar="PATH",
        help="config.json files, or folders that hold one; neither torch nor transformers is needed",
    )
    what.add_argument("--tp", type=tp_degrees, metavar="N", help="TP degree: 4, or a range 1-64, or 2,4,8")
    what.add_argument(
        "--plan",
        choices=[framework.value for framework in huggingface.Framework],
        default=huggingface.Framework.TORCHTITAN.value,
        help="whose rule judges a Hugging Face config: torchtitan (default; every kind of head is split "
        "whole) or transformers (native tensor parallelism: query and key-value heads alone)",
    )
    add_degrees(parser)
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="check")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    asked = [
        options.torchtitan_arguments is not None,
        options.model is not None,
        options.hf_config is not None,
    ]
    if sum(asked) != 1:
        options.parser.error(
            "name one thing to judge: -- and torchtitan's arguments, --model, or --hf-config"
        )
    if options.torchtitan_arguments is not None:
        if options.tp is not None:
            options.parser.error("the run has its own TP degree: give it after --")
        reports = [_run(options.torchtitan_arguments)]
    else:
        if options.tp is None:
            options.parser.error("--tp is missing: which degree, or range of degrees?")
        if options.model is not None:
            if options.flavor is None:
                options.parser.error("--flavor is missing: which flavor of the model?")
            reports = [_model(options)]
        else:
            reports = [_hf_config(path, options) for path in options.hf_config]
    output.emit(options, reports, lambda: output.verdicts(reports))
    return exit_status(reports)


def _run(arguments: Sequence[str]) -> Report:
    from torchtitan_tp_validate.cli import torchtitan

    with torchtitan.at_hand():
        return torchtitan.judge_run(arguments)


def _model(options: Any) -> Report:
    from torchtitan_tp_validate.cli import torchtitan

    with torchtitan.at_hand():
        return torchtitan.judge_flavor(
            options.model, options.flavor, [degrees(options, tp) for tp in options.tp]
        )


def _hf_config(name: str, options: Any) -> Report:
    framework = huggingface.Framework(options.plan)
    file = os.path.join(name, "config.json") if os.path.isdir(name) else name
    try:
        content, text = files.read_json(file)
        choices = [degrees(options, tp) for tp in options.tp]
        plan = huggingface.read(content, content, choices[0], framework=framework)
        judgements = judge(plan, choices)
    except (files.UnreadableError, PlanError) as error:
        return Report(name, note=str(error), framework=framework.value, location=Location(name))
    broken = next((judgement.error for judgement in judgements if judgement.error), None)
    word = f'"{broken.violations[0].dim}"' if broken else ""
    return Report(
        name,
        judgements,
        plan,
        framework=framework.value,
        location=Location(file, files.line_of(text, word) if word else None),
    )
