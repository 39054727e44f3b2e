"""The layouts of the truth in which the ranks of tensor parallelism share key-value heads.

Each is run as `layout_runs` runs any other: torchtitan's own Trainer, compared with one process. A word of
a model says its heads: ``shared_heads=8/1`` is eight query heads and one key-value head for all of them.
``lora=4`` is torchtitan's LoRA converter, of rank 4, on every linear or those behind ``on``, after which
the job is given shared heads; ``balancer`` is what evens out the work of CP.
"""

from __future__ import annotations

from functools import partial

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

SHARED_LAYOUTS: dict[str, tuple[Layout, ...]] = {
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
        _0_3(_QWEN, "tp2 cp2", checkpointing="selective"),
        _0_3(_QWEN, "tp2 cp2", backend="partial_dtensor"),
        _0_3(f"qwen3 debugmodel {_ONE}", "tp2 cp2", checkpointing="full", tied="yes"),
        _0_3(_MOE, "tp2 cp2"),
        _0_3(_MOE, "tp2 ep2 cp2"),
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
"""Line -> layouts."""
