"""The layouts that are found: all that the launcher would let through, and no other."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from importlib import resources
from typing import Any

import jsonschema
import pytest

from tests.torchtitan.installed import RELEASE
from tests.torchtitan.test_runs import OLD, codes, job
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG
from torchtitan_tp_validate.errors import KVReplicationError, UnknownNameError
from torchtitan_tp_validate.job import Options
from torchtitan_tp_validate.plan import divisors
from torchtitan_tp_validate.releases import line_of
from torchtitan_tp_validate.search import AXES, Search
from torchtitan_tp_validate.wrappers.guard import guardable_functions

SCHEMA = json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema-layouts.json").read_text())
RUN = (
    ["--model.name", "llama3", "--model.flavor", "debugmodel"]
    if OLD
    else ["--module", "llama3", "--config", "llama3_debugmodel", "--training.disable_cuda_graphs"]
)
in_sequences = pytest.mark.requires(torchtitan="0.")
"""With the flags of a batch, which main does not have."""
WORLDS = (2, 4, 6, 8)
MODELS = (
    [
        *[("llama3", "debugmodel"), ("llama3", "8B"), ("qwen3", "debugmodel"), ("qwen3", "debugmodel_moe")],
        *[("llama4", "debugmodel"), ("deepseek_v3", "debugmodel"), ("gpt_oss", "debugmodel")],
    ]
    if OLD
    else [
        *[("llama3", "debugmodel"), ("qwen3", "debugmodel"), ("muse_glimmer", "debugmodel")],
        *[("qwen3_5", "qwen35_debugmodel"), ("qwen3_5", "qwen35_debugmodel_moe")],
        *[("qwen3", "debugmodel_moe_param_groups"), ("deepseek_v3", "debugmodel"), ("gpt_oss", "debugmodel")],
        ("kimi_k2_7", "kimi_k2_5_debugmodel"),
    ]
)
"""Of the lines together 16 models, of which some are in both; on each of the numbers of ranks."""
DENSE = [("llama3", "debugmodel"), ("llama3", "8B"), ("qwen3", "debugmodel"), ("muse_glimmer", "debugmodel")]
DENSE += [("qwen3_5", "qwen35_debugmodel")]
SHARED = [("llama3", "debugmodel"), ("qwen3", "debugmodel_moe"), ("qwen3", "debugmodel_moe_param_groups")]
"""Those whose heads are shared, too."""
CASES = [(*model, False, world_size) for model in MODELS for world_size in WORLDS]
CASES += [(*model, True, world_size) for model in MODELS if model in SHARED for world_size in (4, 6)]
CASES += [("llama3", "debugmodel", False, 12)]


def search(config: Any, world_size: int, **more: Any) -> Search:
    line_of(config).requested_model(config)  # or its module may not be imported, and nothing to be guarded
    options = Options(world_size=world_size, **more.pop("options", {}))
    return Search(config, guarded=guardable_functions(), options=options, **more)


def degrees_of(found: Search) -> list[dict[str, int]]:
    """The degrees of all layouts that work, of more than one rank."""
    return [
        {axis: layout.of(axis) for axis in found.axes if layout.of(axis) > 1} for layout in found.confirmed()
    ]


def in_other_degrees(config: Any, degrees: dict[str, int]) -> Any:
    changed = copy.deepcopy(config)
    for axis, field in AXES.items():
        if hasattr(changed.parallelism, field):
            setattr(changed.parallelism, field, degrees.get(axis, 1))
    return changed


def in_its_time(case: tuple[Any, ...]) -> Any:
    """A case, which most worlds of 8 ranks and more make a long one."""
    is_long = case[-1] >= 8 and case[0] != "llama3"
    return pytest.param(*case, marks=pytest.mark.long if is_long else ())


@pytest.mark.parametrize(("model", "flavor", "replicates", "world_size"), map(in_its_time, CASES))
def test_the_layouts_that_work_are_those_of_brute_force(
    model: str, flavor: str, replicates: bool, world_size: int
) -> None:
    config = job(model, flavor, config_name=flavor if flavor.startswith(("qwen35", "kimi")) else "", batch=8)
    if line_of(config).requested_model(config) is None:
        pytest.skip(f"torchtitan {RELEASE} has no {model} {flavor}")
    options = {"replicate_kv_heads": replicates}
    before = repr(config)
    found = degrees_of(search(config, world_size, options=options))
    works: list[dict[str, int]] = []
    # Every combination of degrees, those that are no layout at all included: the rules know.
    etps = divisors(world_size) if OLD else [1]
    experts = [1] if (model, flavor) in DENSE else divisors(world_size)
    for tp, cp, pp, dp_replicate, dp_shard in itertools.product(divisors(world_size), repeat=5):
        if tp * cp * pp * dp_replicate * dp_shard != world_size:
            continue
        for ep, etp in itertools.product(experts, etps):
            if etp not in (1, tp) or (ep == 1 and etp > 1):
                continue
            degrees = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
            degrees |= {"dp_replicate": dp_replicate, "dp_shard": dp_shard}
            # Where heads are shared, some layouts are refused before they are judged.
            with contextlib.suppress(KVReplicationError):
                if not codes(in_other_degrees(config, degrees), world_size=world_size, **options):
                    works.append({axis: degrees[axis] for axis in AXES if degrees[axis] > 1})
    assert sorted(found, key=str) == sorted(works, key=str)
    # gpt_oss of 0.2.2 trains wrong in every layout, tied models of 0.2.x under FSDP die.
    assert found or RELEASE.startswith("0.2")
    assert repr(config) == before


def test_the_first_layouts_have_the_fewest_stages_and_tensor_parallel_ranks() -> None:
    found = degrees_of(search(job(batch=8), 4))
    assert found[0] == {"dp_shard": 4}
    keys = [[one.get(axis, 1) for axis in AXES] for one in found]
    assert keys == sorted(keys)


def test_near_layouts_change_the_fewest_degrees_by_the_least() -> None:
    config = job(tensor_parallel_degree=32, data_parallel_shard_degree=-1, batch=8)
    found = search(config, 32, near=True)
    first = next(found.confirmed())
    assert {axis: first.of(axis) for axis in found.axes if first.of(axis) > 1} == {"tp": 16, "dp_shard": 2}
    # What is left to the ranks needs no word.
    assert found.arguments(first) == [f"--parallelism.{FLAGS['tp']}", "16"]


def test_a_kept_axis_has_the_run_s_own_degree() -> None:
    config = job(pipeline_parallel_degree=2, tensor_parallel_degree=2, batch=8)
    found = degrees_of(search(config, 8, keep=("tp",)))
    assert found
    assert {one["tp"] for one in found} == {2}
    with pytest.raises(UnknownNameError, match="has no axis 'zz'"):
        search(config, 8, keep=("zz",))


def test_an_axis_that_crosses_nodes_comes_last_and_is_told() -> None:
    found = search(job(batch=8), 16, options={"gpus_per_node": 4})
    told = [[problem.code for problem in layout.warnings] for layout in found.confirmed()]
    assert told == sorted(told, key=len)
    assert told[-1] == ["NODE001"]


def test_every_excluded_layout_is_counted_under_its_rules() -> None:
    found = search(job(batch=1, pipeline_parallel_schedule="1F1B"), 32)
    assert found.considered - len(found.candidates) <= sum(found.excluded.values())
    assert found.excluded["TP001"] == 1
    assert found.excluded["PP005"] > 1
    assert found.judged == 0


def test_an_allowed_rule_excludes_nothing() -> None:
    config = job(batch=1, pipeline_parallel_schedule="1F1B")
    assert search(config, 4).excluded["PP005"]
    assert not search(config, 4, options={"allow": ("PP005",)}).excluded["PP005"]


@in_sequences
def test_the_command_prints_layouts_and_what_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layouts", "--world-size", "8", "--limit", "2", "--near", "--", *RUN]
    words += ["--parallelism.tensor_parallel_degree", "32", "--training.local_batch_size", "8"]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "llama3 debugmodel on 8 ranks:"
    assert out[2].split() == [*(AXES if OLD else [a for a in AXES if a != "etp"]), "told", "repairs"]
    assert out[6] == "The first is the run with: --parallelism.tensor_parallel_degree 8"
    assert "layouts are there; arithmetic leaves" in out[8]


def test_the_document_follows_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layouts", "--world-size", "4", "--output-format", "json", "--", *RUN]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, SCHEMA)
    assert document["layouts"][0]["degrees"]["dp_shard"] == 4
    assert document["layouts"][0]["bytes_per_rank"] is None
    assert document["considered"] >= document["left_by_arithmetic"] >= document["judged"]


@in_sequences
def test_nothing_that_works_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layouts", "--world-size", "2", "--keep", "tp,pp,cp", "--", *RUN]
    words += ["--parallelism.pipeline_parallel_schedule", "1F1B"]
    assert main([*words, f"--parallelism.{PIPELINE_FLAG}", "2", "--training.local_batch_size", "1"]) == 1
    out = capsys.readouterr().out
    assert "No layout works." in out
    assert "PP005 1" in out


def test_a_refused_run_is_told_how_to_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RUN, "--parallelism.tensor_parallel_degree", "32"]
    assert main(["check", "--world-size", "8", "--", *words]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    search = "tp-validate layouts --near --world-size 8 -- "
    assert last == f"The layouts that work, nearest first: {search}{' '.join(words)}"
    # And that is a command that finds some.
    assert main(last.partition("tp-validate ")[2].split()) == 0
    assert main(["check", "--", *words]) == 1
    assert "nearest first" not in capsys.readouterr().out.splitlines()[-1]
