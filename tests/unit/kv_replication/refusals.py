"""What replication says in both torchtitan lines alike."""

_PERMUTED = """\
KV-head replication is not supported here: checkpoint.{flag} = true permutes wk by whole heads, and a rank \
holds a part of one.
Without this check the run would die {when} step with "Cannot unflatten unevenly sharded tensor".
What works: {flag} = false with torchtitan's scripts/checkpoint_conversion before or after the run, or a \
tensor parallel degree that divides n_kv_heads without --replicate-kv-heads."""

PERMUTED = {
    flag: _PERMUTED.format(flag=flag, when=when)
    for flag, when in (("initial_load_in_hf", "before its first"), ("last_save_in_hf", "after its last"))
}
"""Setting of ``[checkpoint]`` -> why it does not go with a Llama 3 whose ranks share heads."""
