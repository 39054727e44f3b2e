"""What completing the plan saves, in memory per rank of lm_head, and what it does to the logits.

    torchrun --nproc-per-node 2 scripts/hf_lm_head.py

Qwen3.5-MoE (the vision-language wrapper) with its real vocabulary, four layers deep and otherwise small, in
fp32 over gloo, by native tensor parallelism of the transformers at hand. Logits are compared with those of
one process.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import torchtitan_tp_validate as tpv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.transformers.models import FAMILIES, save, tp_arguments

VOCAB, HIDDEN = 248_320, 512
"""Of Qwen3.5-35B-A3B; its hidden size is 2048, and the ratio does not depend on it."""


def load(folder: Path, tokens: torch.Tensor, **arguments: Any) -> tuple[int, torch.Tensor]:
    """Bytes of lm_head on this rank, and the logits of the last position."""
    cls, _ = FAMILIES["qwen3_5_moe"]()
    model = cls.from_pretrained(folder, dtype=torch.float32, **arguments)
    weight = model.get_output_embeddings().weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    with torch.no_grad():
        logits = model(input_ids=tokens, logits_to_keep=1).logits.clone()
    size = local.numel() * local.element_size()
    del model, weight, local
    gc.collect()
    return size, logits


def main() -> None:
    """Load stock and fixed, compare both with one process, and print."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    folder = Path(str(box[0]))
    if dist.get_rank() == 0:
        save(folder, "qwen3_5_moe", vocab_size=VOCAB, hidden_size=HIDDEN)
    dist.barrier()
    tokens = torch.arange(3, 19).unsqueeze(0)
    whole, expected = load(folder, tokens)
    before, stock = load(folder, tokens, **tp_arguments(tp))
    with tpv.installed():
        tpv.install(fix_tp_plan=True)
        after, fixed = load(folder, tokens, **tp_arguments(tp))
    if dist.get_rank() == 0:
        print(f"transformers {transformers.__version__}, TP {tp}, lm_head {VOCAB} x {HIDDEN} in fp32")
        print(f"one process:    {whole / 2**20:7.1f} MiB")
        for name, size, logits in (("stock", before, stock), ("with the fix", after, fixed)):
            difference = float((logits - expected).abs().max() / expected.abs().max())
            print(
                f"{name + ':':15} {size / 2**20:7.1f} MiB per rank = {size / whole:.3f} of it; "
                f"largest logits difference {difference:.1e} of the largest logit"
            )
        print(f"fix over stock: {after / before:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
