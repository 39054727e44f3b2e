"""The contract of each line of torchtitan: every name of its source that the files here read.

Where a table of fields is what is read, the contract is made of that table.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchtitan_tp_validate.degrees import FLAGS
from torchtitan_tp_validate.layout import Sizes
from torchtitan_tp_validate.releases.contract import Reads
from torchtitan_tp_validate.releases.runs import PIPELINE_FIELDS
from torchtitan_tp_validate.rules import RULES, RUN_RULES

_HEADS = ("TP001", "TP002")
_EXPERTS = ("EP001", "TP011", "FSDP001")
# Heads are declared beside the shardings, and kept whole whatever the backend.
_BY_SHARDING = tuple(code for code, rule in RULES.items() if not rule.dim.endswith("heads"))
_PIPELINE = tuple(code for code in RUN_RULES if code.startswith("PP"))
_BATCH = ("BATCH001", "PP004", "PP005")
_SEQUENCE = ("TP009", "SEQ001", "CP003")
_BY_AXIS = {"cp": ("SEQ001", "CP002", "CP003"), "dp_replicate": ("MESH001", "BATCH001")}
_SIZES_OF_A_BATCH = {"local": _BATCH, "total": ("BATCH001",), "seq_len": _SEQUENCE}


def _of_degrees(file: str, owner: str, absent: tuple[str, ...]) -> Iterator[Reads]:
    """Yield what is read of the degrees, and of how a model is cut into stages."""
    for field, flag in FLAGS.items():
        if flag not in absent:
            of_axis = tuple(code for code, rule in RULES.items() if rule.axis == field)
            yield Reads(file, (f"{owner}.{flag}",), (*of_axis, *_BY_AXIS.get(field, ("MESH001",))))
    for field in PIPELINE_FIELDS.values():
        if field not in absent:
            yield Reads(file, (f"{owner}.{field}",), _PIPELINE)


def _of_batches(file: str, owner: str, sizes: Sizes) -> Iterator[Reads]:
    for size, rules in _SIZES_OF_A_BATCH.items():
        yield Reads(file, (f"{owner}.{getattr(sizes, size)}",), rules)


_MESH = Reads(
    "distributed/parallel_dims.py",
    tuple(
        f"ParallelDims.{name}"
        for name in (
            *(field for field in FLAGS if field != "etp"),
            *("pp", "world_size", "build_mesh"),
        )
    ),
    ("RUN002",),
)


_CHECKPOINTS = ("CKPT001", "CKPT002", "CKPT003", "CKPT004")
_OF_A_CHECKPOINT = (
    *("enable", "folder", "load_step", "exclude_from_loading", "last_save_in_hf"),
    *("initial_load_path", "initial_load_model_only", "initial_load_in_hf", "initial_load_in_hf_quantized"),
)


def of_config_trees(
    sizes: Sizes, *, gated_delta: str, absent: tuple[str, ...], checkpoints: str = ""
) -> tuple[Reads, ...]:
    """Return the contract of a line whose models and jobs are trees of configs.

    Args:
        sizes: what it calls those of a batch.
        gated_delta: the file of the gated-delta layers.
        absent: fields under ``[parallelism]`` that it does not have.
        checkpoints: the file and class of the config of checkpoints, where all of the line has them.
    """
    absent = (*absent, FLAGS["etp"])
    configs, attention = "config/configs.py", "models/common/attention.py"
    decoder, outside = "models/common/decoder.py", ("tok_embeddings", "norm", "lm_head")
    sections = (
        "model_spec",
        "training",
        "parallelism",
        "compile",
        "activation_checkpoint",
        "comm",
        "optimizer",
        "checkpoint",
        "dump_folder",
    )
    file, _, owner = checkpoints.partition(":")
    of_checkpoints = (Reads(file, tuple(f"{owner}.{name}" for name in _OF_A_CHECKPOINT), _CHECKPOINTS),)
    delta_net = ("in_proj_q", "in_proj_v", "key_head_dim", "value_head_dim")
    return (
        Reads("config/manager.py", ("ConfigManager.parse_args",)),
        Reads("trainer.py", ("Trainer.__init__", *(f"Trainer.Config.{name}" for name in sections))),
        Reads(
            "protocols/model_spec.py",
            tuple(f"ModelSpec.{name}" for name in ("name", "flavor", "model", "parallelize_fn")),
        ),
        Reads("protocols/model_spec.py", ("ModelSpec.pipelining_fn",), ("PP006",)),
        *_of_degrees(configs, "ParallelismConfig", absent),
        Reads(configs, ("ParallelismConfig.spmd_backend",), _BY_SHARDING),
        Reads(configs, ("ParallelismConfig.enable_sequence_parallel",), ("TP009",)),
        *_of_batches(configs, "TrainingConfig", sizes),
        Reads(configs, ("CommConfig.mode",), ("MESH001",)),
        _MESH,
        Reads("protocols/sharding.py", ("ShardingConfig.state_shardings",), _BY_SHARDING),
        Reads("distributed/parallel_dims.py", ("SpmdLayout.per_axis_spmd_types",), _BY_SHARDING),
        Reads(decoder, ("Decoder.Config.layers",)),
        Reads(decoder, tuple(f"Decoder.Config.{name}" for name in outside), ("TP006", *_PIPELINE)),
        Reads(decoder, ("Decoder.Config.update_from_config",), _BY_SHARDING),
        Reads(attention, ("GQAttention.Config.n_heads", "GQAttention.Config.n_kv_heads"), _HEADS),
        Reads(attention, ("FlexAttention.Config.block_size",), ("CP003",)),
        Reads(attention, ("VarlenAttention", "ScaledDotProductAttention"), ("CP002",)),
        Reads(gated_delta, tuple(f"GatedDeltaNet.Config.{name}" for name in delta_net), ("TP003", "TP004")),
        Reads(
            "models/common/moe.py",
            (
                *("MoE.Config.num_experts", "GroupedExperts.Config.num_experts"),
                "GroupedExperts.Config.hidden_dim",
            ),
            _EXPERTS,
        ),
        Reads("models/common/moe.py", ("GroupedExperts._grouped_mm",), ("TP013",)),
        Reads("components/optimizer/optimizer.py", ("ParamGroupConfig.pattern",), ("OPT001",)),
        Reads("trainer.py", ("Trainer.Config.validator",), ("VAL001",)),
        Reads("components/validate.py", ("Validator.Config.enable", "Validator.Config.steps"), ("VAL001",)),
        Reads("components/validate.py", ("Validator.Config.dataloader",), ("VAL002",)),
        *(of_checkpoints if checkpoints else ()),
    )


def of_job_configs() -> tuple[Reads, ...]:
    """Return the contract of 0.2.x, whose job is one config and whose models are described by args."""
    config = "config/job_config.py"
    absent = ("pipeline_parallel_schedule_csv", "num_pp_microbatches")
    sections = (
        *("model", "experimental", "training", "parallelism", "activation_checkpoint", "comm"),
        *("job", "checkpoint", "fault_tolerance"),
    )
    return (
        Reads("config/manager.py", ("ConfigManager.parse_args",)),
        Reads("train.py", ("Trainer.__init__",)),
        Reads(
            config,
            (
                *(f"JobConfig.{name}" for name in sections),
                *("Model.name", "Model.flavor", "Experimental.custom_import"),
            ),
        ),
        Reads(
            "protocols/train_spec.py",
            (
                "get_train_spec",
                *(f"TrainSpec.{name}" for name in ("model_cls", "model_args", "parallelize_fn")),
            ),
        ),
        Reads("protocols/train_spec.py", ("TrainSpec.pipelining_fn",), ("PP006",)),
        *_of_degrees(config, "Parallelism", absent),
        *_of_batches(config, "Training", Sizes()),
        Reads(config, tuple(f"Checkpoint.{name}" for name in _OF_A_CHECKPOINT), _CHECKPOINTS),
        Reads(config, ("Job.dump_folder", "FaultTolerance.enable"), _CHECKPOINTS),
        Reads(config, ("JobConfig.validation", "Validation.enable", "Validation.steps"), ("VAL001",)),
        Reads(config, ("Validation.local_batch_size",), ("VAL003",)),
        Reads("protocols/train_spec.py", ("TrainSpec.build_validator_fn",), ("VAL002",)),
        _MESH,
    )
