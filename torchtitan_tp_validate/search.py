"""The layouts that work for a job on a number of ranks, best first.

Every way to lay the ranks out is a candidate: all factorizations into the axes of ``ParallelDims``, with
every expert parallel degree that makes a mesh of them. What arithmetic alone excludes is counted, by rule;
what is left is judged as the launcher judges a job, one after the other, as far as somebody wants to see it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, WHAT_IS_LEFT, Degrees
from torchtitan_tp_validate.errors import KVReplicationError, PlanError, Problem, UnknownNameError
from torchtitan_tp_validate.faults import find_faults
from torchtitan_tp_validate.job import Job, Options, judge_job, read_job
from torchtitan_tp_validate.layout import Run, find_problems
from torchtitan_tp_validate.plan import Plan, divisors
from torchtitan_tp_validate.releases import kv_replication_of, line_of, read_plan
from torchtitan_tp_validate.rules import FAULTS

AXES = {
    "pp": PIPELINE_FLAG,
    **{axis: FLAGS[axis] for axis in ("cp", "tp", "ep", "etp", "dp_replicate", "dp_shard")},
}
"""Axis -> its field under ``[parallelism]``: first those that a run is better off without."""

NOT_VALIDATED = "not validated"
"""In the place of a code: nothing here can say whether the layout works."""

REPLICATION = "KV-head replication"
"""The same: replication is not supported in the layout."""


@dataclass(frozen=True)
class Layout:
    """A way to lay out the ranks of a run.

    Attributes:
        degrees: of all axes but the pipeline's.
        pp: of the pipeline.
        warnings: what is to be told of it, though it works.
        repairs: codes of the faults that it has to be repaired of.
    """

    degrees: Degrees
    pp: int = 1
    warnings: tuple[Problem, ...] = ()
    repairs: tuple[str, ...] = ()

    def of(self, axis: str) -> int:
        """Return the degree of one of `AXES`."""
        degree: int = self.pp if axis == "pp" else getattr(self.degrees, axis)
        return degree


class Search:
    """A search among all layouts of a job.

    Attributes:
        world_size: how many ranks there are.
        considered: how many layouts there are.
        candidates: those that arithmetic does not exclude, best first.
        judged: how many of these were judged in full so far.
        excluded: code of a rule -> how many layouts it excludes, alone or with others, so far.
        axes: those of `AXES` that the line of torchtitan has.
    """

    def __init__(
        self,
        config: Any,
        *,
        guarded: Collection[Callable[..., Any]],
        options: Options,
        keep: Collection[str] = (),
        near: bool = False,
    ) -> None:
        """Exclude by arithmetic.

        Args:
            config: the job, which stays as it is; the degrees that it has are where the search starts from.
            guarded: the parallelize functions that are guarded.
            options: how layouts are judged; they say how many ranks there are.
            keep: axes whose degree stays the job's.
            near: whether the best layout is the one that changes the fewest degrees of the job, by the least.

        Raises:
            UnknownNameError: there is no such axis.
            KVReplicationError: replication is not supported with the job in any layout.
        """
        self._config = config
        self._guarded = guarded
        assert options.world_size is not None
        self._options = options
        self.world_size = options.world_size
        self.axes = [axis for axis, field in AXES.items() if hasattr(config.parallelism, field)]
        for axis in keep:
            if axis not in self.axes:
                raise UnknownNameError("axis", axis, self.axes, "the installed torchtitan")
        self.excluded: Counter[str] = Counter()
        self.considered = self.judged = 0
        self.candidates: list[Layout] = []
        requested = self._requested()
        for layout in self._layouts({axis: requested[axis] for axis in keep}):
            self.considered += 1
            run = self._run_of(layout)
            problems = find_problems(run)
            codes = self._codes(run, problems)
            self.excluded.update(sorted(codes))
            if not codes:
                warnings = tuple(problem for problem in problems if problem.warns)
                self.candidates.append(replace(layout, warnings=warnings))

        def rank(layout: Layout) -> tuple[float, ...]:
            # By how often a degree is halved or doubled, rounded: sums of logarithms are not exact.
            steps = [abs(math.log2(layout.of(axis) / requested[axis])) for axis in self.axes] if near else []
            change = sum(map(bool, steps)), round(sum(steps), 6)
            return (*change, len(layout.warnings), *map(layout.of, self.axes))

        self.candidates.sort(key=rank)

    def confirmed(self) -> Iterator[Layout]:
        """Yield the candidates that work, best first; each is judged when it is asked for."""
        for layout in self.candidates:
            self.judged += 1
            try:
                verdict = judge_job(self.job_of(layout), guarded=self._guarded, options=self._options)
            except KVReplicationError:
                self.excluded[REPLICATION] += 1
                continue
            assert verdict is not None, "it names a model"
            error = verdict.error
            if error is not None:
                broken = {dim.code for dim in error.violations} | {one.code for one in error.problems}
                self.excluded.update(broken)
            elif verdict.unread:
                self.excluded[NOT_VALIDATED] += 1
            else:
                yield replace(layout, warnings=verdict.warnings, repairs=verdict.repairs)

    def job_of(self, layout: Layout) -> Any:
        """Return a copy of the job that is laid out so."""
        return self._in_degrees(self.fields(layout))

    def job_in(self, layout: Layout) -> Any:
        """Return the same, but for what the job leaves to the number of ranks, which stays so."""
        return self._in_degrees(self.changes(layout))

    def _in_degrees(self, fields: Mapping[str, int]) -> Any:
        # Replication changes the model of the job that it is put into; whatever else judges a job leaves it.
        job = (copy.deepcopy if self._options.replicate_kv_heads else copy.copy)(self._config)
        job.parallelism = copy.copy(job.parallelism)
        for field, degree in fields.items():
            setattr(job.parallelism, field, degree)
        return job

    def fields(self, layout: Layout) -> dict[str, int]:
        """Return a layout's degrees by field under ``[parallelism]``."""
        return {AXES[axis]: layout.of(axis) for axis in self.axes}

    def changes(self, layout: Layout) -> dict[str, int]:
        """Return the fields under ``[parallelism]`` in which a layout differs from the job's own."""
        return {
            field: degree
            for field, degree in self.fields(layout).items()
            # What is left to the ranks stays it.
            if getattr(self._config.parallelism, field) not in (degree, WHAT_IS_LEFT)
        }

    def arguments(self, layout: Layout) -> list[str]:
        """Return what torchtitan's command line has to say of a layout beside the job's own."""
        changes = self.changes(layout).items()
        return [word for field, degree in changes for word in (f"--parallelism.{field}", str(degree))]

    def _requested(self) -> dict[str, int]:
        """Return the job's own degrees; of what is left to the ranks, what they make of it."""
        parallelism = self._config.parallelism
        requested = {axis: getattr(parallelism, AXES[axis]) for axis in self.axes}
        if requested["dp_shard"] == WHAT_IS_LEFT:
            others = requested["pp"] * requested["cp"] * requested["tp"] * requested["dp_replicate"]
            requested["dp_shard"] = max(self.world_size // others, 1)
        return requested

    def _layouts(self, kept: Mapping[str, int]) -> Iterator[Layout]:
        """Yield every layout of the ranks that has the kept degrees."""
        has_experts = self._run(False).has_experts
        for degrees in _meshes(self.world_size, has_experts=has_experts, has_etp="etp" in self.axes):
            if all(degrees[axis] == degree for axis, degree in kept.items()):
                pp = degrees.pop("pp")
                layout = Layout(replace(self._job.degrees.vary(**degrees), dp_shard_is_known=True), pp)
                if layout.degrees.makes_a_mesh:
                    yield layout

    def _codes(self, run: Run, problems: Iterable[Problem]) -> set[str]:
        """Return the rules by which arithmetic excludes a run, some of which are its problems'."""
        options = self._options
        repaired = {code for code, rule in FAULTS.items() if options.repair and rule.can_be_repaired}
        codes = {one.code for one in (*problems, *find_faults(run)) if not one.warns}
        return (codes - repaired - set(options.allow)) | self._violated(replace(run.degrees, dp_replicate=1))

    def _run_of(self, layout: Layout) -> Run:
        run = self._run(layout.degrees.cp > 1)
        return replace(run, degrees=layout.degrees, pipeline=replace(run.pipeline, degree=layout.pp))

    @cached_property
    def _violated(self) -> Callable[[Degrees], set[str]]:
        """What tells the rules that the model's dimensions break; replicas make no difference to them."""
        subject = self._job.subject
        plans: list[Plan] = []

        @cache
        def violated(degrees: Degrees) -> set[str]:
            if degrees.splits_nothing:
                return set()
            degrees = replace(degrees, replicate_kv_heads=self._options.replicate_kv_heads)
            try:
                plans.extend([] if plans else [read_plan(subject, degrees)])
                return {dim.code for dim in plans[0].violations(degrees)}
            except PlanError:  # it is said when the layout is judged
                return set()

        return violated

    @cached_property
    def _job(self) -> Job:
        """The job on data ranks alone.

        Raises:
            KVReplicationError: replication is not supported with it in any layout.
        """
        config = self._on_data_ranks()
        if self._options.replicate_kv_heads:
            kv_replication_of(line_of(config)).put_into_job(config)
        job = read_job(config, self.world_size)
        assert job is not None, "it names a model"
        return job

    def _on_data_ranks(self, cp: int = 1) -> Any:
        return self.job_of(Layout(Degrees(tp=1, cp=cp, dp_shard=self.world_size // cp)))

    @cached_property
    def _run(self) -> Callable[[bool], Run]:
        """What tells what the job says of its run as a whole, with context parallelism or without."""

        @cache
        def read(splits_context: bool) -> Run:
            config = self._on_data_ranks(divisors(self.world_size)[1] if splits_context else 1)
            job = read_job(config, self.world_size)
            assert job is not None, "it names a model"
            run = line_of(config).read_run(config, job.model, job.degrees, ())
            # What torchtitan itself says of this layout is nothing about the others.
            run = replace(run, refusal="", objection="", late_refusal="")
            return replace(run, world_size=self.world_size, gpus_per_node=self._options.gpus_per_node)

        return read


def _meshes(world_size: int, *, has_experts: bool, has_etp: bool) -> Iterator[dict[str, int]]:
    """Yield the degrees of every layout of so many ranks, by axis; some of them make no mesh."""
    for pp in divisors(world_size):
        for cp in divisors(world_size // pp):
            for tp in divisors(world_size // pp // cp):
                data = world_size // pp // cp // tp
                for dp_shard in divisors(data):
                    degrees = {"pp": pp, "cp": cp, "tp": tp, "dp_shard": dp_shard}
                    degrees["dp_replicate"] = data // dp_shard
                    for ep in divisors(dp_shard * cp * tp) if has_experts else (1,):
                        for etp in {1, tp} if has_etp and ep > 1 else {1}:
                            yield {**degrees, "ep": ep, "etp": etp}
