#!/usr/bin/env python
"""Compare the verdicts on a torchtitan's own models with what its parallelize functions do to them.

    PYTHONPATH=TREE:. scripts/judge_tree.py OUT [--models llama3 qwen3]

Every flavor that the torchtitan of this process registers is built on meta, and cut in two by its own
parallelize function, as the first of two ranks that exchange nothing (torch's fake process group). What
is smaller afterwards is what the tree splits: no plan of ours is asked. Whether as many ranks as a degree
from 1 to 64 says can share it, the rules below say, and they are all that is known here of torchtitan.

OUT gets a line of JSON per flavor and one of the guards, which are installed and taken out again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

DEGREES = range(1, 65)
_ALIGNMENT = 8
"""bf16 elements in the 16 bytes that ``torch._grouped_mm`` asks for."""
_HEAD_DIMS = ("head_dim", "key_head_dim", "value_head_dim", "qk_head_dim")


class Enough(BaseException):
    """The parallelize function has come to FSDP: what tensor parallelism splits is split."""


@dataclass(frozen=True)
class Share:
    """Something that ranks must be able to share.

    Attributes:
        what: the parameter.
        codes: the rules of ours that are about it.
        size: in units that cannot be cut.
        fits: whether a number of ranks can.
    """

    what: str
    codes: tuple[str, ...]
    size: int
    fits: Callable[[int, int], bool]


@dataclass
class Judged:
    """What was said of a flavor at all degrees.

    Attributes:
        flavor: with the name of its model.
        right: how many verdicts are what the tree does.
        open: why there are none of some, or what was said not to be judged.
        wrong: each that is neither.
    """

    flavor: str
    right: int = 0
    open: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    """Judge what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="*", help="instead of all that this torchtitan lists")
    options = parser.parse_args()
    _be_the_first_of_two_ranks()
    models = importlib.import_module("torchtitan.models")
    with options.out.open("w", encoding="utf-8") as out:
        for name in options.models or sorted(models._supported_models):
            for judged in _judge_model(name):
                print(json.dumps(asdict(judged)), file=out, flush=True)
        print(json.dumps({"guards": _guards()}), file=out)


# --- what the tree does ----------------------------------------------------------------------------------


def _be_the_first_of_two_ranks() -> None:
    """To be called before anything of torchtitan is imported, which binds what is changed here."""

    def stop(*_: Any, **__: Any) -> None:
        raise Enough

    for module in ("torch.distributed.fsdp", "torch.distributed._composable.fsdp"):
        importlib.import_module(module).fully_shard = stop  # type: ignore[attr-defined]
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    dist.init_process_group("fake", rank=0, world_size=2)
    torch._utils._get_available_device_type = lambda: "cpu"
    utils: Any = importlib.import_module("torchtitan.tools.utils")
    # As on the GPU that it is for: else some models leave the grouped product out.
    utils.has_cuda_capability = lambda *_: True


class Tree:
    """A model's package in a torchtitan of any time."""

    def __init__(self, name: str) -> None:
        self.package: Any = importlib.import_module(f"torchtitan.models.{name}")
        self.config: Any = importlib.import_module("torchtitan.config")
        self.has_args = hasattr(self.package, "get_train_spec")

    def flavors(self) -> list[str]:
        """The names of what it registers."""
        if self.has_args:
            return list(self.package.get_train_spec().model_args)
        tables = [
            table
            for name, table in vars(self.package).items()
            if name.endswith(("_configs", "flavors")) and isinstance(table, dict)
        ]
        return list(tables[0])

    def build(self, flavor: str) -> tuple[Any, Callable[[], Any]]:
        """The model of a flavor on meta, and what cuts it in two."""
        if self.has_args:
            spec, job = self.package.get_train_spec(), self.config.JobConfig()
            job.parallelism.tensor_parallel_degree = 2
            job.activation_checkpoint.mode = "none"
            config, given = copy.deepcopy(spec.model_args[flavor]), {"job_config": job}
            if hasattr(config, "update_from_config"):
                config.update_from_config(job)
            make: Callable[[], Any] = partial(spec.model_cls, config)
        else:
            spec = self.package.model_registry(flavor)
            config, given = copy.deepcopy(spec.model), self._run(spec)
            (parameter, *_) = inspect.signature(config.update_from_config).parameters
            config.update_from_config(**{parameter: SimpleNamespace(**given)})
            make = config.build
        with torch.device("meta"):
            model = make()
        names = inspect.signature(spec.parallelize_fn).parameters
        given = {name: value for name, value in given.items() if name in names}
        return model, partial(spec.parallelize_fn, model, parallel_dims=self.dims(), **given)

    def _run(self, spec: Any) -> dict[str, Any]:
        """What a config tree's parallelize function is given, and its ``update_from_config`` reads."""
        nothing = SimpleNamespace(apply=lambda _: None)
        none = SimpleNamespace(mode="none", build=lambda **_: nothing)
        return {
            "model_spec": spec,
            "debug": getattr(self.config, "DebugConfig", SimpleNamespace)(),
            "compile": self.config.CompileConfig(enable=False),
            "activation_checkpoint": none,
            "training": self.config.TrainingConfig(),
            "parallelism": self.config.ParallelismConfig(tensor_parallel_degree=2),
            "compile_config": self.config.CompileConfig(enable=False),
            "ac_config": none,
            "model_converters": SimpleNamespace(converters=[]),
            "dump_folder": "",
        }

    def dims(self) -> Any:
        """Two ranks of tensor parallelism."""
        cls = importlib.import_module("torchtitan.distributed").ParallelDims
        degrees = {"tp": 2, "world_size": 2}
        names = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp", "world_size")
        known = inspect.signature(cls).parameters
        dims = cls(**{name: degrees.get(name, 1) for name in names if name in known})
        dims.build_mesh()
        return dims


def shares(model: torch.nn.Module, cut: Callable[[], Any]) -> list[Share]:
    """What a model's parallelize function splits over the TP axis."""
    _leave_one_of_each(model)
    modules = dict(model.named_modules())
    whole = {name: tuple(parameter.shape) for name, parameter in _parameters(model)}
    with contextlib.suppress(Enough):
        cut()
    found: list[Share] = []
    for name, parameter in _parameters(model):
        local = getattr(parameter, "_local_tensor", parameter)
        for size, left in zip(whole[name], local.shape, strict=True):
            if left != size:
                found += _shares_of(name, size, modules, is_dtensor=local is not parameter)
    return list({(one.codes, one.size): one for one in found}.values())


def _leave_one_of_each(model: Any) -> None:
    """Leave one of the layers that are alike: cutting a hundred takes a hundred times as long."""
    kinds = set()
    for key, layer in list(getattr(model, "layers", torch.nn.ModuleDict()).items()):
        kind = tuple((name, parameter.shape) for name, parameter in layer.named_parameters())
        if kind in kinds:
            del model.layers[key]
        kinds.add(kind)


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    # What is tied may no longer be so once it is cut.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def _shares_of(name: str, size: int, modules: dict[str, Any], *, is_dtensor: bool) -> Iterator[Share]:
    """What a dimension of a parameter asks for."""
    owner = name.rpartition(".")[0]
    above = [modules[owner.rsplit(".", up)[0]] for up in range(owner.count(".") + 1)]
    mixer = next((one for one in above if any(hasattr(one, dim) for dim in _HEAD_DIMS)), None)
    if mixer is not None and "layers." in name and not _is_mlp(name):
        yield from _heads_of(name, size, mixer, next((x for x in above if hasattr(x, "n_heads")), None))
    elif "experts." in name and "shared_experts" not in name:
        # The product of a cut and a whole weight is a DTensor: shards may differ.
        yield Share(name, ("TP011", "TP013"), size, _aligned if is_dtensor else _even_and_aligned)
    elif "tok_embeddings" in name or name.startswith(("output.", "lm_head.")):
        yield Share(name, ("TP006",), size, _not_empty if is_dtensor else _even)
    else:
        codes = ("TP010",) if "shared_experts" in name else ("TP005", "TP008", "TP012")
        yield Share(name, codes, size, _even)


def _is_mlp(name: str) -> bool:
    return any(part in name for part in ("feed_forward", "mlp", "moe", "merger", "projector"))


def _heads_of(name: str, size: int, mixer: Any, attention: Any) -> Iterator[Share]:
    """The heads that a parameter is made of: as its module counts them, else by their width."""
    if attention is not None:
        yield Share(name, ("TP001",), attention.n_heads, _even)
        if getattr(attention, "n_kv_heads", None):
            yield Share(name, ("TP002",), attention.n_kv_heads, _even)
        return
    of_keys = name.rpartition(".")[0].endswith(("_q", "_k"))
    width = getattr(mixer, "key_head_dim" if of_keys else "value_head_dim", None) or mixer.head_dim
    yield Share(name, ("TP003", "TP004", "TP007"), size if size % width else size // width, _even)


def _even(size: int, ranks: int) -> bool:
    return size % ranks == 0


def _not_empty(size: int, ranks: int) -> bool:
    return -(-size // ranks) * (ranks - 1) < size


def _aligned(size: int, ranks: int) -> bool:
    return size % _ALIGNMENT == -(-size // ranks) % _ALIGNMENT == 0


def _even_and_aligned(size: int, ranks: int) -> bool:
    return _even(size, ranks) and _aligned(size, ranks)


# --- what is said ----------------------------------------------------------------------------------------


def _judge_model(name: str) -> Iterator[Judged]:
    try:
        tree = Tree(name)
        flavors = tree.flavors()
    except Exception as error:
        yield Judged(name, open=[f"{name}, which cannot be imported here: {_short(error)}"])
        return
    for flavor in flavors:
        judged = Judged(f"{name} {flavor}")
        _judge(judged, tree, flavor)
        yield judged


def _judge(judged: Judged, tree: Tree, flavor: str) -> None:
    try:
        model, cut = tree.build(flavor)
    except Exception as error:
        judged.open.append(f"flavors that are not built here: {_short(error)}")
        return
    try:
        verdicts = list(_verdicts(model, tree.dims()))
    except Exception as error:  # the run would have died of it
        judged.wrong.append(f"there is no verdict: {_short(error)}")
        return
    try:
        split = shares(model, cut)
    except Exception as error:
        judged.open.append(f"flavors that are not parallelized here: {_short(error)}")
        return
    for degree, (verdict, told) in zip(DEGREES, verdicts, strict=True):
        _compare(judged, degree, split, verdict, told)


def _verdicts(model: Any, dims: Any) -> Iterator[tuple[bool | None, str]]:
    """At each degree, whether it is accepted, or None without a verdict; and what was not judged, or why."""
    from torchtitan_tp_validate.degrees import read_degrees
    from torchtitan_tp_validate.errors import PlanError, TPCompatError
    from torchtitan_tp_validate.releases import read_plan
    from torchtitan_tp_validate.validate import raise_if_incompatible

    importlib.import_module("torchtitan.tools.utils").device_type = "cuda"  # type: ignore[attr-defined]
    degrees = read_degrees(dims)
    try:
        plan = read_plan(model, degrees)
    except PlanError as error:
        yield from ((None, str(error)) for _ in DEGREES)
        return
    for degree in DEGREES:
        run = degrees.vary(tp=degree)
        try:
            raise_if_incompatible(plan, run)
            yield True, "; ".join(plan.at(run).not_judged)
        except TPCompatError:
            yield False, ""
        except PlanError as error:
            yield None, str(error)


def _compare(judged: Judged, degree: int, split: list[Share], accepted: bool | None, told: str) -> None:
    broken = [one for one in split if not one.fits(one.size, degree)]
    if accepted is (not broken) or (accepted is None and not split):
        judged.right += 1
    elif accepted is None or (accepted and _is_said(broken, told)):
        judged.open.append(told)
    else:
        said = "accepted" if accepted else "refused"
        why = ", ".join(f"{one.what} ({one.size})" for one in broken[:2]) or "the tree can share everything"
        judged.wrong.append(f"TP {degree} is {said}: {why}")


def _is_said(broken: list[Share], told: str) -> bool:
    """Whether it was said that a rule about each of these is not judged."""
    return all(any(code in told for code in (*one.codes, "every rule")) for one in broken)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}"


# --- the guards ------------------------------------------------------------------------------------------


def _guards() -> dict[str, Any]:
    """Install and uninstall; how many entry points were guarded, and what was not put back."""
    import torchtitan_tp_validate as tpv
    from torchtitan_tp_validate.wrappers.guard import parallelize_functions

    points = [point for point in parallelize_functions() if point.bound is not None]
    before = [point.bound for point in points]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tpv.install()
    guarded = [str(point) for point, old in zip(points, before, strict=True) if point.bound is not old]
    tpv.uninstall()
    left = [str(point) for point, old in zip(points, before, strict=True) if point.bound is not old]
    missed = [str(point) for point in points if str(point) not in guarded]
    return {"guarded": len(guarded), "missed": missed, "left": left}


if __name__ == "__main__":
    main()
