"""KV-head replication in torchtitan 0.3.x: a model-config converter, torchtitan's own extension point.

    model_registry("122B-A10B", converters=[ReplicateKVHeads.Config()])

It puts gathering linears in the place of wk and wv. A fused QKV projection becomes three, whatever the
degree, since the optimizer's state is named after the parameters; checkpoints of the model have the names
of the three in any case.

Source: ``protocols/model.py`` (ModelConfigConverter), ``models/common/attention.py``, ``components/lora.py``
(a converter that returns another root config) and ``models/common/decoder.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchtitan.models.common.attention import FusedQKVLinear, QKVLinear
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter

from torchtitan_tp_validate.degrees import Degrees, degrees_of_job
from torchtitan_tp_validate.kv_replication import transformers_backend
from torchtitan_tp_validate.kv_replication.linears import TorchLinear, gathering
from torchtitan_tp_validate.releases import line_of
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.releases.kv_replication import (
    bridging_config,
    class_name,
    problem_with_attention,
    projections,
    raise_if_foreign,
    raise_if_untried,
    unsupported_error,
    what_works,
)
from torchtitan_tp_validate.validate import judge


def put_into_job(job: Any) -> None:
    """Convert the model config that a ``Trainer.Config`` carries, or refuse it.

    Raises:
        KVReplicationError: the job asks for something that replication is not supported with.
    """
    if job.model_spec is not None:
        raise_if_untried(job.parallelism, job.compile)
        if bridging_config(job.model_spec.model) is None:
            job.model_spec.model = ReplicateKVHeads.Config().build().convert(job.model_spec.model)


def accept(model: RequestedModel, job: Any) -> None:
    """Let a job start, and spare it the verdict that its model config gives by itself at the same degrees.

    See `releases.base.KVReplication`.
    """
    raise_if_foreign(model.parallelize_fn)
    if bridging_config(model.config) is None:
        model.config.accept(degrees_of_job(job))


def put_into_call(function: Callable[..., Any], arguments: Mapping[str, Any], tp: int) -> None:
    """See that the model of a parallelize call was built from a converted config.

    See `releases.base.KVReplication`.
    """
    model = arguments["model"]
    raise_if_foreign(function)
    built_from = bridging_config(model)
    if built_from is not None:
        transformers_backend.replicate_kv_heads(model, built_from, tp, TorchLinear)
    elif not hasattr(model.config, "replicates_kv_heads"):
        raise unsupported_error(
            f"{type(model).__name__} was built from a config without it",
            "model_registry(..., converters=[ReplicateKVHeads.Config()])",
        )


class ReplicateKVHeads(ModelConfigConverter):  # type: ignore[misc]
    """Let a model train at tensor parallel degrees that are multiples of its n_kv_heads.

    It may stand anywhere among the converters: what another one makes of wk and wv after it is converted when
    the run's degrees are known.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):  # type: ignore[misc]
        """Nothing to set."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """Return the same model config, its wk and wv gathering. Nested configs are changed in place.

        Raises:
            KVReplicationError: no layer has n_kv_heads, or some have projections that are not supported.
        """
        if isinstance(model_config, ReplicatingConfig):
            return model_config
        attentions = list(_attentions(model_config))
        if not attentions:
            raise unsupported_error(
                f"{class_name(model_config)} has no layers with n_kv_heads", "a model that has"
            )
        _convert(attentions)
        kind = _replicating(type(model_config))  # type: ignore[arg-type]  # a class is hashable
        return kind(**{f.name: getattr(model_config, f.name) for f in dataclasses.fields(model_config)})


class ReplicatingConfig:
    """What a converted model config is besides its own class."""

    __slots__ = ()  # each class has one for _accepted: two bases with slots cannot be one class

    replicates_kv_heads = True

    def accept(self, degrees: Degrees) -> None:
        """Remember that this config, as it is now, was judged to fit what a run asks for.

        The next `update_from_config` does not judge it again then.
        """
        # With the identity, since copies take it along, and somebody may change those.
        object.__setattr__(self, "_accepted", (id(self), degrees))

    def _was_accepted(self, degrees: Degrees) -> bool:
        """Whether that is so; it is forgotten as it is told."""
        accepted = getattr(self, "_accepted", None)
        object.__setattr__(self, "_accepted", None)
        return accepted == (id(self), degrees)

    def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
        """Judge the run's degrees in every layer, unless that was done, then let torchtitan do its part.

        torchtitan's own check asks whether the degree divides the first layer's n_kv_heads: what the TP
        axis splits is one head for each rank, and that is the number it is shown, for this call alone.

        Raises:
            TPCompatError: the degree fits neither n_heads nor, as a multiple or a divisor, n_kv_heads.
            KVReplicationError: a later converter made of wk or wv what cannot be shared, or the run asks for
                what was not tried or does not work.
        """
        parallelism = config.parallelism
        raise_if_untried(parallelism, getattr(config, "compile", None))
        tp = parallelism.tensor_parallel_degree
        _convert([*_attentions(self)])
        degrees = degrees_of_job(config)
        if tp > 1 and not self._was_accepted(degrees):
            judge(line_of(self).in_run(self, config), degrees)
        self.update_unjudged(config=config, **kwargs)

    def update_unjudged(self, *, config: Any, **kwargs: Any) -> None:
        """Let torchtitan do its part alone, as whoever judges the run by its outcome must."""
        with _one_head_per_rank(self, config.parallelism.tensor_parallel_degree):
            super().update_from_config(config=config, **kwargs)  # type: ignore[misc]


@functools.cache
def _replicating(kind: type) -> type:
    """Return the class of a converted config; its owner, fields and name are those of the original."""
    names = {"__slots__": ("_accepted",), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (ReplicatingConfig, kind), names)


@contextmanager
def _one_head_per_rank(config: Any, tp: int) -> Iterator[None]:
    """Show torchtitan's check, which looks at ``first_attention``, how many heads the TP axis splits."""
    attention = config.first_attention
    stored = attention.n_kv_heads
    n_kv_heads = stored or attention.n_heads
    try:
        if n_kv_heads % tp:
            attention.n_kv_heads = tp
        yield
    finally:
        attention.n_kv_heads = stored


def _attentions(config: Any) -> Iterator[tuple[str, Any]]:
    """``(path, attention config)`` of every layer with key-value heads."""
    for index, layer in enumerate(getattr(config, "layers", ())):
        attention = getattr(layer, "attention", None)
        if hasattr(attention, "n_kv_heads"):
            yield f"layers[{index}].attention", attention


def _convert(attentions: Sequence[tuple[str, Any]]) -> None:
    """Let wk and wv gather in every one of these, or in none.

    Raises:
        KVReplicationError: one of them cannot.
    """
    for path, attention in attentions:
        problem = problem_with_attention(attention)
        if problem is not None:
            raise unsupported_error(f"{path}: {problem}", what_works())
    for _, attention in attentions:
        _convert_attention(attention)


def _convert_attention(attention: Any) -> None:
    n_kv_heads = attention.n_kv_heads or attention.n_heads
    qkv = getattr(attention, "qkv_linear", None)
    if isinstance(qkv, FusedQKVLinear.Config):
        attention.qkv_linear = qkv = _separate(qkv)
    holder = attention if qkv is None else qkv
    for name, projection in projections(attention).items():
        setattr(holder, name, gathering(projection, n_kv_heads))


def _separate(fused: FusedQKVLinear.Config) -> QKVLinear.Config:
    """Three projections in the place of a fused one, with the same initial values where it promises them."""
    base = fused.wqkv.param_init
    inits = None if base is None else {name: _base_init(init) for name, init in base.items()}

    def linear(heads: int) -> Linear.Config:
        return dataclasses.replace(fused.wqkv, out_features=heads * fused.head_dim, param_init=inits)

    return QKVLinear.Config(head_dim=fused.head_dim, wq=linear(fused.n_heads), wkv=linear(fused.n_kv_heads))


def _base_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Return the initializer of one projection, from that of the fused one.

    ``_fused_qkv_param_init`` (models/common/config_utils.py) draws the three one after the other, by an
    initializer that it keeps in a closure. Any other is element-wise (gpt_oss) if it is torch's own.
    """
    base: Callable[..., Any] | None = None
    if getattr(getattr(init, "func", init), "__module__", None) == "torch.nn.init":
        base = init
    elif inspect.isfunction(init):
        base = inspect.getclosurevars(init).nonlocals.get("base_init")
    if base is None:
        raise unsupported_error(
            f"the fused QKV projection is initialized by {init!r}, which cannot be taken apart",
            "a model config with separate wq and wkv",
        )
    return base
