"""What torchtitan 0.3.x computes by kernels that a CPU does not have, written out in torch.

Each does what its kernel does, masks and document boundaries included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from wrapt import when_imported

from torchtitan_tp_validate.rehearsal.noted import note


def attend_by_mask(used: set[str]) -> None:
    """Let flex and variable-length attention work by plain products: neither has a backward on the CPU."""
    from torchtitan.models.common.attention import FlexAttention, VarlenAttention

    for attention, attend, name in (
        (FlexAttention, _flex_attention, "flex attention"),
        (VarlenAttention, _varlen_attention, "variable-length attention"),
    ):
        attention.forward = note(as_it_is_fed(attention, attend), name, used)


def as_it_is_fed(attention: Any, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return attention to a batch as the forward of a class is called: main's has no batch dimension.

    Shardings name the inputs.
    """
    return _in_a_row(attend) if has_no_batch(attention) else attend


def has_no_batch(attention: Any) -> bool:
    """Return whether the forward of a class of attention takes the tokens of all sequences in a row."""
    return "q_TNH" in inspect.signature(attention.forward).parameters


def _in_a_row(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return attention to q, k and v of shape (tokens, heads, head_dim) by that to a batch of one."""

    def forward(
        self: nn.Module,
        q_TNH: torch.Tensor,
        k_TNH: torch.Tensor,
        v_TNH: torch.Tensor,
        *,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **how: Any,
    ) -> torch.Tensor:
        batch = (tensor[None] for tensor in (q_TNH, k_TNH, v_TNH))
        if out_transform is None:
            return attend(self, *batch, **how)[0]
        transform = out_transform
        return attend(self, *batch, out_transform=lambda out, lse: transform(out[0], lse[0]), **how)

    return forward


def _flex_attention(
    self: nn.Module,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    attention_masks: Any,
    score_mod: Any = None,
    enable_gqa: bool = False,
    **how: Any,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_mask

    assert score_mod is None, "no model of torchtitan's has one"
    if q_BLNH.shape[2] != k_BLNH.shape[2] and not enable_gqa:
        raise ValueError(f"query heads {q_BLNH.shape[2]} do not fit key and value heads {k_BLNH.shape[2]}")
    tokens = q_BLNH.shape[1], k_BLNH.shape[1]
    mask = create_mask(attention_masks.mask_mod, len(q_BLNH), 1, *tokens, device="cpu")
    return _attend(q_BLNH, k_BLNH, v_BLNH, mask, **how)


def attend_for_transformers(used: set[str]) -> None:
    """Let the flex attention that torchtitan's transformers backend calls work by plain products."""

    @when_imported("transformers.integrations.flex_attention")
    def patch(module: Any) -> None:
        module.flex_attention_forward = note(_transformers_attention, "flex attention", used)


def _transformers_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """Masked attention of q, k and v of shape (batch, heads, seq_len, head_dim)."""
    from torch.nn.attention.flex_attention import create_mask

    del module
    # transformers' models pass more than they use: what would change the result is not here.
    assert not any(how.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = create_mask(attention_mask.mask_mod, len(q), 1, q.shape[1], k.shape[1], device="cpu")
    return _attend(q, k, v, mask, scale=scaling), None


def _varlen_attention(
    self: Any,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    attention_masks: Any,
    **how: Any,
) -> torch.Tensor:
    """All documents of the batch are one sequence, and each sees itself alone."""
    batch, seq_len = q_BLNH.shape[:2]
    token = torch.arange(batch * seq_len)
    document = torch.searchsorted(attention_masks.cu_seq_q, token, right=True)
    back = token[:, None] - token[None]
    before, after = self.window_size
    mask = document[:, None] == document[None]
    mask &= back <= (before if before >= 0 else len(token))
    mask &= back >= (-after if after >= 0 else -len(token))
    q, k, v = (tensor.flatten(0, 1)[None] for tensor in (q_BLNH, k_BLNH, v_BLNH))
    out: torch.Tensor = _attend(q, k, v, mask, **how)
    return out.view(batch, seq_len, *out.shape[2:]) if out.dim() == q.dim() else out


def _attend(
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    **_: Any,
) -> torch.Tensor:
    """Masked attention of q, k and v of shape (batch, seq_len, heads, head_dim)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads {q.shape[1]} do not fit key and value heads {k.shape[1]}")
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    if out_transform is None:
        return out
    return out_transform(out, scores.logsumexp(-1).transpose(1, 2))


def run_each_document(used: set[str]) -> None:
    """Let the gated-delta layers of Qwen3.5 work by plain products, a document at a time."""
    when_imported("torchtitan.models.qwen3_5")(lambda _: _patch_gated_delta(used))


def _patch_gated_delta(used: set[str]) -> None:
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    # Unwrapped, because the decorator would send the call back to fla.
    kernel = inspect.unwrap(modeling_qwen3_5_moe.torch_chunk_gated_delta_rule)

    def gated_delta(
        *args: torch.Tensor, cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, **how: Any
    ) -> Any:
        del cu_seqlens_cpu
        parts = [
            kernel(*(part[:, span] for part in args), **how)[0] for span in _documents(args[0], cu_seqlens)
        ]
        return torch.cat(parts, 1), None

    gated_delta_module()._fla_chunk_gated_delta_rule = note(gated_delta, "gated delta rule", used)
    # The package has a function of the module's name.
    convolution: Any = import_module("fla.modules.conv.causal_conv1d")
    convolution.causal_conv1d = note(_convolve, "causal convolution", used)


def gated_delta_module() -> Any:
    """Return the module that calls the kernel: the model's in 0.3.0, one of its own in main."""
    try:
        return import_module("torchtitan.models.qwen3_5.gdn")
    except ModuleNotFoundError:
        return import_module("torchtitan.models.qwen3_5.model")


def _convolve(
    *, x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """Convolve x, of shape (1, tokens, channels), with a weight of shape (channels, width)."""
    width = weight.shape[1]
    parts = [
        nn.functional.conv1d(
            nn.functional.pad(x[:, span].transpose(1, 2), [width - 1, 0]), weight[:, None], groups=len(weight)
        )
        for span in _documents(x, cu_seqlens)
    ]
    return nn.functional.silu(torch.cat(parts, 2)).transpose(1, 2), None


def _documents(tensor: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Iterator[slice]:
    """Yield the tokens of each document."""
    ends = [0, tensor.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    yield from (slice(start, end) for start, end in pairwise(ends))


class _Kernel(torch.autograd.Function):  # type: ignore[misc]
    """A kernel by its shapes: it keeps what it is given for its backward, and nothing else."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *given: torch.Tensor) -> torch.Tensor:
        """Return what is like the last of the given, in another shape."""
        ctx.save_for_backward(*given)
        return given[-1].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return as many gradients."""
        return None, *map(torch.empty_like, ctx.saved_tensors)


def follow_shapes() -> None:
    """Let what stands in for kernels go by shapes alone, and keep for its backward what they all have to."""
    from torchtitan.models.common.attention import FlexAttention, VarlenAttention

    # torchtitan knows the arguments by their names.
    def attend(
        self: nn.Module,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        out = _Kernel.apply((*q_BLNH.shape[:3], v_BLNH.shape[3]), q_BLNH, k_BLNH, v_BLNH)
        if out_transform is None:
            return out
        return out_transform(out, _Kernel.apply(q_BLNH.shape[:3], q_BLNH, k_BLNH))

    for attention in (FlexAttention, VarlenAttention):
        attention.forward = as_it_is_fed(attention, attend)
    globals()["_documents"] = lambda tensor, _: iter([slice(0, tensor.shape[1])])
    with suppress(ImportError):  # transformers or fla, without which there is no such model
        gated_delta_module()._fla_chunk_gated_delta_rule = lambda *given, **_: (
            _Kernel.apply(given[2].shape, *given),
            None,
        )
