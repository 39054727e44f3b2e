"""What the patched torchtitan says of the shared cases, what this package says, and what both say together.

    PYTHONPATH=PATCHED python -m tests.patches.verdicts OUT

Writes one record per case to OUT. A case is a real model on the meta device, handed to the parallelize
function of its spec with parallel dims that know no more than the TP degree: what gets past the checks
fails at the first thing that it wants to do.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.truth.cases import MLA_FAMILIES

ACCEPTED = "accepted"
ENGINE = {"torchtitan_tp_validate.guards", "torchtitan_tp_validate.validate"}


@dataclass(frozen=True)
class Case:
    """A model and a degree. The other sizes are powers of two, so that the heads alone decide."""

    family: str
    n_heads: int
    n_kv_heads: int
    tp: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = "".join(f" {name}={size}" for name, size in self.sizes.items())
        return f"{self.family} {self.n_heads}/{self.n_kv_heads}{sizes} tp={self.tp}"


@dataclass
class Record:
    """What was said of a case: `ACCEPTED`, or the error's type and first line.

    Attributes:
        alone: by the patched torchtitan, the engine of this package not loaded.
        config: by its config-time check, or None where there is none.
        ours: by this package's helper.
        together: by the patched torchtitan with this package installed on top.
        chained: whether that error has another behind it.
    """

    case: str
    alone: list[str]
    config: list[str] | None
    ours: list[str] = field(default_factory=list)
    together: list[str] = field(default_factory=list)
    chained: bool = False


class Reached(AttributeError):
    """The parallelize function went on to its work."""


class Untouchable:
    """In the place of everything that a parallelize function gets besides the model."""

    def __getattr__(self, name: str) -> Any:
        raise Reached(name)


class ParallelDims(Untouchable):
    def __init__(self, tp: int) -> None:
        self.tp = tp


def cases(line: Any) -> Iterator[Case]:
    """The shared cases of a line: every family, refused and accepted by every kind of head.

    Vision heads are left to this package: a family with an encoder is only asked for fewer text heads.
    """
    for family in (*line.FAMILIES, *line.MORE_FAMILIES):
        if family.endswith("_vision"):
            continue
        has_kv_heads = family not in MLA_FAMILIES
        for tp in (1, 2, 3, 4):
            yield Case(family, 8 if has_kv_heads else 2, 2, tp)
        yield Case(family, 8, 4, 4)
        if has_kv_heads:
            yield Case(family, 2, 2, 4)
        if "layer1_kv_heads" in line.SIZES[family]:
            yield Case(family, 8, 4, 4, {"layer1_kv_heads": 2})
        for kind in ("key_heads", "value_heads"):
            if kind in line.SIZES[family]:
                yield Case(family, 8, 4, 4, {kind: 2})
                # As few as the KV heads: the error names the latter.
                yield Case(family, 8, 2, 4, {kind: 2})


def main() -> None:
    assert not ENGINE & sys.modules.keys()
    line = installed_line()
    shared = list(cases(line))
    calls = [(str(case), case.tp, _model(line, case), _config_check(line, case)) for case in shared]
    calls += [(f"transformers 8/2 tp={tp}", tp, model, None) for tp, model in _transformers_models()]
    alone = []
    for name, tp, (model, parallelize_fn), config_check in calls:
        config = config_check and _verdict(config_check)[0]
        alone.append(Record(name, _verdict(_call(parallelize_fn, model, tp))[0], config))
    assert not ENGINE & sys.modules.keys()

    import torchtitan_tp_validate as tpv

    specs = [SpecLike(parallelize_fn) for _, _, (_, parallelize_fn), _ in calls]
    records = []
    with tpv.installed():
        for spec, record, (_, tp, (model, original), _) in zip(specs, alone, calls, strict=True):
            assert spec.parallelize_fn is not original
            record.ours, _ = _verdict(_call_ours(tpv, model, tp))
            record.together, error = _verdict(_call(spec.parallelize_fn, model, tp))
            record.chained = error is not None and (error.__cause__ or error.__context__) is not None
            records.append(asdict(record))
    assert [spec.parallelize_fn for spec in specs] == [original for _, _, (_, original), _ in calls]
    Path(sys.argv[1]).write_text(json.dumps(records, indent=2), encoding="utf-8")


def _call_ours(package: Any, model: Any, tp: int) -> Callable[[], None]:
    return lambda: _reach(package.validate_tp_compat(model, ParallelDims(tp)))


@dataclass
class SpecLike:
    """A spec of somebody's own, which `install` covers too."""

    parallelize_fn: Callable[..., Any]


def _model(line: Any, case: Case) -> tuple[Any, Callable[..., Any]]:
    sizes = {"n_heads": case.n_heads, "n_kv_heads": case.n_kv_heads}
    tiny = line.build(case.family, **sizes, tp=1, sizes=case.sizes)
    return tiny.model, tiny.parallelize_fn


def _config_check(line: Any, case: Case) -> Callable[[], None] | None:
    """torchtitan's own config-time check of a case, where the line has one."""
    if not line.HAS_HEAD_CHECK:
        return None
    heads = {"n_heads": case.n_heads, "n_kv_heads": case.n_kv_heads}
    return lambda: _reach(line.build(case.family, **heads, tp=case.tp, sizes=case.sizes))


def _reach(_: Any) -> None:
    raise Reached


def _call(parallelize_fn: Callable[..., Any], model: Any, tp: int) -> Callable[[], Any]:
    names = inspect.signature(parallelize_fn).parameters.keys() - {"model", "parallel_dims"}
    others = {name: Untouchable() for name in names}
    return lambda: parallelize_fn(model, parallel_dims=ParallelDims(tp), **others)


def _verdict(call: Callable[[], Any]) -> tuple[list[str], BaseException | None]:
    try:
        call()
    except Reached:
        return [ACCEPTED], None
    except ValueError as error:
        return [type(error).__name__, str(error).splitlines()[0]], error
    raise AssertionError("the function came back from parallel dims that know nothing")


def _transformers_models() -> Iterator[tuple[int, tuple[Any, Callable[..., Any]]]]:
    """torchtitan's model around a Hugging Face Llama with two KV heads, where the release has it."""
    name = "torchtitan.experiments.transformers_modeling_backend"
    if find_spec(name) is None:
        return
    from transformers import LlamaConfig

    package = import_module(name)
    is_0_2 = hasattr(package, "get_train_spec")
    spec = package.get_train_spec() if is_0_2 else package.model_registry("full")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    folder = Path(sys.argv[1]).with_suffix(".llama")
    config.save_pretrained(folder)
    args = spec.model_args["full"] if is_0_2 else spec.model
    job = SimpleNamespace(training=SimpleNamespace(seq_len=32), debug=SimpleNamespace(deterministic=False))
    if is_0_2:
        job.hf_transformers = SimpleNamespace(model=str(folder))
        args.update_from_config(job)
    else:
        job.hf_model, job.loss = str(folder), SimpleNamespace()
        job.parallelism = SimpleNamespace(expert_parallel_degree=1)
        args.update_from_config(config=job)
    with torch.device("meta"):
        model = spec.model_cls(args) if is_0_2 else args.build()
    for tp in (2, 4):
        yield tp, (model, spec.parallelize_fn)


if __name__ == "__main__":
    main()
