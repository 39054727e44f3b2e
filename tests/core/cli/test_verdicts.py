"""Verdicts, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchtitan_tp_validate.cli.commands.table import _in_world
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, Status, Verdicts, judge, not_judged
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import ranges
from torchtitan_tp_validate.releases.huggingface import Framework, read


def report(n_kv_heads: int, flavor: str = "8B", world_size: int | None = None) -> Report:
    content = {"num_attention_heads": 8, "num_key_value_heads": n_kv_heads, "num_hidden_layers": 2}
    plan = read(content, content, Degrees(tp=1), framework=Framework.TORCHTITAN)
    judgements = judge(plan, [Degrees(tp=2), Degrees(tp=4)])
    found = Report(f"llama3 {flavor}", judgements, plan, group="llama3", listed=True)
    return _in_world(found, world_size)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([1, 2], "1, 2"), ([1, 2, 3, 4, 8], "1-4, 8"), ([2, 4, 8], "2, 4, 8")],
)
def test_ranges_of_degrees_in_few_words(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_the_exit_status_is_that_of_the_worst() -> None:
    fits = Report("a", (Judgement(Degrees(tp=2), None),))
    bad = Report("b", report(2).judgements, report(2).plan)
    skipped, unread = Report("c", note="why", skipped=True), Report("d", note="why")
    assert [r.status for r in (fits, bad, skipped, unread, report(2))] == [
        Status.COMPATIBLE,
        Status.INCOMPATIBLE,
        Status.SKIPPED,
        Status.NOT_VALIDATED,
        Status.LISTED,
    ]
    for reports, status in (([fits, skipped], 0), ([fits, skipped, bad], 1), ([fits, bad, unread], 2)):
        verdicts = Verdicts("audit")
        for one in reports:
            verdicts.note(one)
        assert (verdicts.exit_status, verdicts.judged_none) == (status, False)
    only = Verdicts("audit")
    only.note(skipped)
    assert (only.exit_status, only.judged_none) == (0, True)


def test_a_rule_that_was_left_out_is_named_behind_every_verdict() -> None:
    whole = report(2)
    assert whole.plan is not None
    plan = replace(whole.plan, not_judged=("TP009: the run has no seq_len",))
    for degrees in ([Degrees(tp=2)], [Degrees(tp=4)], [Degrees(tp=2), Degrees(tp=4)]):
        one = Report("a", judge(plan, degrees), plan)
        verdicts = Verdicts("check", many=False)
        assert verdicts.line(one).endswith(" Not validated: TP009: the run has no seq_len.")
        text = "\n".join(line for line, _ in verdicts.full(one))
        assert text.count("Not validated: TP009: the run has no seq_len.") == 1
        assert verdicts.item(one)["not_judged"] == ["TP009: the run has no seq_len"]
    assert "Not validated" not in Verdicts("check").line(whole)


def test_what_was_left_out_is_one_sentence() -> None:
    report = Report("it", unread=("it is parallelized by f, which is not guarded.", "TP009: none"))
    assert not_judged(report) == (
        " Not validated: it is parallelized by f, which is not guarded; TP009: none."
    )
