"""What a rank of a layout holds between two steps, and sends in one, as torchtitan itself lays it out.

Nothing is estimated: the job's Trainer lays the model of full size out on meta, under a fake process group of
all ranks, and the shards that it makes are counted. What is sent, and what a step holds beside them, is
counted in a step of that Trainer, see `traffic` and `peak`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from torchtitan_tp_validate.errors import RehearsalError

_PROGRAM = "torchtitan_tp_validate.rehearsal.memory_program"
_MOST_OUTPUT = 2000


@dataclass(frozen=True)
class State:
    """What the rank holds that holds the most, in bytes.

    Attributes:
        parameters: its shards of them.
        gradients: of those that are trained, laid out as they are. FSDP does so; without it torchtitan of
            0.2.x leaves a gradient as autograd made it, which may be more.
        optimizer: the optimizer's state, from the first step on.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def gib(self) -> str:
        """All of it in GiB, for people."""
        return in_gib(self.total)


def in_gib(count: int) -> str:
    """Return a number of bytes in GiB, for people."""
    return f"{count / 2**30:.2f}"


@dataclass(frozen=True)
class Sent:
    """What a rank, the first of its stage, sends in the collectives of one group of ranks in a step.

    Attributes:
        rank: the one that sends.
        axes: those in which the ranks differ, of the experts ``ep``.
        ranks: of the group.
        bytes: where no rank sends more than it has to: a rank that puts ``b`` bytes in sends ``(n - 1) b`` to
            gather them from n ranks, ``(n - 1) b / n`` to scatter sums or exchange parts, and twice that to
            reduce them.
    """

    rank: int
    axes: tuple[str, ...]
    ranks: tuple[int, ...]
    bytes: int

    def spans_nodes(self, gpus_per_node: int) -> bool:
        """Return whether the ranks are on several nodes."""
        return len({rank // gpus_per_node for rank in self.ranks}) > 1


@dataclass(frozen=True)
class Traffic:
    """What the first rank of every stage sends and holds in a step, which is not the first and is not logged.

    Attributes:
        sent: by rank and group of ranks.
        peak: at the least, the bytes that the tensors which the step makes take at once: activations,
            gathered weights, gradients. A kernel keeps what it is given, no more. Of the rank with the most.
        taken: the same with the parameters and the optimizer's state of that rank, which has the most of all.
        uncounted: why nothing was counted, or empty.
    """

    sent: tuple[Sent, ...] = ()
    peak: int = 0
    taken: int = 0
    uncounted: str = ""

    @property
    def gib(self) -> str:
        """What the step holds in GiB, for people."""
        return in_gib(self.peak)


class LayoutMeter:
    """Lays layouts of one job out, one after the other, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], answers: IO[str], output: Path) -> None:
        self._process = process
        self._answers = answers
        self._output = output

    def measure(self, degrees: Mapping[str, int], world_size: int) -> State:
        """Return what a layout holds.

        Args:
            degrees: field under ``[parallelism]`` -> degree.
            world_size: the number of ranks.

        Raises:
            RehearsalError: the job cannot be laid out, and why.
        """
        return State(**self._answer({"degrees": dict(degrees), "world_size": world_size}))

    def follow_step(self, degrees: Mapping[str, int], world_size: int) -> Traffic:
        """Return what is sent, and held, in a step of a layout.

        Args:
            degrees: field under ``[parallelism]`` -> degree.
            world_size: the number of ranks.
        """
        try:
            found = self._answer({"degrees": dict(degrees), "world_size": world_size, "step": True})
        except RehearsalError as error:
            return Traffic(uncounted=str(error).partition("\n")[0])
        ranks = found["ranks"]
        sent = [
            Sent(rank["rank"], tuple(one["axes"]), tuple(one["ranks"]), one["bytes"])
            for rank in ranks
            for one in rank["sent"]
        ]
        peak = max(one["peak"] for one in ranks)
        return Traffic(tuple(sent), peak, max(one["peak"] + one["kept"] for one in ranks))

    @cached_property
    def whole(self) -> State:
        """What all ranks that share one copy of the model hold together, without padding.

        Raises:
            RehearsalError: the model cannot be built, and why.
        """
        return State(**self._answer({}))

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        # Where it has ended, the answer says so.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            text = self._output.read_text(encoding="utf-8", errors="replace").strip()[-_MOST_OUTPUT:]
            raise RehearsalError(f"what lays the job out ended with status {self._process.wait()}", text)
        read: dict[str, Any] = json.loads(answer)
        if "problem" in read:
            verb = "followed through a step" if "step" in asked else "laid out"
            raise RehearsalError(f"the job cannot be {verb}: {read['problem']}")
        return read


@contextmanager
def layout_meter(
    arguments: Sequence[str], *, replicate_kv_heads: bool = False, model: str = "", flavor: str = ""
) -> Iterator[LayoutMeter]:
    """Give what measures layouts of the job that torchtitan makes of these arguments.

    Without arguments, of a plain job of a model: its name and flavor.
    """
    with tempfile.TemporaryDirectory(prefix="tp-validate-memory-") as folder:
        output = Path(folder) / "output.txt"
        reader, writer = os.pipe()
        with output.open("wb") as stream, os.fdopen(reader, encoding="utf-8") as answers:
            process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM, str(writer), folder],
                env={
                    "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled",
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                text=True,
            )
            os.close(writer)
            try:
                request: dict[str, Any] = {
                    "arguments": list(arguments),
                    "model": model,
                    "flavor": flavor,
                    "replicate_kv_heads": replicate_kv_heads,
                }
                assert process.stdin is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                yield LayoutMeter(process, answers, output)
            finally:
                process.kill()
                process.communicate()
