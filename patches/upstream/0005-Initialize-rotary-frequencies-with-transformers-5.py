"""A Llama of the transformers backend, initialized as the trainer does it.

python 0005-Initialize-rotary-frequencies-with-transformers-5.py
"""

import tempfile
from types import SimpleNamespace

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.experiments import transformers_modeling_backend as backend
from transformers import LlamaConfig, LlamaForCausalLM

hf_config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, architectures=["LlamaForCausalLM"],
)  # fmt: skip
folder = tempfile.mkdtemp()
hf_config.save_pretrained(folder)
config = backend.HFTransformerModel.Config(backend.TitanModelConfig())
config.update_from_config(
    config=SimpleNamespace(
        hf_model=folder,
        training=SimpleNamespace(max_context_length=32),
        parallelism=ParallelismConfig(),
        debug=SimpleNamespace(deterministic=False),
    )
)
expected = LlamaForCausalLM(hf_config).model.rotary_emb.inv_freq
with torch.device("meta"):
    model = config.build()
model.to_empty(device="cpu")
inv_freq = model.model.model.rotary_emb.inv_freq
inv_freq.fill_(float("nan"))  # whatever the memory holds
with torch.no_grad():
    model.init_states()
print("expected:", expected.tolist())
print("inv_freq:", inv_freq.tolist())
