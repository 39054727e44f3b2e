"""Random runs through torchtitan's own set-up: does the Trainer get built where the rules say that it does?

A run is a small model with random degrees, batch, sequence and pipeline. The ranks have a fake process group,
so that there can be hundreds; the first rank of every stage is set up, and the last of all. Nothing is
trained: what dies in the first step, or is silently wrong, is the layouts' to show (`layouts`).
"""

from __future__ import annotations

import copy
import csv
import json
import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, degrees_of_job
from torchtitan_tp_validate.layout import SCHEDULES
from torchtitan_tp_validate.rehearsal.children import Children, run_in_fork
from torchtitan_tp_validate.rehearsal.cpu import join_fake_ranks
from torchtitan_tp_validate.rehearsal.jobs import Request, plain_job
from torchtitan_tp_validate.rehearsal.jobs.batch import Batch, set_batch
from torchtitan_tp_validate.rehearsal.truth.verdicts import verdict_of
from torchtitan_tp_validate.rules import RUN_RULES

MODELS = {
    "0.2": (
        *("llama3 debugmodel", "qwen3 debugmodel", "qwen3 debugmodel_moe", "llama4 debugmodel"),
        *("deepseek_v3 debugmodel", "gpt_oss debugmodel"),
    ),
    "0.3": (
        *("llama3 debugmodel", "qwen3 debugmodel_non_fused_qkv", "qwen3 debugmodel_moe"),
        *("qwen3_5 debugmodel", "qwen3_5 debugmodel_moe", "muse_glimmer debugmodel"),
        *("deepseek_v3 debugmodel", "kimi_k2_7 debugmodel", "gpt_oss debugmodel"),
    ),
}
MODELS["main"] = MODELS["0.3"]
"""Line -> its small flavors, which are set up with any number of layers."""

SETS_UP = "sets up"
_PATIENCE_SECONDS = 60.0
_MOST_ERROR = 200
_LOUD = frozenset(RUN_RULES) - {
    "MESH004",
    "MESH006",
    "MESH007",
    "PP008",
    "NODE001",
    "DATA001",
    "VAL001",
    "VAL002",
    "VAL003",
    "VAL004",
    "TIE001",
    "CP003",
    "CP004",
    "PP010",
    "PP011",
    "PP012",
}
"""The rules whose breach torchtitan's set-up itself ends: not what warns, trains wrong or dies in a step."""


@dataclass(frozen=True)
class SetUp:
    """A run, and what came of it; all values as a table has them.

    Attributes:
        model: name and flavor.
        n_layers: how many layers it is given.
        world_size: the number of ranks.
        degrees: of the axes, as ``tp2 ep2 dp_shard-1``; those that are left out are 1.
        batch: local, global and microbatch size.
        seq_len: in tokens.
        backend: ``spmd_backend`` of torchtitan 0.3.x.
        schedule: of the pipeline.
        stages: layers of a stage, and what the first and the last are spared, as ``- 1 1``.
        parts: how many stages ``module_fqns_per_model_part`` names, or empty.
        tied: ``no`` where a flavor's tie of embedding and head is undone, else empty.
        verdict: ``fits``, or the codes of the rules that are broken.
        outcome: ``sets up``, or what the Trainer of a rank stops with.
    """

    model: str
    n_layers: str
    world_size: str
    degrees: str
    batch: str
    seq_len: str
    backend: str
    schedule: str
    stages: str
    parts: str = ""
    tied: str = ""
    verdict: str = ""
    outcome: str = ""

    @property
    def run(self) -> tuple[str, ...]:
        """What the run is, without what came of it."""
        return tuple(getattr(self, field.name) for field in fields(self)[:-2])

    @property
    def is_missed(self) -> bool:
        """Whether torchtitan stops what the rules let through."""
        return self.verdict == "fits" and self.outcome != SETS_UP

    @property
    def is_falsely_refused(self) -> bool:
        """Whether torchtitan sets up what breaks nothing but rules that its set-up holds itself."""
        return self.outcome == SETS_UP and self.verdict != "fits" and set(self.verdict.split()) <= _LOUD


def read(path: Path) -> list[SetUp]:
    """Return the rows of a recorded table."""
    with path.open(newline="", encoding="utf-8") as file:
        return [SetUp(**row) for row in csv.DictReader(file)]


def write(path: Path, rows: Iterable[SetUp]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SetUp)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def draw(line: str, number: int, seed: int = 0) -> list[SetUp]:
    """Return random runs of a line, the same each time: most have one thing that is wrong, or none."""
    rng = random.Random(f"{line} {seed}")
    drawn: dict[tuple[str, ...], SetUp] = {}
    while len(drawn) < number:
        one = _draw_one(line, rng)
        drawn[one.run] = one
    return list(drawn.values())


def _draw_one(line: str, rng: random.Random) -> SetUp:
    pick = rng.choice
    model = pick(MODELS[line])
    has_experts = any(word in model for word in ("moe", "llama4", "deepseek", "kimi", "gpt_oss"))
    degrees = {
        "tp": pick((1, 1, 1, 2, 2, 4)),
        "cp": pick((1, 1, 1, 1, 1, 2, 4)),
        "pp": pick((1, 2, 2, 3, 4, 8)) if model not in _WITHOUT_STAGES or rng.random() < 0.1 else 1,
        "dp_replicate": pick((1, 1, 1, 2, 3)),
        "dp_shard": pick((1, 2, 2, 3, 4, 8, 16)),
    }
    ranks = degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
    if has_experts and rng.random() < 0.6:
        degrees["ep"] = pick([ep for ep in (1, 2, 4, 8) if ranks % ep == 0])
        if line == "0.2" and degrees["ep"] > 1 and ranks % (degrees["ep"] * degrees["tp"]) == 0:
            degrees["etp"] = pick((1, degrees["tp"]))
    schedule = pick(list(SCHEDULES))
    stages = degrees["pp"] * SCHEDULES[schedule].default_stages
    micro = pick((1, 1, 2, 3))
    microbatches = pick((stages, 2 * stages, 2 * stages)) if degrees["pp"] > 1 else pick((1, 2, 5))
    local = micro * microbatches
    data_ranks = degrees["dp_replicate"] * degrees["dp_shard"]
    run = {
        "world": math.prod(degrees[axis] for axis in ("tp", "cp", "pp", "dp_replicate", "dp_shard")),
        "local": local,
        "whole": pick((-1, -1, local * data_ranks, 2 * local * data_ranks)),
        "micro": micro,
        "seq_len": pick((64, 128, 192)),
        "n_layers": max(stages + pick((-2, -1, 0, 0, 1, 2, 4, 8)), 4),
        "per_stage": "-",
        "first": pick((0, 1, 1, 1)),
        "last": pick((0, 1, 1, 1)),
        "parts": "",
    }
    if rng.random() < 0.4:
        degrees["dp_shard"] = -1
    for _ in range(pick((0, 0, 1, 1, 1, 1, 2, 3))):
        schedule = _change_one(run, degrees, schedule, rng)
    if line == "main":
        # Its config takes no step without a token.
        run["whole"] = run["whole"] or 1
    return SetUp(
        model=model,
        n_layers=str(run["n_layers"]),
        world_size=str(run["world"]),
        degrees=" ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree != 1),
        batch=f"{run['local']} {run['whole']} {run['micro']}",
        seq_len=str(run["seq_len"]),
        backend=pick(_BACKENDS[line]) if line in _BACKENDS else "",
        schedule=schedule,
        stages=f"{run['per_stage']} {run['first']} {run['last']}",
        parts=str(run["parts"]),
        tied=pick(("", "no", "no", "no")) if degrees["pp"] > 1 else "",
    )


_WITHOUT_STAGES = ("qwen3 debugmodel", "qwen3 debugmodel_moe", "gpt_oss debugmodel")
"""Of 0.2.x; in 0.3.x they have them, and half of the runs with a pipeline are of others."""


_BACKENDS = {
    "0.3": ("spmd_types", "spmd_types", "partial_dtensor", "full_dtensor"),
    "main": ("spmd_types", "spmd_types", "partial_dtensor"),
}


def _change_one(run: dict[str, Any], degrees: dict[str, int], schedule: str, rng: random.Random) -> str:
    """Change one thing of a run, which may break a rule; return the schedule."""
    pick = rng.choice
    what = pick(
        ("world", "ep", "etp", "local", "whole", "micro", "seq_len", "n_layers", "stages", "schedule")
    )
    if what == "world":
        run["world"] = pick((run["world"] + 1, 2 * run["world"], max(1, run["world"] // 2)))
    elif what == "ep":
        degrees["ep"] = pick((2, 3, 4, 8))
    elif what == "etp" and "etp" in degrees:
        degrees["etp"] = pick((1, 2, degrees["tp"]))
    elif what == "local":
        run["local"] = pick((1, 2, 3, 5, run["local"] + 1, run["local"] + run["micro"]))
    elif what == "whole":
        run["whole"] = pick((0, run["local"], run["local"] + 1, 3 * run["local"]))
    elif what == "micro":
        run["micro"] = pick((1, 2, 3, 4))
    elif what == "seq_len":
        run["seq_len"] = pick((33, 60, 62, 68, 96, 2**20))
    elif what == "n_layers":
        run["n_layers"] = pick((1, 2, 3, 5, 7))
    elif what == "stages":
        if rng.random() < 0.4 and degrees["pp"] > 1:
            run["parts"] = pick((degrees["pp"], 2 * degrees["pp"], degrees["pp"] + 1))
        else:
            run["per_stage"] = pick(("-", "1", "2", "3"))
            run["first"], run["last"] = pick((0, 1, 2, 3)), pick((0, 1, 2, 3))
    elif what == "schedule":
        return str(pick((*SCHEDULES, "gpipe", "Interleaved2F2B")))
    return schedule


class Runner:
    """Runs set-ups in forks of this process, which has imported torchtitan."""

    def __init__(self, line: ModuleType) -> None:
        self._line = line
        line.prepare(False)
        self._jobs: dict[str, Any] = {}

    def job(self, one: SetUp) -> Any:
        """Return the job of a set-up; torchtitan of 0.2.x keeps its model in a registry that is changed."""
        if one.model not in self._jobs:
            name, flavor = one.model.split()
            job = plain_job(self._line.parse(Request(model=name, flavor=flavor)))
            if getattr(job.optimizer, "optimizer_factory_kwargs_by_name", None):
                from torchtitan.components.optimizer import default_adamw

                # DistMuon runs on CUDA only.
                job.optimizer = default_adamw()
            self._jobs[one.model] = job, _registered(name).get(flavor)
        job, args = copy.deepcopy(self._jobs[one.model])
        if args is not None:
            # Another set-up has changed them.
            name, flavor = one.model.split()
            _registered(name)[flavor] = args
        _put(job, one)
        return job

    def judge(self, one: SetUp) -> str:
        """Return what the rules say of a set-up."""
        return verdict_of(self.job(one), int(one.world_size))

    def run(self, one: SetUp) -> SetUp:
        """Return a set-up with what comes of it."""
        with tempfile.TemporaryDirectory(prefix="tp-validate-set-up-") as folder:
            out = Path(folder)
            run_in_fork(partial(self._write_found, one, out), out / "output.txt")
            found = json.loads((out / "found.json").read_text(encoding="utf-8"))
        return SetUp(**{**asdict(one), **found})

    def _write_found(self, one: SetUp, out: Path) -> None:
        job = self.job(one)
        verdict = verdict_of(job, int(one.world_size))
        job.parallelism.module_fqns_per_model_part = None
        self._line.make_small(job, degrees_of_job(job), out)
        _put(job, one)
        outcome = self._set_up(job, one, out)
        (out / "found.json").write_text(json.dumps({"verdict": verdict, "outcome": outcome}))

    def _set_up(self, job: Any, one: SetUp, out: Path) -> str:
        world, pp = int(one.world_size), getattr(job.parallelism, PIPELINE_FLAG)
        # A stage is a slice of the ranks: pp is the outermost axis.
        probed = sorted({min(stage * max(world // pp, 1), world - 1) for stage in range(pp)} | {world - 1})
        children = Children(out, _PATIENCE_SECONDS)
        for rank in probed:
            (end,) = children.run("set-up", 1, partial(self._rank, job, one, rank, out))
            if end.how != "ended":
                return f"{end.how}: {_one_line(end.error)}"
        return SETS_UP

    def _rank(self, job: Any, one: SetUp, rank: int, out: Path, _: int, enter: Any) -> None:
        join_fake_ranks(job, rank, int(one.world_size))
        enter("setting up")
        local, whole, micro = map(int, one.batch.split())
        self._line.build_trainer(job, lambda *_: iter(()), local, micro, global_batch_size=whole)
        (out / "set-up-rank0.json").write_text("{}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MOST_ERROR]


def _put(job: Any, one: SetUp) -> None:
    """Set what a set-up says in a job of its model."""
    degrees = dict(_degree(word) for word in one.degrees.split())
    parallelism, training = job.parallelism, job.training
    for axis in (*FLAGS, "pp"):
        field = PIPELINE_FLAG if axis == "pp" else FLAGS[axis]
        if hasattr(parallelism, field):
            setattr(parallelism, field, degrees.get(axis, 1))
    local, whole, micro = map(int, one.batch.split())
    set_batch(job, Batch(int(one.seq_len), local, micro, whole))
    parallelism.pipeline_parallel_schedule = one.schedule
    per_stage, first, last = one.stages.split()
    parallelism.pipeline_parallel_layers_per_stage = None if per_stage == "-" else int(per_stage)
    parallelism.pipeline_parallel_first_stage_less_layers = int(first)
    parallelism.pipeline_parallel_last_stage_less_layers = int(last)
    if one.backend:
        parallelism.spmd_backend = one.backend
        training.disable_cuda_graphs = True
    n_layers = int(one.n_layers)
    head = "lm_head" if one.backend else "output"
    if one.parts:
        parallelism.module_fqns_per_model_part = _parts(n_layers, int(one.parts), head)
    model = _set_layers(job, n_layers)
    if one.tied and getattr(model, "enable_weight_tying", False):
        model.enable_weight_tying = False


def _degree(word: str) -> tuple[str, int]:
    axis = word.rstrip("-0123456789")
    return axis, int(word.removeprefix(axis))


def _parts(n_layers: int, stages: int, head: str) -> list[list[str]]:
    """Return the layers dealt out to stages, the last of which get none where there are too few."""
    names = ["tok_embeddings", *(f"layers.{index}" for index in range(n_layers)), "norm", head]
    each = math.ceil(len(names) / stages)
    return [names[each * stage : each * (stage + 1)] for stage in range(stages)]


def _registered(name: str) -> Any:
    """Return the model args that torchtitan 0.2.x has registered for a model, by flavor; 0.3.x has none."""
    try:
        from torchtitan.protocols.train_spec import get_train_spec
    except ImportError:
        return {}
    return get_train_spec(name).model_args


def _set_layers(job: Any, n_layers: int) -> Any:
    """Give the job's model this many layers, by repeating its own; return its config."""
    if hasattr(job, "model_spec"):
        model = job.model_spec.model
        layers = model.layers
        model.layers = [copy.deepcopy(layers[index % len(layers)]) for index in range(n_layers)]
        return model
    args = _registered(job.model.name)[job.model.flavor]
    args.n_layers = n_layers
    return args
