"""What the rules say of a job, in a word or in their codes, as the recorded tables have it."""

from __future__ import annotations

import copy
from typing import Any

from torchtitan_tp_validate.job import Options, Verdict, judge_job
from torchtitan_tp_validate.wrappers.guard import guardable_functions

_MOST = 200


def verdict_of(job: Any, world_size: int, **options: Any) -> str:
    """Return ``fits``, the codes of the broken rules, or why a job is not judged.

    Args:
        job: it is left as it is.
        world_size: the number of ranks.
        options: further fields of `Options`.
    """
    verdict = _judge(job, Options(world_size=world_size, **options))
    if verdict.error is None:
        return "fits" if not verdict.unread else f"not judged: {' '.join(verdict.unread.split())[:_MOST]}"
    codes = {violation.code for violation in verdict.error.violations}
    return " ".join(sorted(codes | {problem.code for problem in verdict.error.problems}))


def repairs_of(job: Any, world_size: int, *, replicate_kv_heads: bool) -> tuple[str, ...]:
    """Return the codes of the faults that a job would suffer from without their repair."""
    options = Options(world_size=world_size, replicate_kv_heads=replicate_kv_heads, repair=True)
    return _judge(job, options).repairs


def _judge(job: Any, options: Options) -> Verdict:
    verdict = judge_job(copy.deepcopy(job), guarded=guardable_functions(), options=options)
    assert verdict is not None
    return verdict
