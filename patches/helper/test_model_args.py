# Copyright (c) Meta Platforms, Inc. and affiliates.
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import dataclasses
import unittest
from types import SimpleNamespace

from torchtitan.distributed.tensor_parallel import validate_tp_compat
from torchtitan.protocols.train_spec import get_train_spec


class TestTPCompat(unittest.TestCase):
    def _args(self, model: str, flavor: str = "debugmodel", **changes):
        return dataclasses.replace(get_train_spec(model).model_args[flavor], **changes)

    def _message(self, model_args, tp: int) -> str:
        with self.assertRaises(ValueError) as raised:
            validate_tp_compat(model_args, tp)
        return str(raised.exception)

    def test_divisors_of_all_head_counts_are_accepted(self):
        for tp in (1, 2, 4):
            validate_tp_compat(self._args("llama3", n_heads=8, n_kv_heads=4), tp)

    def test_indivisible_n_kv_heads_is_refused(self):
        self.assertEqual(
            self._message(self._args("llama3", n_heads=8, n_kv_heads=2), 4),
            "Tensor parallel degree (4) must divide n_kv_heads (2). "
            "For Llama 3, max supported TP is 2.",
        )

    def test_more_kv_heads_than_ranks_must_divide_too(self):
        self.assertEqual(
            self._message(self._args("qwen3", n_heads=12, n_kv_heads=6), 4),
            "Tensor parallel degree (4) must divide n_kv_heads (6). "
            "For Qwen3, max supported TP is 6.",
        )

    def test_n_kv_heads_none_means_n_heads(self):
        self.assertEqual(
            self._message(self._args("llama4", n_heads=6, n_kv_heads=None), 4),
            "Tensor parallel degree (4) must divide n_heads (6). "
            "For Llama 4, max supported TP is 6.",
        )

    def test_mla_has_n_heads_only(self):
        self.assertEqual(
            self._message(self._args("deepseek_v3", n_heads=6), 4),
            "Tensor parallel degree (4) must divide n_heads (6). "
            "For DeepSeek-V3, max supported TP is 6.",
        )

    def test_moe_is_named(self):
        args = self._args("qwen3", "debugmodel_moe", n_heads=8, n_kv_heads=2)
        self.assertIn("For Qwen3-MoE, max supported TP is 2.", self._message(args, 4))

    def test_parallelize_fn_refuses_first_thing(self):
        for model in ("llama3", "llama4", "qwen3", "deepseek_v3"):
            parallelize_fn = get_train_spec(model).parallelize_fn
            args = self._args(model, n_heads=8)
            with self.assertRaisesRegex(ValueError, r"Tensor parallel degree \(3\)"):
                parallelize_fn(
                    SimpleNamespace(model_args=args), SimpleNamespace(tp=3), None
                )


if __name__ == "__main__":
    unittest.main()
