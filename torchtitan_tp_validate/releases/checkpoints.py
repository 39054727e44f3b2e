"""Read what a run is about to load, and what is in it, without its tensors.

Source: ``components/checkpoint.py`` (0.2.x) and ``components/checkpointer/dcp.py`` of torchtitan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.checkpoint import DATA_LOADER, STATES, Checkpoint

_METADATA = ".metadata"
_HF_INDEX = "model.safetensors.index.json"
_STEP = re.compile(r"step-(\d+)")
# Of main's data loader it is a tree.
_DATA_RANK = re.compile(rf"{DATA_LOADER}\.(dp_rank_\d+)(?:\..+)?")
_OF_THE_OPTIMIZER = re.compile(r"optimizer\.(state|param_groups)\.(.+)\.\w+")
_WEIGHTS = "CKPT004"
_ALL = f"CKPT002, CKPT003, {_WEIGHTS}"

_Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors by name; of what is none, that of a scalar."""


@dataclass(frozen=True)
class Start:
    """What a run loads before its first step.

    Attributes:
        path: its folder.
        model_only: whether nothing else is loaded.
        in_hf: whether the weights are Hugging Face's.
        quantized: whether these are quantized.
    """

    path: str
    model_only: bool = True
    in_hf: bool = False
    quantized: bool = False


def start_of(section: Any, dump_folder: str, assets: str, *, empty_is_new: bool) -> Start | None:
    """Return what a run starts from, or None where that is nothing.

    Args:
        section: the run's ``[checkpoint]``, or None.
        dump_folder: where it keeps its checkpoints. One of its own is loaded in the place of initial weights.
        assets: its folder of Hugging Face assets, which it takes weights from where no other is named.
        empty_is_new: whether a folder without a checkpoint is as good as none; 0.2.x loads nothing then.
    """
    if section is None or not section.enable:
        return None
    folder = Path(dump_folder, section.folder)
    if folder.exists():
        step = _latest(folder) if section.load_step == -1 else section.load_step
        if step != -1:
            return Start(str(folder / f"step-{step}"), model_only=step == 0)
        if not empty_is_new:
            return None
    if section.initial_load_path or section.initial_load_in_hf:
        path = section.initial_load_path or assets
        in_hf, quantized = section.initial_load_in_hf, section.initial_load_in_hf_quantized
        return Start(path, section.initial_load_model_only, in_hf, quantized)
    return None


def saves_optimizer(section: Any, steps: int) -> bool:
    """Return whether a run of so many steps leaves a checkpoint with the state of its optimizer.

    Source: ``_should_save`` and ``_save_last_step`` of torchtitan's checkpoint managers.
    """
    if section is None or not section.enable or section.load_only:
        return False
    last = not section.last_save_model_only
    return bool(last or section.enable_first_step_checkpoint or section.interval < steps)


def _latest(folder: Path) -> int:
    complete = (_METADATA, _HF_INDEX)
    steps = [
        int(step[1])
        for entry in folder.iterdir()
        if (step := _STEP.search(entry.name)) and any((entry / name).is_file() for name in complete)
    ]
    return max(steps, default=-1)


def read_checkpoint(
    start: Start | None, excluded: Collection[str], build: Callable[[], Any], adapter: Callable[[], Any]
) -> Checkpoint | None:
    """Return what is in the checkpoint that a run loads, beside what it asks of it.

    Args:
        start: what it starts from.
        excluded: what of the states is not loaded.
        build: returns its model on meta.
        adapter: returns torchtitan's adapter of the model to Hugging Face's names.
    """
    if start is None:
        return None
    wanted = frozenset[str]() if start.model_only else frozenset((DATA_LOADER, *STATES)).difference(excluded)
    path, rules = Path(start.path), _WEIGHTS if start.in_hf else _ALL
    if not path.is_dir():
        return _unread(start, f"{rules}: {start.path} is no folder of this machine")
    if not start.in_hf and not (path / _METADATA).is_file():
        # Of a run that resumes, what it lacks is said already.
        return Checkpoint(start.path, wanted, missing=() if wanted else (_missing_metadata(path),))
    try:
        names = adapter() if start.in_hf else None
        saved = _saved_in_hf(start, names) if start.in_hf else _saved(start.path, path.stat().st_mtime_ns)
    except Exception as error:  # torch unpickles it, and an adapter is of anybody's model
        return _unread(start, f"{rules}: {start.path} cannot be read ({type(error).__name__}: {error})")
    held = frozenset(name.partition(".")[0] for name in saved)
    data_ranks = {match[1] for name in saved if (match := _DATA_RANK.fullmatch(name))}
    found = Checkpoint(start.path, wanted, held & wanted, len(data_ranks))
    return _beside_model(found, saved, build, names) if found.is_whole else found


def _missing_metadata(path: Path) -> str:
    if any(path.glob("*.safetensors")):
        return f"{_METADATA}: it holds Hugging Face weights, for --checkpoint.initial_load_in_hf"
    step = _latest(path)
    return f"{_METADATA}: {'it is no checkpoint' if step == -1 else f'step-{step} in it is a checkpoint'}"


def _unread(start: Start, why: str) -> Checkpoint:
    return Checkpoint(start.path, not_judged=(why,))


@lru_cache(maxsize=8)
def _saved(path: str, changed: int) -> _Shapes:
    """Return what a checkpoint holds; of one that has changed, what it holds now."""
    from torch.distributed.checkpoint import FileSystemReader

    del changed
    return _shapes(FileSystemReader(path))


def _saved_in_hf(start: Start, adapter: Any) -> _Shapes:
    """Return the Hugging Face weights that are loaded, as torchtitan reads them."""
    return _shapes(adapter.get_hf_storage_reader(start.path, start.quantized))


def _shapes(reader: Any) -> _Shapes:
    entries = reader.read_metadata().state_dict_metadata
    return {name: tuple(getattr(entry, "size", ())) for name, entry in entries.items()}


def _with_states(saved: _Shapes) -> set[str]:
    """Return the parameters that the saved optimizer has a state of; all of its own where it keeps none."""
    found = [match.groups() for name in saved if (match := _OF_THE_OPTIMIZER.fullmatch(name))]
    stateful = {parameter for kind, parameter in found if kind == "state"}
    return stateful or {parameter for _, parameter in found}


def _beside_model(found: Checkpoint, saved: _Shapes, build: Callable[[], Any], adapter: Any) -> Checkpoint:
    """Return the checkpoint with what the model asks of it and does not get."""
    try:
        model = build()
        wanted = model.state_dict() if adapter is None else adapter.to_hf(model.state_dict())
        shapes = {name: tuple(weight.shape) for name, weight in wanted.items()}
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    except Exception as error:  # a model of anybody's
        why = f"{_WEIGHTS}: the model cannot be built here: {error or type(error).__name__}"
        return replace(found, not_judged=(why,))
    missing = [name for name in shapes if name not in saved]
    if "optimizer" in found.wanted:
        stepped = _with_states(saved)
        missing += [f"the optimizer state of {name}" for name in trained if name not in stepped]
    reshaped = [
        f"{name} is {saved[name]}, not {shape}"
        for name, shape in shapes.items()
        if saved.get(name, shape) != shape
    ]
    return replace(found, missing=tuple(missing), reshaped=tuple(reshaped))
