"""Stands in for `truth` in its runner's test: each case ends in the way that its dimension says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

OUT_OF_STEP = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    with (options.out / f"rank{rank}.jsonl").open("w", encoding="utf-8") as out:

        def write(**ended: Any) -> None:
            print(json.dumps(ended), file=out, flush=True)

        for case in json.loads(options.cases.read_text(encoding="utf-8")):
            end(case, rank, write)


def end(case: dict[str, Any], rank: int, write: Any) -> None:
    from tests.distributed.truth_cases import from_dict

    report = {
        "key": from_dict(case).key,
        "rank": rank,
        "verdict": {"word": "compatible", "codes": [], "text": ""},
        "stage": "forward",
        "error_type": None,
        "message": None,
        "loss_difference": 0.0,
        "gradient_difference": 0.0,
        "worst_gradient": "w",
        "seconds": 0.1,
    }
    raised = {**report, "truth": "exception", "error_type": "ValueError", "message": "no"}
    match case["dimension"]:
        case "equal":
            write(**report, truth="equal", final=True)
        case "exception":
            write(**raised, final=True)
        case "one rank different":
            write(**report, truth="different" if rank else "equal", final=True)
        case "out of step":
            write(**raised, final=True)
            raise SystemExit(0)
        case "one rank raises":
            if rank:
                time.sleep(600)
            write(**raised, final=False)
            os._exit(OUT_OF_STEP)
        case "hang":
            time.sleep(600)
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
