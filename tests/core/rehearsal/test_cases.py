from __future__ import annotations

import pytest

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.truth.kv_replication import parse


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("llama3:8/2", (4, 1, 1, 1)),
        ("llama3:8/2:tp=2", (2, 2, 1, 1)),
        ("llama3:8/2:tp=1", (1, 4, 1, 1)),
        ("llama3:8/2:tp=2,pp=2", (2, 1, 1, 2)),
        ("llama3:8/2:tp=2,dp_replicate=2", (2, 1, 2, 1)),
        ("llama3:8/2:tp=1,dp_replicate=2", (1, 2, 2, 1)),
    ],
)
def test_the_ranks_that_no_degree_takes_shard_the_data(text: str, degrees: tuple[int, ...]) -> None:
    case = Case.parse(text, ranks=4)
    assert (case.tp, case.dp, case.dp_replicate, case.pp) == degrees
    assert case.world_size == 4


def test_a_text_names_numbers_and_words() -> None:
    settings = {"spmd_backend": "full_dtensor", "ac": "full", "ep": 2, "tp": 4}
    assert Case.parse("qwen3:8/2:backend=full_dtensor,ac=full,ep=2", ranks=4) == Case(
        "qwen3", n_heads=8, n_kv_heads=2, **settings
    )


def test_the_key_is_the_case_in_words() -> None:
    case = Case("gpt_oss", "hidden", 2, 8, 2, {"hidden": 129, "dim": 64}, "spmd_types", 21, 2, 4)
    assert case.key == "gpt_oss spmd_types tp=2 dp=2 ep=4 heads=8/2 dim=64 hidden=129 seed=21"
    guarded = Case("qwen3", tp=4, guard="install", upstream_check=True)
    assert guarded.key == "qwen3 tp=4 heads=8/4 guard=install upstream_check=True"


def test_one_process_is_asked_about_a_model_once_for_all_degrees_and_guards() -> None:
    case = Case("qwen3", "hidden", 2, 8, 2, {"hidden": 129}, "full_dtensor", 21, head_dim=18)
    others = Case("qwen3", "", 4, 8, 2, {"hidden": 129}, "full_dtensor", 21, head_dim=18, guard="wrapper")
    assert case.in_one_process == others.in_one_process
    assert case.in_one_process.world_size == 1
    assert case.in_one_process.key == "qwen3 full_dtensor tp=1 heads=8/2 hidden=129 seed=21 head_dim=18"


def test_a_case_is_data() -> None:
    case = Case("llama3", tp=2, sizes={"hidden": 129}, guard="wrapper")
    assert Case(**case.as_dict()) == case


def test_a_recorded_line_of_kv_replication_is_run_unchecked() -> None:
    case = parse("llama3:8/1:head_dim=18,tp=2,unchecked=1")
    assert (case.guard, case.upstream_check, case.replicate_kv_heads) == ("none", False, True)
    assert (case.tp, case.dp, case.head_dim, case.as_trainer) == (2, 2, 18, True)
