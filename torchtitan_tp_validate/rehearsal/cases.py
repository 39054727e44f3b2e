"""A case: a tiny model, the degrees and settings that it is run at, and what stands before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

SEED = 20
HEADS = (8, 4)

_SHORT = {"backend": "spmd_backend"}


@dataclass(frozen=True)
class Case:
    """One tiny model at one set of degrees.

    Attributes:
        dimension: what the case is about, the row of the truth suite's report that it counts in.
        tp: tensor parallel degree; dp: data_parallel_shard_degree; ep: expert parallel degree.
        sizes: the sizes that are not the line's defaults.
        spmd_backend: torchtitan 0.3.x's backend; None for the default, and on 0.2.x.
        seed: draws the weights and the tokens.
        dp_replicate: degree of replicated data parallelism (HSDP); pp: pipeline stages, 1 or 2.
        sp: sequence parallel, 0 or 1.
        ac: activation checkpointing, ``none``, ``full`` or ``selective``; "" for the line's default.
        compile: backend of torch.compile, or ``none``.
        head_dim: rows of a head; 0 means that of the line.
        guard: what of ours stands before the parallelize function: ``none``; ``wrapper``, the drop-in;
            ``install``, before the spec is built; ``install-late``, after.
        upstream_check: torchtitan's own head check, where it has one.
        replicate_kv_heads: with KV-head replication; without a guard, also where our rules refuse it.
        as_trainer: three steps as torchtitan's Trainer makes them: each data rank on rows of its own, and
            gradients clipped; otherwise two, with the whole batch on every rank.
        lora: rank of the adapters that torchtitan 0.3.x's converter gives every linear, or 0.
        etp: ``expert_tensor_parallel_degree`` of 0.2.x.
        checkpoints: the TP degrees to move checkpoints between instead of comparing gradients, as ``1-2-4``.
    """

    family: str
    dimension: str = ""
    tp: int = 1
    n_heads: int = HEADS[0]
    n_kv_heads: int = HEADS[1]
    sizes: Mapping[str, int] = field(default_factory=dict)
    spmd_backend: str | None = None
    seed: int = SEED
    dp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    pp: int = 1
    sp: int = 1
    ac: str = ""
    compile: str = "none"
    head_dim: int = 0
    guard: str = "none"
    upstream_check: bool = False
    replicate_kv_heads: bool = False
    as_trainer: bool = False
    lora: int = 0
    etp: int = 1
    checkpoints: str = ""

    @classmethod
    def parse(cls, text: str, ranks: int, **settings: Any) -> Case:
        """Return the case of ``FAMILY:N_HEADS/N_KV_HEADS[:KEY=VALUE,...]``.

        Args:
            text: the keys are the attributes, ``backend`` short for ``spmd_backend``. TP is that of all ranks
                unless it is named.
            ranks: those that the named degrees leave shard the data.
            settings: attributes that the text does not name.
        """
        family, heads, *more = text.split(":")
        n_heads, n_kv_heads = map(int, heads.split("/"))
        given = [setting.split("=") for setting in more[0].split(",")] if more else []
        defaults = {attribute.name: attribute.default for attribute in fields(cls)}
        for key, value in given:
            name = _SHORT.get(key, key)
            settings[name] = int(value) if isinstance(defaults[name], int) else value
        case = cls(family, n_heads=n_heads, n_kv_heads=n_kv_heads, **{"tp": ranks, **settings})
        return replace(case, dp=ranks // case.world_size)

    @property
    def world_size(self) -> int:
        """The ranks that it takes; those of expert parallelism are among them."""
        return self.tp * self.dp * self.dp_replicate * self.pp

    @property
    def meshes(self) -> tuple[int, int, int, int, int, int, str]:
        """What cases must have in common to share their process groups."""
        return self.tp, self.dp, self.ep, self.etp, self.dp_replicate, self.pp, self.spmd_backend or ""

    @property
    def key(self) -> str:
        """The case in words, and its identity over runs."""
        backend = f" {self.spmd_backend}" if self.spmd_backend else ""
        sizes = "".join(f" {name}={size}" for name, size in sorted(self.sizes.items()))
        degrees = f"tp={self.tp}" + self._named("dp", "ep")
        more = self._named(*(attribute.name for attribute in fields(self)[10:]))
        heads = f"heads={self.n_heads}/{self.n_kv_heads}"
        return f"{self.family}{backend} {degrees} {heads}{sizes}{self._named('seed')}{more}"

    def _named(self, *names: str) -> str:
        defaults = {attribute.name: attribute.default for attribute in fields(self)}
        values = {name: getattr(self, name) for name in names}
        return "".join(f" {name}={value}" for name, value in values.items() if value != defaults[name])

    @property
    def in_one_process(self) -> Case:
        """The same model in one process, which the case is compared with."""
        return Case(
            self.family,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            sizes=self.sizes,
            spmd_backend=self.spmd_backend,
            seed=self.seed,
            head_dim=self.head_dim,
            as_trainer=self.as_trainer,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the case as JSON data, of which ``Case(**data)`` is the case again."""
        return {**asdict(self), "sizes": dict(self.sizes)}
