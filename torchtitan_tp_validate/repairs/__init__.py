"""Opt-in: mend faults of released torchtitan at run time, by the codes of `rules.FAULTS`.

``install(repair=True)`` and the launcher's ``--repair`` apply those that a run needs, before its model is
built. Each proves first that the code it mends is the code it knows. What each does is measured by
``tests/rehearsal/test_repairs.py``: a run beside one process, without and with it; for CKPT001, by
``tests/torchrun/test_hugging_face_weights.py``; for CKPT005 and CKPT006, by
``tests/rehearsal/test_resumption.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torchtitan_tp_validate.errors import RepairError
from torchtitan_tp_validate.releases import nearest_line
from torchtitan_tp_validate.releases.sources import installed_faults

REPAIRS = {
    "CKPT001": "permuted_heads",
    "CKPT005": "transposed_experts",
    "CKPT006": "optimizer_states",
    "NUM001": "router_gradients",
    "NUM002": "router_gradients",
    "NUM003": "expert_bias",
    "NUM004": "expert_bias",
    "NUM005": "output_bias",
    "NUM006": "local_map",
    "NUM007": "frozen_weights",
    "NUM008": "loss_scale",
    "NUM009": "loss_scale",
    "NUM010": "router_bias",
    "NUM011": "rotary_embedding",
    "NUM014": "sent_gradients",
    "NUM015": "split_backward",
    "NUM016": "tied_weights",
}
"""Code of a fault -> the module of this package that mends it."""


def apply(codes: Iterable[str]) -> None:
    """Mend these faults, until `undo`; what is mended already stays so.

    Args:
        codes: keys of `REPAIRS`.

    Raises:
        RepairError: the code at fault is not the one that the repair is for; nothing is mended then.
    """
    patches = []
    for name in dict.fromkeys(REPAIRS[code] for code in codes):
        found = importlib.import_module(f"{__name__}.{name}").patches()
        if not found:
            raise RepairError(f"{name.replace('_', ' ')}: there is nothing to repair in this torchtitan.")
        patches += found
    for patch in patches:
        patch.check()
    for patch in patches:
        patch.apply()


def apply_all() -> None:
    """Mend every known fault that is in the installed torchtitan and can be mended, whatever the model."""
    line = nearest_line()
    sources = line.FAULT_SOURCES if line is not None else {}
    apply(sorted(installed_faults(sources, sources.keys() & REPAIRS.keys())))


def undo() -> None:
    """Put the original objects back, wherever a repair still stands."""
    from torchtitan_tp_validate.repairs import patching

    patching.undo_all()
