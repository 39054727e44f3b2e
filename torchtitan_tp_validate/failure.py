"""What torchrun shows of a refusal when its workers have ended: the text once, and no traceback.

torchrun prints the error file of every rank. That of an exception holds a traceback, which says nothing of
a refusal, and the refusal of every rank is the same.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from torchtitan_tp_validate.errors import TPValidateError


def recorder() -> Any:
    """Return a handler for torch's ``record`` that writes a refusal in full on one rank of each torchrun.

    Source: ``ErrorHandler.record_exception`` and ``ChildFailedError`` in
    ``torch/distributed/elastic/multiprocessing/errors``, torch 2.13 and 2.15.
    """
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    class Recorder(ErrorHandler):  # type: ignore[misc]
        def record_exception(self, e: BaseException) -> None:
            file = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if file and isinstance(e, TPValidateError):
                _write(file, e)
            else:
                super().record_exception(e)

    return Recorder()


def _write(file: str, error: TPValidateError) -> None:
    local_rank, rank = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK"))
    text, at = f"{type(error).__name__}: {error}", time.time()
    if local_rank == 0:
        # torchrun calls the earliest failure the root cause, and shows it last. All ranks refuse for the same
        # reason: let it be the one with the text, as of the moment when torchrun made room for its file.
        at = os.stat(os.path.dirname(file) or ".").st_mtime
    else:
        text = f"{text.splitlines()[0]} (in full: rank {rank - local_rank})"
    content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(at))}}}
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
