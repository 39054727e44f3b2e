"""Faults of the kinds that torchtitan's history shows, planted into its ranks, one at a time.

    python -m tests.rehearsal.planted OUT

Runs the small jobs of `JOBS` once in one process, then on two ranks without a fault and with each of them,
and writes ``OUT/results.json``: name -> what `rehearse` would say. All runs are forks of this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.degrees import degrees_of_job
from torchtitan_tp_validate.rehearsal.children import Children
from torchtitan_tp_validate.rehearsal.jobs import Request, checkpoint_of, installed_line, pp, split
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.rehearse import judged
from torchtitan_tp_validate.rehearsal.small_run import SmallRun
from torchtitan_tp_validate.rehearsal.world import cut_world

PATIENCE = 90.0
"""Seconds: the other tests of two cores may be four ranks, too."""
PATIENCE_FOR_WHAT_HANGS = 30.0
TP = "--parallelism.tensor_parallel_degree"
JOBS = {
    "dense": ("--module", "llama3", "--config", "llama3_debugmodel", TP, "2"),
    "shards": ("--module", "llama3", "--config", "llama3_debugmodel"),
    "resumed": ("--module", "llama3", "--config", "llama3_debugmodel", TP, "2", "--checkpoint.enable"),
    "experts": (
        *("--module", "qwen3", "--config", "qwen3_30b_a3b", TP, "2"),
        *("--parallelism.expert_parallel_degree", "2", "--training.disable_cuda_graphs"),
    ),
}


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        job: the one of `JOBS` that has it.
        named: a module or parameter that the rehearsal is to name; or the quantity that is wrong.
        before: plants it before the Trainer is built; after: behind that.
        outcome: what comes of it.
        accumulates: batches whose gradients a step sums.
    """

    job: str
    named: str
    before: Callable[[], None] | None = None
    after: Callable[[Any], None] | None = None
    outcome: str = "differs"
    accumulates: int = 1


def _module(trainer: Any, name: str) -> Any:
    return trainer.model_parts[0].get_submodule(name)


def _is_second_tp_rank(trainer: Any) -> bool:
    return bool(trainer.parallel_dims.get_mesh("tp").get_local_rank() == 1)


def _output(name: str, change: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    """Change what a module computes: ``change(output, trainer)``."""

    def plant(trainer: Any) -> None:
        _module(trainer, name).register_forward_hook(lambda module, inputs, output: change(output, trainer))

    return plant


def _gradient(name: str, change: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """Change a gradient in place behind every backward pass: ``change(its shard, trainer)``."""

    def plant(trainer: Any) -> None:
        step = trainer.forward_backward_step

        def forward_backward_step(**arguments: Any) -> Any:
            loss = step(**arguments)
            change(trainer.model_parts[0].get_parameter(name).grad.to_local(), trainer)
            return loss

        trainer.forward_backward_step = forward_backward_step

    return plant


def _on_second(change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, trainer: change(value) if _is_second_tp_rank(trainer) else value


def _step(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Do something before every forward pass."""

    def plant(trainer: Any) -> None:
        step = trainer.forward_backward_step

        def forward_backward_step(**arguments: Any) -> Any:
            change(trainer)
            return step(**arguments)

        trainer.forward_backward_step = forward_backward_step

    return plant


def _norms_are_invariant() -> None:
    """The weights of norms are declared to be all alike on TP ranks: nobody sums their gradients."""
    from torchtitan.models.common import decoder_sharding
    from torchtitan.models.llama3 import sharding

    norm_config = decoder_sharding.norm_config

    def without_sum(*, enable_sp: bool) -> Any:
        config = norm_config(enable_sp=enable_sp)
        config.state_shardings = norm_config(enable_sp=False).state_shardings
        return config

    sharding.norm_config = decoder_sharding.norm_config = without_sum


def _count_own_tokens_only() -> None:
    """Each data rank divides its loss by its own tokens."""
    from torchtitan.distributed import utils

    utils.dist_sum_tensor = lambda tokens, mesh: tokens


def _mean_of_means() -> None:
    """The loss is the mean of what each data rank's is by its own tokens, of which one has more."""
    from torchtitan.distributed import utils

    utils.dist_sum_tensor = lambda tokens, mesh: tokens * mesh.size()


def _forget(trainer: Any) -> None:
    """Of the gradients that a step accumulates the last is left."""
    trainer.optimizers.zero_grad()


def _norm_of_own_shards() -> None:
    """The gradient norm is of this rank's shards."""
    from torchtitan.distributed import utils

    clip = utils.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        shards = [p.grad.to_local() for p in parameters if p.grad is not None]
        clip(parameters, *args, **kwargs)
        return torch.nn.utils.get_total_norm(shards)

    utils.clip_grad_norm_ = clip_grad_norm_


def _shift_positions(trainer: Any) -> None:
    """The second TP rank turns the heads of the second half of a row by one token more."""
    import torch

    attention = _module(trainer, "layers.0.attention")
    forward = attention.forward

    def shifted(x: Any, attention_masks: Any, positions: Any = None) -> Any:
        if _is_second_tp_rank(trainer):
            index = torch.arange(positions.shape[1])
            positions = positions + (index >= len(index) // 2)
        return forward(x, attention_masks, positions)

    attention.forward = shifted


def _see_other_documents(trainer: Any) -> None:
    """The second TP rank takes a row for one document."""
    import torch

    attention = _module(trainer, "layers.0.attention")
    forward = attention.forward

    def forward_over_all(x: Any, attention_masks: Any, positions: Any = None) -> Any:
        if _is_second_tp_rank(trainer):
            one = torch.arange(positions.shape[1]).expand(positions.shape)
            attention_masks = trainer.model_parts[0].get_attention_masks(positions=one)
        return forward(x, attention_masks, positions)

    attention.forward = forward_over_all


def _freeze(name: str) -> Callable[[Any], None]:
    return lambda trainer: trainer.model_parts[0].get_parameter(name).requires_grad_(False)


def _scale_scores(output: Any) -> Any:
    scores, *others = output
    return (scores * 1.5, *others)


def _do_not_load(state: str) -> Callable[[Any], None]:
    return lambda trainer: trainer.checkpointer.states.pop(state)


def _load_one_weight_less(trainer: Any) -> None:
    load, weight = trainer.checkpointer.load, trainer.model_parts[0].get_parameter("norm.weight")

    def load_less(step: int) -> Any:
        kept = weight.detach().clone()
        loaded = load(step)
        weight.data.copy_(kept)
        return loaded

    trainer.checkpointer.load = load_less


def _raise(trainer: Any) -> None:
    if _is_second_tp_rank(trainer):
        raise RuntimeError("planted")


def _kill(trainer: Any) -> None:
    if _is_second_tp_rank(trainer):
        os.kill(os.getpid(), signal.SIGKILL)


def _sleep(trainer: Any) -> None:
    if _is_second_tp_rank(trainer):
        time.sleep(3600)


def _drift(name: str) -> Callable[[Any], None]:
    def change(trainer: Any) -> None:
        if _is_second_tp_rank(trainer):
            trainer.model_parts[0].get_parameter(name).data.to_local().mul_(1.0 + 1e-6)

    return _step(change)


def _drop_half(output: Any) -> Any:
    kept = output.clone()
    kept[:, : kept.shape[1] // 2] = 0.0
    return kept


EXPERTS = "layers.0.moe.routed_experts.inner_experts"
FAULTS = {
    "norms are not summed over TP": Fault("dense", "norm.weight", before=_norms_are_invariant),
    "loss over own tokens": Fault("shards", "gradient", before=_count_own_tokens_only),
    "mean of the losses of ranks": Fault("shards", "gradient", before=_mean_of_means),
    "accumulated gradients forgotten": Fault("dense", "gradient", after=_step(_forget), accumulates=2),
    "gradient norm of own shards": Fault("dense", "gradient norm", before=_norm_of_own_shards),
    "rotary offset on one rank": Fault("dense", "layers.0.attention", after=_shift_positions),
    "documents see each other on one rank": Fault("dense", "layers.0.attention", after=_see_other_documents),
    "output summed twice": Fault(
        "dense", "layers.0.attention.wo", after=_output("layers.0.attention.wo", lambda out, _: 2 * out)
    ),
    "output averaged": Fault(
        "dense", "layers.0.feed_forward.w2", after=_output("layers.0.feed_forward.w2", lambda out, _: out / 2)
    ),
    "bias on one rank": Fault(
        "dense",
        "layers.0.feed_forward.w1",
        after=_output("layers.0.feed_forward.w1", _on_second(lambda out: out + 0.1)),
    ),
    "logits scaled on one rank": Fault(
        "dense", "lm_head", after=_output("lm_head", _on_second(lambda out: out * 1.01))
    ),
    "embedding zero on one rank": Fault(
        "dense", "tok_embeddings", after=_output("tok_embeddings", _on_second(lambda out: out * 0.0))
    ),
    "gradient counted twice": Fault(
        "dense",
        "layers.0.attention.wo.weight",
        after=_gradient("layers.0.attention.wo.weight", lambda g, _: g.mul_(2)),
    ),
    "gradient halved": Fault(
        "dense",
        "layers.0.feed_forward.w2.weight",
        after=_gradient("layers.0.feed_forward.w2.weight", lambda g, _: g.mul_(0.5)),
    ),
    "gradient zero on one rank": Fault(
        "dense",
        "tok_embeddings.weight",
        after=_gradient("tok_embeddings.weight", _on_second(lambda g: g.zero_())),
    ),
    "gradient zero": Fault("dense", "norm.weight", after=_gradient("norm.weight", lambda g, _: g.zero_())),
    "not a number": Fault(
        "dense",
        "Loss is not finite",  # torchtitan says so itself, a step later
        after=_gradient("lm_head.weight", lambda g, _: g.mul_(float("nan"))),
        outcome="dies",
    ),
    "a frozen weight": Fault(
        "dense", "layers.0.feed_forward.w3.weight", after=_freeze("layers.0.feed_forward.w3.weight")
    ),
    "copies drift": Fault("dense", "layers.0.ffn_norm.weight", after=_drift("layers.0.ffn_norm.weight")),
    "a rank raises": Fault("dense", "planted", after=_step(_raise), outcome="dies"),
    "a rank is killed": Fault("dense", "forward", after=_step(_kill), outcome="dies"),
    "a rank hangs": Fault("dense", "forward", after=_step(_sleep), outcome="hangs"),
    "router not summed": Fault(
        "experts",
        "layers.0.moe.router.gate.weight",
        after=_gradient("layers.0.moe.router.gate.weight", lambda g, _: g.mul_(0.5)),
    ),
    "router scores on one rank": Fault(
        "experts", "layers.0.moe", after=_output("layers.0.moe.router", _on_second(_scale_scores))
    ),
    "tokens of experts dropped": Fault(
        "experts",
        "layers.0.moe.routed_experts",
        after=_output("layers.0.moe.routed_experts", _on_second(_drop_half)),
    ),
    "experts summed over EP": Fault(
        "experts", f"{EXPERTS}.w2_EDF", after=_gradient(f"{EXPERTS}.w2_EDF", lambda g, _: g.mul_(2))
    ),
    "head norm not summed over heads": Fault(
        "experts",
        "layers.0.attention.q_norm.weight",
        after=_gradient("layers.0.attention.q_norm.weight", lambda g, _: g.mul_(0.5)),
    ),
    "optimizer not resumed": Fault("resumed", "optimizer state", after=_do_not_load("optimizer")),
    "learning rate begins again": Fault("resumed", "learning rate", after=_do_not_load("lr_scheduler")),
    "a weight not resumed": Fault("resumed", "gradient", after=_load_one_weight_less),
}
"""Name -> fault. Most change what a rank computes at the place where a missing or doubled reduction would."""


@dataclass
class PlantedRun(SmallRun):
    """A run of a small job with a fault in its ranks."""

    fault: Fault | None = None

    def build_trainer(self, feed: Callable[..., Any], local_batch_size: int, microbatch_size: int) -> Any:
        """Return the Trainer, with the fault."""
        fault = self.fault
        if fault and fault.before:
            fault.before()
        trainer = super().build_trainer(feed, local_batch_size, microbatch_size)
        if fault and fault.after:
            fault.after(trainer)
        return trainer


def main(folder: str) -> None:
    """Run everything, in a folder."""
    out = Path(folder)
    line = installed_line()
    used = line.prepare(compile=False)
    assert "fla" not in sys.modules, "a model without gated delta rule is not to wait for its import"
    results: dict[str, Any] = {}
    for name, arguments in JOBS.items():
        job = line.parse(Request(arguments))
        world = cut_world(degrees_of_job(job), pp(job), read_batch(job).microbatches, 2)
        split(job, world)
        checkpoint = checkpoint_of(job)
        line.make_small(job, world.degrees, out)
        run = PlantedRun(line, job, world, 2, out, used, checkpoint=checkpoint)
        run.run_reference(Children(out, PATIENCE))
        if checkpoint is not None:
            run.run_ranks(Children(out, PATIENCE))
        told = {
            **{"release": "", "model": name, "verdict": "fits", "degrees": asdict(world.degrees), "cuts": ()},
            **{"left_out": (), "microbatches": 1},
        }
        faults = {f"{name} without a fault": None} | {n: f for n, f in FAULTS.items() if f.job == name}
        for called, run.fault in faults.items():
            run.accumulates = run.fault.accumulates if run.fault else 1
            run.microbatch_size = 2 // run.accumulates
            hangs = run.fault is not None and run.fault.outcome == "hangs"
            children = Children(out, PATIENCE_FOR_WHAT_HANGS if hangs else PATIENCE)
            seen = run.run_ranks(children) if checkpoint is None else run.resume_ranks(children)
            results[called] = asdict(judged({**told, "runs": [seen]}))
            print(called, results[called]["outcome"], flush=True)
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
