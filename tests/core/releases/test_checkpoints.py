"""What a run starts from, by its folders; tests/rehearsal/test_resumption.py has what is in real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_tp_validate.checkpoint import DATA_LOADER, STATES, Checkpoint
from torchtitan_tp_validate.releases.checkpoints import Start, read_checkpoint, start_of

INITIAL = {"initial_load_path": "/weights"}


def section(**settings: Any) -> SimpleNamespace:
    defaults = {
        **{"enable": True, "folder": "checkpoint", "load_step": -1},
        **{"initial_load_path": None, "initial_load_model_only": True, "initial_load_in_hf": False},
        "initial_load_in_hf_quantized": False,
    }
    return SimpleNamespace(**{**defaults, **settings})


def saved(folder: Path, *steps: int, name: str = ".metadata") -> Path:
    for step in steps:
        (folder / "checkpoint" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoint" / f"step-{step}" / name).touch()
    return folder


def unbuilt() -> Any:
    raise AssertionError("nothing needs the model")


@pytest.mark.parametrize("empty_is_new", [True, False])
@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, None),
        (INITIAL, Start("/weights")),
        ({**INITIAL, "initial_load_model_only": False}, Start("/weights", model_only=False)),
        ({"initial_load_in_hf": True}, Start("assets", in_hf=True)),
        ({**INITIAL, "enable": False}, None),
    ],
)
def test_a_first_run_starts_from_initial_weights(
    settings: dict[str, Any], start: Start | None, empty_is_new: bool, tmp_path: Path
) -> None:
    assert start_of(section(**settings), str(tmp_path), "assets", empty_is_new=empty_is_new) == start


@pytest.mark.parametrize(
    ("settings", "step", "model_only"),
    [({}, 10, False), ({"load_step": 5}, 5, False), ({"load_step": 0}, 0, True)],
)
def test_a_run_goes_on_from_its_newest_checkpoint_or_the_one_it_names(
    settings: dict[str, Any], step: int, model_only: bool, tmp_path: Path
) -> None:
    folder = saved(tmp_path, 0, 5, 10)
    (folder / "checkpoint" / "step-15").mkdir()  # not complete
    found = start_of(section(**INITIAL, **settings), str(folder), "assets", empty_is_new=False)
    assert found == Start(str(folder / "checkpoint" / f"step-{step}"), model_only)


def test_a_folder_without_a_checkpoint_keeps_0_2_from_initial_weights(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert start_of(section(**INITIAL), str(tmp_path), "assets", empty_is_new=False) is None
    assert start_of(section(**INITIAL), str(tmp_path), "assets", empty_is_new=True) == Start("/weights")


def test_a_run_without_checkpoints_starts_from_nothing() -> None:
    assert start_of(None, "", "assets", empty_is_new=True) is None
    assert read_checkpoint(None, (), unbuilt, unbuilt) is None


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (Start("assets", in_hf=True), "CKPT004: assets is no folder of this machine"),
        (
            Start("gs://here/step-5"),
            "CKPT002, CKPT003, CKPT004: gs://here/step-5 is no folder of this machine",
        ),
    ],
)
def test_what_cannot_be_read_is_said_to_be_left_out(start: Start, why: str) -> None:
    assert read_checkpoint(start, (), unbuilt, unbuilt) == Checkpoint(start.path, not_judged=(why,))


def test_metadata_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, 5) / "checkpoint" / "step-5"
    found = read_checkpoint(Start(str(folder), model_only=False), (), unbuilt, unbuilt)
    assert found is not None
    (why,) = found.not_judged
    assert why.startswith(f"CKPT002, CKPT003, CKPT004: {folder} cannot be read (")


def test_hugging_face_weights_hold_nothing_to_resume_from(tmp_path: Path) -> None:
    folder = str(saved(tmp_path, 5, name="model.safetensors.index.json") / "checkpoint" / "step-5")
    found = read_checkpoint(Start(folder, model_only=False), ("lr_scheduler",), unbuilt, unbuilt)
    assert found == Checkpoint(folder, wanted=frozenset({DATA_LOADER, *STATES}) - {"lr_scheduler"})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.safetensors"], "it holds Hugging Face weights, for --checkpoint.initial_load_in_hf"),
        (["step-5/.metadata", "step-10/.metadata"], "step-10 in it is a checkpoint"),
        ([], "it is no checkpoint"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_told_from_one(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = read_checkpoint(Start(str(tmp_path)), (), unbuilt, unbuilt)
    assert found == Checkpoint(str(tmp_path), missing=(f".metadata: {said}",))
