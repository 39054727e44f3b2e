#!/usr/bin/env python
"""The truth suite: what our verdict says about tiny models, and what happens when they really run.

    scripts/truth.py                    every case of the installed torchtitan
    scripts/truth.py --part small       two ranks and a few minutes: one case per family and dimension
    scripts/truth.py --resume           go on where the last run in the same folder was stopped
    scripts/truth.py --rejudge          take the truth as recorded, and ask the engine again

Each case is run under torchrun, on the CPU over gloo where there are not enough GPUs. Results are
recorded one by one in OUT/results-VERSION.jsonl; at the end the confusion matrix is printed and written to
OUT/truth-VERSION.csv and .md. The exit status is 0 when there is neither a miss nor a false refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from torchtitan_tp_validate import __version__
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.reports import INVALID
from torchtitan_tp_validate.rehearsal.runner import Result, result_from_dict, run_cases
from torchtitan_tp_validate.rehearsal.truth import report
from torchtitan_tp_validate.rehearsal.truth.cases import all_cases, small_cases

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what the command line asks for, and report."""
    options = _parse()
    # torchrun and its ranks are cleaned up by what an exception unwinds, which a plain SIGTERM does not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    release = version("torchtitan")
    versions = {name: version(name) for name in ("torchtitan", "torch")}
    versions["torchtitan-tp-validate"] = __version__
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / f"results-{release}.jsonl"
    keep = options.resume or options.rejudge
    results = _read(record) if keep else {}
    cases = _chosen(options)
    if options.rejudge:
        results = _rejudge([r for key, r in results.items() if key in {case.key for case in cases}])
    else:
        _run([case for case in cases if case.key not in results], results, record, versions, keep=keep)
    reported = [results[case.key] for case in cases if case.key in results]
    table, text = report.write(reported, options.out, versions)
    print(report.as_text(reported))
    print(f"\nWritten to {table} and {text}")
    judgements = {report.judgement(result) for result in reported}
    raise SystemExit(1 if judgements & {report.MISS, report.FALSE_REFUSAL} else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("small", "full"), default="full")
    parser.add_argument(
        "--line", default="auto", help="0.2 or 0.3: insist on that torchtitan being installed"
    )
    parser.add_argument("--backend", nargs="+", help="0.3.x: only these spmd backends")
    parser.add_argument("--family", nargs="+", help="only these families")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--rejudge", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "truth")
    options = parser.parse_args()
    line = ".".join(version("torchtitan").split(".")[:2])
    if options.line not in ("auto", line):
        parser.error(f"torchtitan {version('torchtitan')} is installed, not {options.line}")
    return options


def _chosen(options: argparse.Namespace) -> list[Case]:
    line = installed_line()
    backends = options.backend or {backend for found in line.BACKENDS.values() for backend in found}
    cases = (small_cases if options.part == "small" else all_cases)(line, backends)
    return [case for case in cases if not options.family or case.family in options.family]


def _read(record: Path) -> dict[str, Result]:
    """The recorded results by case; a line that was cut off is left for the next run."""
    if not record.exists():
        return {}
    rows = record.read_text(encoding="utf-8").split("\n")[:-1]
    return {row["key"]: result_from_dict(row) for row in map(json.loads, rows)}


def _run(
    cases: Sequence[Case],
    results: dict[str, Result],
    record: Path,
    versions: dict[str, str],
    *,
    keep: bool,
) -> None:
    """Run the cases, and add their results to ``results`` and to the record as they come."""
    with (
        record.open("a" if keep else "w", encoding="utf-8") as stream,
        tqdm(total=len(cases), unit="case", file=sys.stderr) as bar,
    ):

        def done(result: Result) -> None:
            result = replace(result, versions=versions)
            results[result.case.key] = result
            print(json.dumps(result.as_dict()), file=stream, flush=True)
            bar.set_postfix_str(result.case.key)
            bar.update()

        run_cases(cases, record.parent / f"runs-{versions['torchtitan']}", done=done)


def _rejudge(results: Sequence[Result]) -> dict[str, Result]:
    """The same truths with the verdicts that the engine gives now; nothing is run."""
    from torchtitan_tp_validate.rehearsal.parallelize import judge_case

    line = installed_line()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    line.prepare("cpu")
    judged = {}
    for result in tqdm(results, unit="case", file=sys.stderr):
        if result.truth != INVALID:
            verdict = judge_case(line, result.case)
            result = replace(
                result, verdict=verdict.word, codes=tuple(verdict.codes), verdict_text=verdict.text
            )
        judged[result.case.key] = result
    return judged


if __name__ == "__main__":
    main()
