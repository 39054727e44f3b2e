"""The walk of ``parallel_dims`` from a wrapper to the verdict, traced on a real model."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace as NS
from typing import Any

import torch

import torchtitan_tp_validate as tpv
from tests.core.walks import in_the_map, walk
from tests.torchtitan.installed import HAS_CONFIG_TREES
from torchtitan_tp_validate import registry


def model() -> Any:
    config = registry.model("llama3").spec("debugmodel").config
    if HAS_CONFIG_TREES:
        from torchtitan.config import ParallelismConfig, TrainingConfig

        # A model that is parallelized has its shardings declared.
        run = NS(parallelism=ParallelismConfig(), training=TrainingConfig(), activation_checkpoint=None)
        config.update_from_config(config=run)
        return NS(config=config)
    train_spec = importlib.import_module("torchtitan.protocols.train_spec").get_train_spec("llama3")
    with torch.device("meta"):
        return train_spec.model_cls(config)


def test_parallel_dims_enter_the_files_of_the_map_and_come_back_to_none() -> None:
    wrapper = importlib.import_module("torchtitan_tp_validate.wrappers.llama3").parallelize_llama
    others = inspect.signature(wrapper).parameters.keys() - {"model", "parallel_dims"}
    built, parallel_dims, refused = model(), NS(tp=7), []

    def call() -> None:
        try:
            wrapper(built, parallel_dims=parallel_dims, **dict.fromkeys(others))
        except tpv.TPCompatError as error:
            refused.append(error.tp)

    call()  # what is imported late is imported now
    taken = walk(call, lambda _, value: value is parallel_dims, until=tpv.TPCompatError.told_by.__func__)
    drawn = in_the_map("parallel_dims")
    if not HAS_CONFIG_TREES:
        of_0_2 = (file.replace("torchtitan_0_3", "torchtitan_0_2") for file in drawn)
        drawn = [file for file in of_0_2 if file != "releases/rows.py"]
    assert taken.files == drawn
    assert len(drawn) <= 7
    assert taken.back == []
    assert refused == [7, 7]
