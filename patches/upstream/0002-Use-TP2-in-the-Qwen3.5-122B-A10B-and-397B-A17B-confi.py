"""The Qwen3.5 MoE configs, as the trainer hands them to their model.

python 0002-Use-TP2-in-the-Qwen3.5-122B-A10B-and-397B-A17B-confi.py
"""

from torchtitan.models.qwen3_5 import config_registry

for name in ("qwen35_35b_a3b", "qwen35_122b_a10b", "qwen35_397b_a17b"):
    config = getattr(config_registry, name)()
    try:
        config.model_spec.model.update_from_config(config=config)
        outcome = "accepted"
    except ValueError as error:
        outcome = f"ValueError: {error}"
    tp = config.parallelism.tensor_parallel_degree
    print(f"{name}: TP {tp}: {outcome}")
