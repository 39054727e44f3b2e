"""The layouts of the truth in which the ranks of tensor parallelism share key-value heads.

Each is run as `layout_runs` runs any other: torchtitan's own Trainer, compared with one process. A word of
a model says its heads: ``shared_heads=8/1`` is eight query heads and one key-value head for all of them.
``lora=4`` is torchtitan's LoRA converter, of rank 4, on every linear or those behind ``on``, after which
the job is given shared heads; ``compile`` is the backend of torch.compile; ``balancer`` is what evens out the
work of CP.

Some are chosen by hand; the others have every few values of `_AXES` that go together in one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, partial

from torchtitan_tp_validate.rehearsal.truth.layouts import Layout

_LORA = "lora=4"
_LORA_3_5 = "lora=4 on=wo+w1+w2+w3"
_ONE = "shared_heads=8/1"
_TWO = "shared_heads=8/2"

_0_2 = partial(Layout, loss="parallel")
_0_3 = partial(Layout, backend="spmd_types", loss="chunked", sequence_parallel="on")
_LLAMA, _QWEN = f"llama3 debugmodel {_ONE}", f"qwen3 debugmodel_non_fused_qkv {_ONE}"
_MOE = f"qwen3 debugmodel_moe {_ONE}"
_GPT_OSS = f"gpt_oss debugmodel attn_backend=flex {_ONE}"

_BY_HAND: dict[str, tuple[Layout, ...]] = {
    "0.2": (
        _0_2(_LLAMA, "tp2 cp2"),
        _0_2(_LLAMA, "tp2 cp2", loss="whole", checkpointing="full"),
        _0_2(f"llama3 debugmodel {_TWO}", "tp4 cp2"),
        _0_2(f"llama4 debugmodel {_ONE}", "tp2 cp2"),
    ),
    "0.3": (
        _0_3(_LLAMA, "tp2 cp2"),
        _0_3(_LLAMA, "tp2 cp2", sequence_parallel="off", batch="1"),
        _0_3(_LLAMA, "tp2 cp2", backend="partial_dtensor", loss="plain", checkpointing="full"),
        _0_3(_LLAMA, "tp2 pp2 cp2"),
        _0_3(_LLAMA, "tp2 dp_shard2 cp2"),
        _0_3(_LLAMA, "tp2 dp_replicate2 cp2", checkpointing="selective"),
        _0_3(f"llama3 debugmodel {_TWO}", "tp4 cp2"),
        _0_3(
            f"llama3 debugmodel {_TWO} compile=aot_eager",
            "tp4",
            **{"backend": "partial_dtensor", "loss": "plain", "batch": "1"},
            **{"sequence_parallel": "off", "checkpointing": "full"},
        ),
        _0_3(_QWEN, "tp2 cp2", checkpointing="selective"),
        _0_3(_QWEN, "tp2 cp2", backend="partial_dtensor"),
        _0_3(f"qwen3 debugmodel {_ONE}", "tp2 cp2", checkpointing="full", tied="yes"),
        _0_3(_MOE, "tp2 cp2"),
        _0_3(_MOE, "tp2 ep2 cp2"),
        _0_3(f"{_MOE} compile=aot_eager", "tp2 cp2", loss="plain", checkpointing="full"),
        _0_3(_MOE, "tp2 ep4 cp2", sequence_parallel="off"),
        _0_3(_GPT_OSS, "tp2 ep2 cp2"),
        _0_3(_GPT_OSS, "tp2 ep4 cp2", checkpointing="full"),
        _0_3(f"{_QWEN} balancer=ptrr", "tp2 cp2"),
        _0_3(f"{_QWEN} {_LORA}", "tp2"),
        _0_3(f"{_QWEN} {_LORA}", "tp2", backend="partial_dtensor", checkpointing="full"),
        _0_3(f"{_QWEN} {_LORA}", "tp2", backend="full_dtensor", loss="plain"),
        _0_3(f"{_QWEN} {_LORA}", "tp2 dp_shard2 cp2"),
        _0_3(f"qwen3_5 debugmodel {_ONE} {_LORA_3_5}", "tp2"),
        _0_3(f"qwen3_5 debugmodel_moe {_ONE} {_LORA_3_5}", "tp2 ep2"),
    ),
}
_ON_LORA = {"qwen3 debugmodel_non_fused_qkv": _LORA, "qwen3_5 debugmodel_moe": _LORA_3_5}
"""Model -> where it has LoRA, which a fused projection is refused."""

_AXES: dict[str, dict[str, Sequence[str]]] = {
    "0.2": {
        "model": ("llama3 debugmodel", "qwen3 debugmodel", "llama4 debugmodel"),
        "mesh": ("tp2", "tp4", "tp2 dp_shard2"),
        "more": ("",),
        "backend": ("",),
        "loss": ("parallel", "whole"),
        "batch": ("2", "1"),
        "sequence_parallel": ("",),
        "checkpointing": ("none", "full", "selective"),
    },
    "0.3": {
        "model": (
            "llama3 debugmodel",
            "qwen3 debugmodel_non_fused_qkv",
            "qwen3 debugmodel_moe",
            "qwen3_5 debugmodel_moe",
            "gpt_oss debugmodel attn_backend=flex",
            "muse_glimmer debugmodel",
        ),
        "mesh": (
            *(
                "tp2",
                "tp4",
                "tp2 dp_shard2",
                "tp2 dp_replicate2",
                "tp2 pp2",
                "tp2 cp2",
                "tp2 dp_replicate2 cp2",
            ),
            *("tp2 ep2", "tp4 ep2", "tp2 ep2 dp_shard2", "tp2 ep4 dp_shard2", "tp2 ep2 pp2", "tp2 ep2 cp2"),
        ),
        "more": ("", "lora"),
        "backend": ("spmd_types", "partial_dtensor", "full_dtensor"),
        "loss": ("chunked", "plain"),
        "batch": ("2", "1"),
        "sequence_parallel": ("on", "off"),
        "checkpointing": ("none", "full", "selective"),
    },
}
"""Line -> axis -> values; ``more`` is a further word of the model."""

# full_dtensor is gone from main, and context parallelism from its DTensor backend.
_AXES["main"] = {**_AXES["0.3"], "backend": ("spmd_types", "partial_dtensor")}
_BY_HAND["main"] = ()

_TOGETHER = {"0.2": 3, "0.3": 3, "main": 2}
"""Line -> how many of these values there are in one layout, whichever they are."""

_EXPERTS = ("qwen3 debugmodel_moe", "qwen3_5 debugmodel_moe", "gpt_oss debugmodel attn_backend=flex")
_BACKENDS: dict[str, tuple[str, ...]] = {
    "muse_glimmer debugmodel": ("spmd_types",),
    "qwen3_5 debugmodel_moe": ("spmd_types", "partial_dtensor"),
}


def _is_possible(line: str, *, model: str, mesh: str, more: str, backend: str, batch: str, **_: str) -> bool:
    """Whether values go together: torchtitan runs them, and without a known fault."""
    has_experts, is_dtensor = model in _EXPERTS, backend.endswith("dtensor")
    return not (
        (" ep" in mesh and not has_experts)
        or ("gpt_oss" in model and (" ep" not in mesh or is_dtensor))  # NUM004, NUM005
        or ("qwen3_5" in model and any(word in mesh for word in ("tp4", "cp", "pp")))  # TP003, RUN002, NUM014
        or (model in ("qwen3 debugmodel_moe", "muse_glimmer debugmodel") and "pp" in mesh)  # OPT001, NUM014
        or (more == "lora" and model not in _ON_LORA)
        or backend not in _BACKENDS.get(model, (backend,))
        or (backend == "full_dtensor" and "cp" in mesh)  # minutes of planning, see `layouts`
        or (line == "main" and is_dtensor and "cp" in mesh)
        or (is_dtensor and has_experts and batch == "1")  # NUM006
    )


@cache
def shared_layouts(line: str) -> tuple[Layout, ...]:
    """Return the layouts of a line; the further down, the less there is in one that no other has."""
    axes = _AXES[line]
    possible = [
        how
        for values in itertools.product(*axes.values())
        if _is_possible(line, **(how := dict(zip(axes, values, strict=True))))
    ]
    together = _TOGETHER[line]
    has = [{*itertools.combinations(how.items(), together)} for how in possible]
    missing = set().union(*has)
    found = list(_BY_HAND[line])
    for least in range(math.comb(len(axes), together), 0, -1):
        for how, values_of_it in zip(possible, has, strict=True):
            new = missing & values_of_it
            if len(new) >= least:
                found.append(_layout(**how))
                missing -= new
    return tuple(dict.fromkeys(found))


def _layout(model: str, mesh: str, more: str, **how: str) -> Layout:
    heads = _TWO if "tp4" in mesh else _ONE
    added = _ON_LORA[model] if more == "lora" else more
    return Layout(" ".join(filter(None, (model, heads, added))), mesh, **how)
