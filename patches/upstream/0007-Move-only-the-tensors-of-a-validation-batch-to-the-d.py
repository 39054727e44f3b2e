"""The first validation of a run on images, with a batch as MultiModalCollator makes it.

python 0007-Move-only-the-tensors-of-a-validation-batch-to-the-d.py
"""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torchtitan.components import validate

validate.utils.device_type = "cpu"
batch = {"input": torch.ones(1, 4), "special_tokens": {"image_id": 5, "video_id": 6}}
loader = mock.MagicMock()
loader.__iter__.return_value = iter([(batch, torch.ones(1, 4, dtype=torch.long))])

validator = object.__new__(validate.Validator)
validator.config = SimpleNamespace(steps=1)
validator.parallel_dims = SimpleNamespace(
    dp_enabled=False, pp_enabled=False, dp_cp_enabled=False, cp_enabled=False
)
validator.parallelism = SimpleNamespace(spmd_backend="spmd_types")
validator.dl_config = SimpleNamespace(build=lambda **_: loader)
validator.dp_world_size, validator.dp_rank, validator.tokenizer = 1, 0, None
validator.seq_len = validator.num_tokens_per_batch = 4
validator.metrics_processor = mock.Mock(ntokens_since_last_log=0)
validator.validation_context = nullcontext
validator.loss_fn = lambda predictions, labels: (predictions.sum(), None)


class Model(torch.nn.Module):
    def forward(self, tokens, special_tokens):
        print("special tokens:", special_tokens)
        return tokens


validator.validate([Model()], step=1)
