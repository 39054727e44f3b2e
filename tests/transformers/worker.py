"""What every rank does under torchrun: load tiny models by native TP, and compare with one process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torchtitan_tp_validate as tpv
from tests.transformers import models

INPUT_IDS = [[5, 17, 33, 64, 100, 3, 199, 240], [9, 8, 7, 6, 5, 4, 3, 11]]


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load one model with and without TP; what came out."""
    report: dict[str, Any] = {"case": case["name"], "rank": dist.get_rank(), "stage": "load"}
    if dist.get_rank() == 0:
        models.save(folder, case["family"], **case["text"])
    dist.barrier()
    cls, _ = models.FAMILIES[case["family"]]()
    tokens = torch.tensor(INPUT_IDS)
    with torch.no_grad():
        one = cls.from_pretrained(folder, dtype=torch.float32)
        expected = one(input_ids=tokens).logits
        generated = _generate(one, tokens)
    if case["mode"] != "stock":
        tpv.install(fix_tp_plan=case["mode"] == "fixed")
    opened = _count_opened()
    try:
        model = cls.from_pretrained(folder, dtype=torch.float32, **models.tp_arguments(dist.get_world_size()))
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        report.update(head_rows=_rows(head), embedding_rows=_rows(embedding), stage="forward")
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
            report.update(expected_width=expected.shape[-1], width=logits.shape[-1], stage="generate")
            if logits.shape == expected.shape:
                report["difference"] = float((logits - expected).abs().max())
                report["same_tokens"] = _generate(model, tokens) == generated
        report["stage"] = "done"
    except Exception as error:
        report.update(error=type(error).__name__, message=str(error), trace=traceback.format_exc())
    finally:
        tpv.uninstall()
    report["files_opened"] = opened()
    return report


def _generate(model: Any, tokens: torch.Tensor) -> Any:
    return model.generate(input_ids=tokens, do_sample=False, max_new_tokens=6, min_new_tokens=6).tolist()


def _rows(weight: Any) -> int:
    return (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]


def _count_opened() -> Callable[[], int]:
    """Count the weight files that transformers opens from now on, until asked."""
    import transformers.modeling_utils as modeling

    original, opened = modeling.safe_open, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        opened.append(args)
        return original(*args, **kwargs)

    modeling.safe_open = counting

    def count() -> int:
        modeling.safe_open = original
        return len(opened)

    return count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    reports = []
    for number, case in enumerate(json.loads(options.cases.read_text(encoding="utf-8"))):
        reports.append(run_case(case, options.out / f"model{number}"))
        dist.barrier()
    path = options.out / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(reports), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
