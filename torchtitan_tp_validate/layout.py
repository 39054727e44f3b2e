"""Why a run as a whole cannot start, whatever its model splits: mesh, pipeline, sequence, batch.

What each rule is about, and what happens otherwise, is in `RUN_RULES`; here is when one is broken. All of it
is arithmetic on what the job says, and on the number of ranks where that is known.

Source: ``ParallelDims``, ``pipeline_llm`` and ``Trainer`` of torchtitan 0.2.x, 0.3.0 and main, and
``torch/distributed/pipelining/schedules.py`` of torch 2.10 to 2.15.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from torchtitan_tp_validate.checkpoint import Checkpoint
from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, Degrees
from torchtitan_tp_validate.errors import Problem
from torchtitan_tp_validate.rules import RUN_RULES, Line


@dataclass(frozen=True)
class Schedule:
    """A schedule of torch, as far as it decides whether a pipeline can be built.

    Attributes:
        least_stages: how many stages a rank has at least.
        most_stages: how many at most, or None.
        least_is_stages: whether it wants at least one microbatch for each stage.
        in_rounds: whether the microbatches must be a multiple of its rounds, which are as many as groups of
            ``pp`` microbatches, and one at least.
        splits_backward: whether it computes the gradients of weights apart from those of inputs, and later.
    """

    least_stages: int
    most_stages: int | None = None
    least_is_stages: bool = False
    in_rounds: bool = False
    splits_backward: bool = False

    @property
    def default_stages(self) -> int:
        """How many stages torchtitan gives a rank where the job does not say."""
        return 1 if self.most_stages == 1 else 2


SCHEDULES = {
    "1F1B": Schedule(1, 1, least_is_stages=True),
    "GPipe": Schedule(1, 1),
    "Interleaved1F1B": Schedule(2, in_rounds=True),
    "InterleavedZeroBubble": Schedule(2, in_rounds=True, splits_backward=True),
    "LoopedBFS": Schedule(2),
    "ZBVZeroBubble": Schedule(2, 2, splits_backward=True),
    "DualPipeV": Schedule(2, 2, least_is_stages=True, splits_backward=True),
}
"""Every schedule of torch that a job can name, in any case of its letters."""

_BY_LOWER_CASE = {name.lower(): schedule for name, schedule in SCHEDULES.items()}


MICROBATCHES_FIELD = "num_pp_microbatches"
"""Of main, under ``[parallelism]``."""


@dataclass(frozen=True)
class Pipeline:
    """How a run is cut into stages.

    Attributes:
        degree: the number of ranks that hold a stage or more each.
        schedule: its name.
        is_supported: whether torchtitan can split the model at all.
        layers_per_stage: as the job says, or None.
        first_less: ``pipeline_parallel_first_stage_less_layers``.
        last_less: ``pipeline_parallel_last_stage_less_layers``.
        parts: ``module_fqns_per_model_part``, or None where torchtitan splits the layers by itself.
        microbatch_size: in sequences.
        microbatches: as the job says, or None where they follow from the local batch.
        from_file: whether a file of the user's own is the schedule.
        overlaps_experts: whether DualPipeV is to overlap the experts' communication, and activations are
            checkpointed, which torchtitan cannot do at once.
        lacks_cache: whether what runs it writes to a cache that the stages of the installed torch lack.
    """

    degree: int = 1
    schedule: str = "1F1B"
    is_supported: bool = True
    layers_per_stage: int | None = None
    first_less: int = 1
    last_less: int = 1
    parts: tuple[tuple[str, ...], ...] | None = None
    microbatch_size: int = 1
    microbatches: int | None = None
    from_file: bool = False
    overlaps_experts: bool = False
    lacks_cache: bool = False


@dataclass(frozen=True)
class Sizes:
    """What torchtitan calls the sizes of a batch, under ``[training]``.

    Attributes:
        local: what a data rank computes at a time; in a pipeline that is a microbatch, where the job says how
            many of these there are.
        total: what all of them compute in a step.
        seq_len: the tokens that are split over the ranks of sequence and context parallelism.
        in_a_row: whether the sequences of a batch are one row of tokens, without a dimension of their own.
    """

    local: str = "local_batch_size"
    total: str = "global_batch_size"
    seq_len: str = "seq_len"
    in_a_row: bool = False


@dataclass(frozen=True)
class Validation:
    """How a run validates; one that does not is as good as one of which nothing is known.

    Attributes:
        to_the_end: the field by which each rank validates all that it has of the data, or empty.
        stopped_by: why the validator cannot run the model, or empty.
        batch_size: of a validator that has its own, in sequences.
        counts_parts: whether its loss is divided by the tokens of one context parallel rank.
    """

    to_the_end: str = ""
    stopped_by: str = ""
    batch_size: int | None = None
    counts_parts: bool = False


@dataclass(frozen=True)
class Run:
    """A run as a whole.

    Attributes:
        degrees: of everything but the pipeline; where the number of ranks is known, its data parallel shard
            degree is.
        line: whose rules hold for it.
        pipeline: its stages.
        n_layers: of the model.
        modules: the modules of the model beside its layers that a stage has to name.
        sizes: the names of the following, and of ``degrees.seq_len``.
        local_batch_size: in sequences or tokens, or None where it is not known.
        global_batch_size: the same, or None where it is what the ranks make of it.
        unfed: what the model asks for that the batches of its data lack, or empty.
        validation: how it validates.
        gives_buffers_away: whether its model or loss is compiled so that its backward pass runs once.
        recomputes_selectively: whether chosen operations of a layer are recomputed in its backward pass.
        shards_before_backward: whether FSDP shards weights again before their backward pass: all of them, or
            those of the output where the loss comes in chunks.
        world_size: the number of ranks, or None where it is not known.
        gpus_per_node: how many of them share a node, or None.
        shards_with_experts: whether the parallelize function takes a sharding mesh for granted where there is
            expert parallelism, or shards experts with the data alone (False); None where it asks otherwise.
        has_every_mesh: whether it is there, be it of one rank.
        wraps_attention: whether context parallelism wraps the attention of each stage, which must have some.
        mask_block: how many tokens a block of the masks has that context parallelism cuts, or None where it
            cuts none.
        uncut: what of the model context parallelism does not cut, or empty.
        uncut_beside_tp: whether that is so beside tensor parallelism only.
        whole_sequence: the attention of the model that takes no part of a sequence, where its backend asks.
        patterns: of the optimizer's groups of parameters, in their order.
        parameters: the names of all of them; empty where the patterns take whatever there is.
        has_experts: whether the model has routed experts.
        shares_with_fsdp: whether the embedding and the output are one weight that FSDP would have to share.
        full_dtensor: whether the SPMD backend is that, whose context parallelism gathers keys and values by
            ``local_map``.
        changes_embedding: whether the first stage does something to the embedding's output before its layers.
        permuted_heads: the key-value heads whose rows are permuted as Hugging Face weights are loaded or
            saved, or None where none are.
        checkpoint: what it starts from, or None.
        faults: the codes of the known faults that the model has in the installed torchtitan, see `faults`.
        refusal: what torchtitan's own checks say of the model's config in this run, or empty.
        objection: what something else than these checks says there, or empty.
        late_refusal: what its parallelize function says before it touches the model, or empty.
    """

    degrees: Degrees
    line: Line
    pipeline: Pipeline = Pipeline()
    n_layers: int | None = None
    modules: tuple[str, ...] = ()
    sizes: Sizes = Sizes()
    local_batch_size: int | None = None
    global_batch_size: int | None = None
    unfed: str = ""
    validation: Validation = Validation()
    gives_buffers_away: bool = False
    recomputes_selectively: bool = False
    shards_before_backward: bool = False
    world_size: int | None = None
    gpus_per_node: int | None = None
    shards_with_experts: bool | None = None
    has_every_mesh: bool = False
    wraps_attention: bool = False
    mask_block: int | None = None
    uncut: str = ""
    uncut_beside_tp: bool = False
    whole_sequence: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    has_experts: bool = False
    shares_with_fsdp: bool = False
    full_dtensor: bool = False
    changes_embedding: bool = False
    permuted_heads: int | None = None
    checkpoint: Checkpoint | None = None
    faults: frozenset[str] = frozenset()
    refusal: str = ""
    objection: str = ""
    late_refusal: str = ""

    @property
    def rows_at_a_time(self) -> int | None:
        """How many rows a data rank computes at a time, or None where that is not known."""
        if self.sizes.in_a_row:
            return 1
        return self.pipeline.microbatch_size if self.pipeline.degree > 1 else self.local_batch_size


def known_shards(degrees: Degrees, pp: int, world_size: int | None) -> Degrees:
    """Return the degrees with the data parallel shard degree that is left to the number of ranks.

    Where nothing is left over, they stay as they are, and `find_problems` says so.
    """
    if degrees.dp_shard_is_known or world_size is None:
        return degrees
    others = degrees.ranks // degrees.dp_shard * pp
    if world_size < others:
        return degrees
    return replace(degrees, dp_shard=world_size // others, dp_shard_is_known=True)


def find_problems(run: Run) -> tuple[Problem, ...]:
    """Return everything that speaks against a run as a whole, in the order of `RUN_RULES`."""
    return tuple(
        Problem.of(RUN_RULES[code], run.line, *found)
        for code, find in _CONDITIONS.items()
        if run.line in RUN_RULES[code].otherwise
        for found in find(run)
    )


_Found = Iterator[tuple[str, str]]
"""What is wrong, with its values; and what to do, where that is more than the rule itself knows."""


def _world(run: Run) -> _Found:
    degrees, pp = run.degrees, run.pipeline.degree
    if run.world_size is None:
        return
    factors = {FLAGS[field]: getattr(degrees, field) for field in ("dp_replicate", "dp_shard", "cp", "tp")}
    factors[PIPELINE_FLAG] = pp
    others = degrees.dp_replicate * degrees.cp * degrees.tp * pp
    if not degrees.dp_shard_is_known:
        yield (
            f"{_product({**factors, FLAGS['dp_shard']: 1})} is more than the {run.world_size} ranks, and no "
            "shard is left",
            f"start {others} ranks or a multiple, or lower a degree",
        )
    elif others * degrees.dp_shard != run.world_size:
        fits, rest = divmod(run.world_size, others)
        yield (
            f"{_product(factors)} is not the number of ranks ({run.world_size})",
            f"set {FLAGS['dp_shard']} to {fits}" if fits and not rest else _ranks_or_degrees(others),
        )


def _factors(factors: dict[str, int]) -> str:
    return " x ".join(f"{name} ({degree})" for name, degree in factors.items() if degree != 1) or "1"


def _product(factors: dict[str, int]) -> str:
    several = sum(degree != 1 for degree in factors.values()) > 1
    return _factors(factors) + (f" = {math.prod(factors.values())}" if several else "")


def _ranks_or_degrees(others: int) -> str:
    return f"start a multiple of {others} ranks, or change a degree: the others take {others} ranks together"


def _experts_mesh(run: Run) -> _Found:
    degrees = run.degrees
    if degrees.ep > 1 and degrees.dp_shard_is_known and not degrees.makes_a_mesh:
        ranks, etp = degrees.dp_shard * degrees.cp * degrees.tp, degrees.etp
        experts = f"{FLAGS['ep']} ({degrees.ep})" + (f" x {FLAGS['etp']} ({etp})" if etp > 1 else "")
        yield (
            f"{experts} does not divide the {ranks} ranks that "
            f"{_factors({FLAGS[field]: getattr(degrees, field) for field in ('dp_shard', 'cp', 'tp')})} make",
            f"set {FLAGS['ep']} to a divisor of {ranks // math.gcd(ranks, etp)} that divides the number of "
            "experts, or change the others",
        )


def _expert_tensor(run: Run) -> _Found:
    degrees = run.degrees
    if degrees.ep > 1 and degrees.etp not in (1, degrees.tp):
        yield f"{FLAGS['etp']} ({degrees.etp}) is neither 1 nor {FLAGS['tp']} ({degrees.tp})", ""


def _fsdp(degrees: Degrees) -> bool:
    """Whether 0.2.x shards parameters over data; where that is left to the ranks, it may."""
    return degrees.dp_shard * degrees.cp > 1 or not degrees.dp_shard_is_known


def _replicas(run: Run) -> _Found:
    degrees, pp = run.degrees, run.pipeline.degree
    sharded = _fsdp(degrees) or (degrees.ep > 1 and run.shards_with_experts)
    if degrees.dp_replicate > 1 and degrees.tp * pp > 1 and not sharded:
        others = {FLAGS["tp"]: degrees.tp, PIPELINE_FLAG: pp}
        yield (
            f"{FLAGS['dp_replicate']} ({degrees.dp_replicate}) stands beside {_factors(others)}, "
            f"and {FLAGS['dp_shard']} is 1",
            "",
        )


def _experts_sharded(run: Run) -> _Found:
    degrees = run.degrees
    if degrees.ep > 1 and run.shards_with_experts and not run.has_every_mesh and not _fsdp(degrees):
        yield f"{FLAGS['ep']} is {degrees.ep}, and neither the data nor the sequence is sharded", ""


def _experts_summed(run: Run) -> _Found:
    degrees = run.degrees
    copies = degrees.tp // (degrees.ep * degrees.etp)
    with_data = run.has_experts and run.shards_with_experts is False
    if degrees.ep > 1 and copies > 1 and with_data and not _fsdp(degrees):
        yield (
            f"{FLAGS['tp']} ({degrees.tp}) / {FLAGS['ep']} ({degrees.ep}) = {copies} ranks have the same "
            "experts, and neither the data nor the sequence is sharded",
            f"shard the data ({FLAGS['dp_shard']} of 2 or more), or set {FLAGS['ep']} to {degrees.tp}, if "
            "that divides the number of experts",
        )


def _experts_in_rows(run: Run) -> _Found:
    degrees, rows = run.degrees, run.rows_at_a_time or 1
    if run.full_dtensor and run.has_experts and min(degrees.ep, degrees.cp, degrees.tp, rows) > 1:
        ep, cp, tp = (f"{FLAGS[axis]} ({getattr(degrees, axis)})" for axis in ("ep", "cp", "tp"))
        yield f"{ep}, {cp} and {tp} meet on full_dtensor, with {rows} sequences at a time", ""


def _nodes(run: Run) -> _Found:
    size = run.gpus_per_node
    for field in ("tp", "ep"):
        degree = getattr(run.degrees, field)
        if size is not None and degree > 1 and size % degree:
            yield f"{FLAGS[field]} ({degree}) does not divide the {size} GPUs of a node", ""


def _supported(run: Run) -> _Found:
    if run.pipeline.degree > 1 and not run.pipeline.is_supported:
        yield f"{PIPELINE_FLAG} is {run.pipeline.degree}, and torchtitan cannot split this model", ""


def _schedule_name(run: Run) -> _Found:
    pipeline = run.pipeline
    known = pipeline.from_file or pipeline.schedule.lower() in _BY_LOWER_CASE
    if pipeline.degree > 1 and pipeline.is_supported and not known:
        yield (
            f"pipeline_parallel_schedule is {pipeline.schedule!r}",
            f"set parallelism.pipeline_parallel_schedule to one of {', '.join(SCHEDULES)}",
        )


def _schedule(run: Run) -> Schedule | None:
    """Return the schedule of a run that has a pipeline, or None where nothing is known of it."""
    pipeline = run.pipeline
    if pipeline.degree == 1 or not pipeline.is_supported or pipeline.from_file:
        return None
    return _BY_LOWER_CASE.get(pipeline.schedule.lower())


def splits_backward(run: Run) -> bool:
    """Return whether the pipeline of a run computes the gradients of weights apart from those of inputs."""
    schedule = _schedule(run)
    return schedule is not None and schedule.splits_backward


def stages(run: Run) -> int | None:
    """Return how many stages the model is cut into, or None where that is not known."""
    pipeline, schedule = run.pipeline, _schedule(run)
    if schedule is None:
        return None
    if pipeline.parts is not None:
        return len(pipeline.parts)
    if pipeline.layers_per_stage is None:
        return pipeline.degree * schedule.default_stages
    if run.n_layers is None:
        return None
    return math.ceil((run.n_layers + pipeline.first_less + pipeline.last_less) / pipeline.layers_per_stage)


def _stages_of_ranks(run: Run) -> _Found:
    count, pipeline = stages(run), run.pipeline
    if count is not None and count % pipeline.degree:
        yield f"{_cut(run, count)}, which {PIPELINE_FLAG} ({pipeline.degree}) does not divide", ""


def _cut(run: Run, count: int) -> str:
    pipeline = run.pipeline
    if pipeline.parts is not None:
        return f"module_fqns_per_model_part makes {count} stages"
    if pipeline.layers_per_stage is None:
        return f"{pipeline.schedule} makes {count} stages"
    weights = f"{pipeline.first_less} + {pipeline.last_less}"
    return (
        f"{run.n_layers} layers + {weights} by pipeline_parallel_layers_per_stage "
        f"({pipeline.layers_per_stage}) make {count} stages"
    )


def _stages_of_a_rank(run: Run) -> _Found:
    count, schedule, pipeline = stages(run), _schedule(run), run.pipeline
    if count is None or schedule is None or count % pipeline.degree:
        return
    each, most = count // pipeline.degree, schedule.most_stages
    # Only where torchtitan counts the stages by itself does it insist on several.
    least = schedule.least_stages if pipeline.parts is None else most or 1
    if each < least or (most is not None and each > most):
        wants = f"{most}" if most == least else f"at least {least}"
        yield f"{_cut(run, count)}, {each} on each rank, and {pipeline.schedule} wants {wants}", ""


def _layers_of_stages(run: Run) -> _Found:
    count, pipeline = stages(run), run.pipeline
    if pipeline.degree > 1 and pipeline.parts is not None and pipeline.is_supported:
        known = {*run.modules, "vision_encoder", *(f"layers.{index}" for index in range(run.n_layers or 0))}
        for index, part in enumerate(pipeline.parts if run.n_layers else ()):
            if not known & set(part):
                yield f"stage {index} of {len(pipeline.parts)} gets no module of the model", ""
        return
    if count is None or run.n_layers is None or count == 1:
        return
    effective = run.n_layers + pipeline.first_less + pipeline.last_less
    layers = f"{run.n_layers} layers + {pipeline.first_less} + {pipeline.last_less}"
    if count > effective:
        yield f"{count} stages are more than {layers}", ""
        return
    least = effective // count
    for name, weight in (("first", pipeline.first_less), ("last", pipeline.last_less)):
        if weight > least:
            yield (
                f"pipeline_parallel_{name}_stage_less_layers ({weight}) is more than the {least} of "
                f"{layers} that a stage gets",
                "",
            )


def _microbatch_size(run: Run) -> _Found:
    size, batch = run.pipeline.microbatch_size, run.local_batch_size
    if batch is None or run.pipeline.degree == 1 or not run.pipeline.is_supported:
        return
    if run.pipeline.microbatches is not None:
        return
    if size < 1 or batch % size:
        works = [count for count in range(1, batch + 1) if batch % count == 0]
        yield (
            f"pipeline_parallel_microbatch_size ({size}) does not divide local_batch_size ({batch})",
            f"set parallelism.pipeline_parallel_microbatch_size to one of {', '.join(map(str, works))}, or "
            "change training.local_batch_size",
        )


def _microbatches(run: Run) -> _Found:
    count, schedule, pipeline = stages(run), _schedule(run), run.pipeline
    size, batch, microbatches = pipeline.microbatch_size, run.local_batch_size, pipeline.microbatches
    if count is None or schedule is None:
        return
    if microbatches is not None:
        field, size, has = f"parallelism.{MICROBATCHES_FIELD}", 1, f"{MICROBATCHES_FIELD} = "
    elif batch is None or size < 1 or batch % size:
        return
    else:
        microbatches, field = batch // size, "training.local_batch_size"
        has = f"local_batch_size ({batch}) / pipeline_parallel_microbatch_size ({size}) = "
    if schedule.least_is_stages and microbatches < count:
        yield (
            f"{has}{microbatches} microbatches are fewer than the {count} stages, and {pipeline.schedule} "
            "wants one for each",
            f"set {field} to {count * size} or more"
            + (f", or parallelism.pipeline_parallel_schedule to {_other(schedule)}"),
        )
    rounds = max(1, microbatches // pipeline.degree)
    if schedule.in_rounds and microbatches % rounds:
        yield (
            f"{has}{microbatches} microbatches are no multiple of the {rounds} rounds in which "
            f"{pipeline.schedule} takes them on {pipeline.degree} ranks",
            f"set {field} to {microbatches // pipeline.degree * pipeline.degree * size}",
        )


def _other(schedule: Schedule) -> str:
    """Return a schedule of as many stages that takes any number of microbatches."""
    return "GPipe" if schedule.most_stages == 1 else "ZBVZeroBubble"


def _modules(run: Run) -> _Found:
    parts = run.pipeline.parts
    if run.pipeline.degree == 1 or parts is None or run.n_layers is None or not run.pipeline.is_supported:
        return
    named = Counter(name for part in parts for name in part)
    wanted = (*run.modules, *(f"layers.{index}" for index in range(run.n_layers)))
    missing = [name for name in wanted if name not in named]
    twice = [name for name in wanted if named[name] > 1]
    if missing:
        yield f"module_fqns_per_model_part does not name {_few(missing)}", ""
    if twice:
        yield f"module_fqns_per_model_part names {_few(twice)} in several stages", ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _overlap(run: Run) -> _Found:
    pipeline, ep = run.pipeline, run.degrees.ep
    in_stages = pipeline.degree > 1 and pipeline.schedule.lower() == "dualpipev"
    if in_stages and ep > 1 and pipeline.overlaps_experts:
        yield f"DualPipeV has {FLAGS['ep']} {ep} and activation checkpointing", ""


def _recomputed(run: Run) -> _Found:
    if splits_backward(run) and run.recomputes_selectively and not run.gives_buffers_away:
        yield f"{run.pipeline.schedule} meets selective activation checkpointing", ""


def _compiled(run: Run) -> _Found:
    if splits_backward(run) and run.gives_buffers_away:
        yield f"{run.pipeline.schedule} meets torch.compile", ""


def _cached(run: Run) -> _Found:
    if run.pipeline.degree > 1 and run.pipeline.lacks_cache:
        yield "graph_trainer runs the pipeline, and the installed torch has another PipelineStage", ""


def _sequence(run: Run) -> _Found:
    degrees = run.degrees
    # With tensor parallelism TP009 asks for the same, times its degree.
    of_two = run.line is Line.TORCHTITAN_0_2 or degrees.cp > 1
    least = 2 * degrees.cp if of_two else 1
    if degrees.seq_len is not None and degrees.tp == 1 and degrees.seq_len % least:
        near = degrees.seq_len // least * least or least
        name = run.sizes.seq_len
        yield f"{name} ({degrees.seq_len}) is not a multiple of {least}", f"set training.{name} to {near}"


def _layers_for_cp(run: Run) -> _Found:
    count = stages(run)
    if run.degrees.cp == 1 or count is None or not run.wraps_attention:
        return
    empty = [str(index) for index, layers in enumerate(layers_of_stages(run)) if not layers]
    if empty:
        have = (
            f"stage {empty[0]} of {count} has" if len(empty) == 1 else f"stages {_few(empty)} of {count} have"
        )
        yield f"{have} no layer, and {FLAGS['cp']} is {run.degrees.cp}", ""


def _tied(run: Run) -> _Found:
    if run.shares_with_fsdp and run.degrees.dp_shard * run.degrees.cp > 1:
        yield "the model's embedding and output are tied, and its parameters are sharded over data", ""


def _attention(run: Run) -> _Found:
    if run.degrees.cp > 1 and run.whole_sequence:
        names = " and ".join(run.whole_sequence)
        yield f"{FLAGS['cp']} is {run.degrees.cp}, and the model has {names}", ""


def _mask_blocks(run: Run) -> _Found:
    degrees, block = run.degrees, run.mask_block
    if degrees.cp == 1 or block is None or degrees.seq_len is None:
        return
    least, name = degrees.cp * block, run.sizes.seq_len
    if degrees.seq_len % least:
        yield (
            f"{name} ({degrees.seq_len}) is not a multiple of {FLAGS['cp']} ({degrees.cp}) x {block} tokens",
            f"set training.{name} to {max(degrees.seq_len // least, 1) * least}, or lower {FLAGS['cp']}",
        )


def _uncut(run: Run) -> _Found:
    degrees = run.degrees
    if degrees.cp > 1 and run.uncut and (degrees.tp > 1 or not run.uncut_beside_tp):
        beside = f" beside {FLAGS['tp']} {degrees.tp}" if run.uncut_beside_tp else ""
        yield f"{FLAGS['cp']} is {degrees.cp}{beside}, and {run.uncut}", ""


def _data(run: Run) -> _Found:
    if run.unfed:
        yield f"the model asks for {run.unfed}, which the batches of its data loader lack", ""


def _validation_to_the_end(run: Run) -> _Found:
    data_ranks = run.degrees.dp_replicate * run.degrees.dp_shard
    if run.validation.to_the_end and run.degrees.dp_shard_is_known and data_ranks > 1:
        yield f"{run.validation.to_the_end} is -1 on {data_ranks} data parallel ranks", ""


def _validator(run: Run) -> _Found:
    if run.validation.stopped_by:
        yield run.validation.stopped_by, ""


def _validation_batch(run: Run) -> _Found:
    pipeline, batch, validated = run.pipeline, run.local_batch_size, run.validation.batch_size
    if pipeline.degree == 1 or not batch or not validated or batch % pipeline.microbatch_size:
        return
    microbatches = batch // pipeline.microbatch_size
    if validated % microbatches:
        yield (
            f"validation.local_batch_size ({validated}) is no multiple of the {microbatches} microbatches of "
            "the pipeline",
            f"set validation.local_batch_size to {-(-validated // microbatches) * microbatches}",
        )


def _validation_loss(run: Run) -> _Found:
    if run.validation.counts_parts:
        yield f"the validation loss is multiplied by {FLAGS['cp']} ({run.degrees.cp})", ""


def _optimizer_groups(run: Run) -> _Found:
    if not run.parameters:
        return
    taken = _modules_taken(run.parameters, run.patterns)
    whole: set[str] = set().union(*taken)
    parts = [whole] if run.pipeline.degree == 1 else run.pipeline.parts or _parts(run)
    for index, part in enumerate(parts):
        for pattern, modules in zip(run.patterns, taken, strict=True):
            if modules.isdisjoint(part):
                where = f" of stage {index} of {len(parts)}" if len(parts) > 1 else ""
                yield f"the optimizer's pattern {pattern!r} matches no parameter{where}", ""


@cache
def _modules_taken(names: tuple[str, ...], patterns: tuple[str, ...]) -> list[set[str]]:
    """Return the modules with parameters that a pattern is the first to match, for each pattern."""
    taken: list[set[str]] = [set() for _ in patterns]
    for name in names:
        first = next((index for index, one in enumerate(patterns) if re.search(one, name)), None)
        if first is not None:
            taken[first].add(_module_of(name))
    return taken


def _parts(run: Run) -> list[set[str]]:
    """Return the modules of each stage as torchtitan deals them out; nothing where it cannot."""
    shares = layers_of_stages(run)
    if not shares:
        return []
    ends = itertools.accumulate(shares)
    parts = [
        {f"layers.{index}" for index in range(end - share, end)}
        for share, end in zip(shares, ends, strict=True)
    ]
    first, *last = run.modules
    parts[0] |= {first, "vision_encoder"}
    parts[-1] |= set(last)
    return parts


def _module_of(parameter: str) -> str:
    """Return the layer, or the module beside the layers, that a parameter is in."""
    first, _, rest = parameter.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first


def layers_of_stages(run: Run) -> list[int]:
    """Return how many layers each stage has; nothing where that is not known, or cannot be."""
    pipeline, count = run.pipeline, stages(run)
    if count is None or run.n_layers is None:
        return []
    if pipeline.parts is not None:
        return [sum(name.startswith("layers.") for name in part) for part in pipeline.parts]
    effective = run.n_layers + pipeline.first_less + pipeline.last_less
    if count > effective or max(pipeline.first_less, pipeline.last_less) > effective // count:
        return []
    each, more = divmod(effective, count)
    shares = [each + (index < more) for index in range(count)]
    shares[0] -= pipeline.first_less
    shares[-1] -= pipeline.last_less
    return shares


def _global_batch(run: Run) -> _Found:
    degrees, batch = run.degrees, run.global_batch_size
    if batch is None or run.local_batch_size is None or not degrees.dp_shard_is_known:
        return
    data_ranks, sizes = degrees.dp_replicate * degrees.dp_shard, run.sizes
    factors = {sizes.local: run.local_batch_size}
    if run.pipeline.microbatches is not None and run.pipeline.degree > 1:
        factors[MICROBATCHES_FIELD] = run.pipeline.microbatches
    step = math.prod(factors.values()) * data_ranks
    if batch < 1 or batch % step:
        local = " x ".join(f"{name} ({size})" for name, size in factors.items())
        yield (
            f"{sizes.total} ({batch}) is not a multiple of {local} x "
            f"{data_ranks} data parallel ranks = {step}",
            f"set training.{sizes.total} to {max(batch // step, 1) * step}, or to -1",
        )


def _data_ranks(run: Run) -> _Found:
    if run.checkpoint is not None:
        yield from run.checkpoint.problems_with_data(run.degrees)


def _states(run: Run) -> _Found:
    if run.checkpoint is not None:
        yield from run.checkpoint.problems_with_states()


def _weights(run: Run) -> _Found:
    if run.checkpoint is not None:
        yield from run.checkpoint.problems_with_weights()


def _refusal(run: Run) -> _Found:
    if run.refusal:
        yield f"torchtitan itself refuses this run: {run.refusal}", ""


def _late_refusal(run: Run) -> _Found:
    if run.late_refusal:
        yield f"torchtitan's parallelize function refuses this run: {run.late_refusal}", ""


_CONDITIONS: dict[str, Callable[[Run], _Found]] = {
    "MESH001": _world,
    "MESH002": _experts_mesh,
    "MESH003": _expert_tensor,
    "MESH004": _replicas,
    "MESH005": _experts_sharded,
    "MESH006": _experts_summed,
    "MESH007": _experts_in_rows,
    "NODE001": _nodes,
    "PP001": _stages_of_ranks,
    "PP002": _stages_of_a_rank,
    "PP003": _layers_of_stages,
    "PP004": _microbatch_size,
    "PP005": _microbatches,
    "PP006": _supported,
    "PP007": _schedule_name,
    "PP008": _modules,
    "PP009": _overlap,
    "PP010": _recomputed,
    "PP011": _compiled,
    "PP012": _cached,
    "SEQ001": _sequence,
    "CP001": _layers_for_cp,
    "CP002": _attention,
    "CP003": _mask_blocks,
    "CP004": _uncut,
    "TIE001": _tied,
    "BATCH001": _global_batch,
    "DATA001": _data,
    "VAL001": _validation_to_the_end,
    "VAL002": _validator,
    "VAL003": _validation_batch,
    "VAL004": _validation_loss,
    "OPT001": _optimizer_groups,
    "CKPT002": _data_ranks,
    "CKPT003": _states,
    "CKPT004": _weights,
    "RUN001": _refusal,
    "RUN002": _late_refusal,
}
"""Code -> what looks for it. The order is that of `RUN_RULES`."""
