"""Each repair of a known fault: the run that shows the fault, without and with it, beside one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest

from tests.rehearsal import warm
from torchtitan_tp_validate.errors import RepairError
from torchtitan_tp_validate.rehearsal.findings import Rehearsal
from torchtitan_tp_validate.rehearsal.told import whole_text
from torchtitan_tp_validate.repairs import REPAIRS
from torchtitan_tp_validate.rules import FAULTS

pytestmark = pytest.mark.xdist_group("rehearsals")

ONE_AT_A_TIME = (
    *("--module", "qwen3", "--config", "qwen3_30b_a3b", "--training.local_batch_size", "1"),
    *("--parallelism.tensor_parallel_degree", "2", "--parallelism.expert_parallel_degree", "1"),
    *("--parallelism.spmd_backend", "partial_dtensor", "--training.disable_cuda_graphs"),
)


def in_four_stages(module: str, config: str) -> dict[str, Any]:
    """Return what to rehearse for a pipeline of four stages, which are tensor parallel and take two rows."""
    words = [
        *("--module", module, "--config", config, "--training.disable_cuda_graphs"),
        *("--parallelism.tensor_parallel_degree", "2", "--parallelism.pipeline_parallel_degree", "2"),
        *("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B", "--training.local_batch_size", "8"),
        *("--parallelism.pipeline_parallel_microbatch_size", "2"),
    ]
    return {"arguments": words, "ranks": 4}


@dataclass(frozen=True)
class Shown:
    """A run that shows a fault.

    Attributes:
        request: what is rehearsed.
        wrong: the first parameter that is wrong, and what is.
    """

    request: dict[str, Any]
    wrong: tuple[str, str]


def at(model: str, **degrees: int | str) -> dict[str, Any]:
    name, flavor = model.split()
    fields = {
        "tp": "tensor_parallel_degree",
        "ep": "expert_parallel_degree",
        "etp": "expert_tensor_parallel_degree",
        "dp": "data_parallel_shard_degree",
        "ddp": "data_parallel_replicate_degree",
        "pp": "pipeline_parallel_degree",
        "backend": "spmd_backend",
    }
    ranks = math.prod(one for name, one in degrees.items() if isinstance(one, int) and "e" not in name)
    of = {fields[name]: one for name, one in degrees.items()}
    return {"model": name, "flavor": flavor, "degrees": of, "ranks": ranks}


GATE = "layers.0.moe.router.gate.weight"
SHOWN: dict[str, dict[str, Shown]] = {
    "0.2": {
        "NUM001": Shown(at("qwen3 30B-A3B", tp=2, dp=1), (GATE, "gradient")),
        "NUM002": Shown(at("llama4 debugmodel", tp=2, ep=2, dp=2), ("layers.1.moe.router.gate", "gradient")),
        "NUM003": Shown(at("gpt_oss debugmodel", tp=2, ep=2, etp=2, dp=2), ("", "")),
        "NUM008": Shown(at("llama3 debugmodel", pp=2, dp=1), ("layers.0", "gradient")),
        "NUM009": Shown(at("llama3 debugmodel", ddp=2, dp=1), ("layers.0", "gradient")),
        "NUM010": Shown(at("gpt_oss debugmodel", tp=2, dp=1), ("gate.bias", "uninitialized")),
    },
    "0.3": {
        "NUM004": Shown(at("gpt_oss 20b", tp=2, dp=1), ("mlp2_bias", "gradient")),
        "NUM005": Shown(at("gpt_oss 20b", tp=2, dp=1, backend="partial_dtensor"), ("wo.bias", "gradient")),
        "NUM006": Shown({"arguments": ONE_AT_A_TIME}, ("norm", "gradient")),
        "NUM014": Shown(in_four_stages("llama3", "llama3_debugmodel"), ("layers.", "gradient")),
    },
}
"""Line -> fault -> a run that shows it.

NUM007 shows in one process too: see ``tests/torchtitan/test_repairs.py``. NUM011 is in `test_rehearsals`.
"""

COMPOSED: dict[str, dict[str, Any]] = {
    "0.2": at("deepseek_v3 16B", tp=2, ep=2, dp=2),
    "0.3": in_four_stages("gpt_oss", "gpt_oss_20b"),
}
"""Line -> a run of several faults."""

OUTSIDE: dict[str, dict[str, Any]] = {
    "0.2": at("llama4 debugmodel", tp=2, dp=1),
    "0.3": at("gpt_oss 20b", tp=2, ep=2, dp=1),
}
"""Line -> a run one step outside of the faults' layouts."""

Rehearse = Callable[[str], Rehearsal]


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Rehearse:
    """Return what came of a run of the installed line, ``... repaired`` with its repairs."""
    line = version("torchtitan")[:3]
    requests = {code: shown.request for code, shown in SHOWN[line].items()}
    requests |= {f"{code} repaired": {**request, "repair": True} for code, request in requests.items()}
    requests |= {"composed repaired": {**COMPOSED[line], "repair": True}, "outside": OUTSIDE[line]}
    out = tmp_path_factory.mktemp("repairs")
    warm.rehearse_all(requests, out)
    return lambda name: warm.found(out, name)


def codes(line: str) -> list[Any]:
    return [pytest.param(code, marks=pytest.mark.requires(torchtitan=line)) for code in SHOWN[line]]


@pytest.mark.parametrize("code", [*codes("0.2"), *codes("0.3")])
def test_a_fault_is_seen_refused_and_repaired(rehearse: Rehearse, code: str) -> None:
    stock, (name, what) = rehearse(code), SHOWN[version("torchtitan")[:3]][code].wrong
    assert stock.outcome == "differs", whole_text(stock)
    assert any(what in one.what and name in one.name for one in stock.differences), whole_text(stock)
    assert code in stock.verdict
    repaired = rehearse(f"{code} repaired")
    assert repaired.outcome == "equal", whole_text(repaired)
    assert repaired.verdict == "fits"
    assert f"{code} repaired" in repaired.stand_ins


@pytest.mark.requires(torchtitan="0.2")
def test_the_router_of_0_2_is_reported_by_name(rehearse: Rehearse) -> None:
    """Upstream issue #1805, mended by #2416 after 0.2.2."""
    seen = rehearse("NUM001")
    assert (seen.outcome, "NUM001" in seen.verdict, seen.output) == ("differs", True, "")
    first = seen.differences[0]
    assert (first.what, first.name, first.step) == ("gradient", GATE, 1)
    assert 0.3 < first.factor < 0.7
    assert "#1805" in first.issue
    assert GATE in [difference.name for difference in seen.differences if difference.what == "copies"]


@pytest.mark.requires(torchtitan="0.2")
def test_the_gradients_of_a_pipeline_of_0_2_are_times_the_tokens_of_a_step(rehearse: Rehearse) -> None:
    """Upstream issue #2972. Clipping hides it from the loss."""
    seen = rehearse("NUM008")
    assert (seen.outcome, seen.degrees, seen.local_batch_sizes) == ("differs", {"pp": 2}, (4, 4))
    first = seen.differences[0]
    # Of 8 sequences of 32 tokens, half of them accumulated: the labels that count.
    assert (round(first.factor), first.looks_like) == (160, "counted once per token of a step")
    assert "#2972" in first.issue


def test_repairs_go_together_and_with_everything_else(rehearse: Rehearse) -> None:
    seen = rehearse("composed repaired")
    assert (seen.outcome, seen.verdict) == ("equal", "fits"), whole_text(seen)


def test_a_step_outside_nothing_is_wrong_and_nobody_is_accused(rehearse: Rehearse) -> None:
    seen = rehearse("outside")
    assert (seen.outcome, seen.verdict) == ("equal", "fits"), whole_text(seen)


def test_what_can_be_repaired_has_a_repair() -> None:
    assert set(REPAIRS) == {code for code, rule in FAULTS.items() if rule.can_be_repaired}


def test_a_repair_knows_the_code_that_it_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan_tp_validate.repairs import apply, undo
    from torchtitan_tp_validate.repairs.patching import digest

    module, name, code = {
        "0.2": ("torchtitan.models.llama4.infra.parallelize", "apply_moe_ep_tp", "NUM001"),
        "0.3": ("torchtitan.protocols.module", "Module._spmd_distribute_state", "NUM007"),
    }[version("torchtitan")[:3]]
    import importlib

    owner, attribute = importlib.import_module(module), name
    if "." in name:
        owner, attribute = getattr(owner, name.partition(".")[0]), name.partition(".")[2]
    original = vars(owner)[attribute]
    try:
        apply([code])
        mended = vars(owner)[attribute]
        assert mended is not original
        apply([code])
        assert vars(owner)[attribute] is mended
    finally:
        undo()
    assert vars(owner)[attribute] is original

    def another(*args: Any, **kwargs: Any) -> None:
        """Somebody's own."""

    monkeypatch.setattr(owner, attribute, another)
    with pytest.raises(RepairError) as caught:
        apply([code])
    assert str(caught.value) == (
        f"{module}.{name} is not the code that its repair is for (its digest is {digest(another)}): it is "
        "mended already, or of a release that is not known. Nothing was repaired."
    )
    assert vars(owner)[attribute] is another
