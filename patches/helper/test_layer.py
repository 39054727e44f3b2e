# Copyright (c) Meta Platforms, Inc. and affiliates.
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import unittest
from types import SimpleNamespace

from torchtitan.distributed.tensor_parallel import validate_tp_compat


class TestTPCompat(unittest.TestCase):
    def _config(self, **head_counts: int | None):
        return SimpleNamespace(
            layer=SimpleNamespace(attention=SimpleNamespace(**head_counts))
        )

    def _message(self, config, tp: int) -> str:
        with self.assertRaises(ValueError) as raised:
            validate_tp_compat(config, tp)
        return str(raised.exception)

    def test_divisors_of_all_head_counts_are_accepted(self):
        for tp in (1, 2, 4):
            validate_tp_compat(self._config(n_heads=8, n_kv_heads=4), tp)

    def test_indivisible_n_kv_heads_is_refused(self):
        message = self._message(self._config(n_heads=8, n_kv_heads=2), 4)
        self.assertTrue(
            message.startswith("Tensor parallel degree (4) must divide n_kv_heads (2).")
        )
        self.assertTrue(message.endswith("max supported TP is 2."))

    def test_n_kv_heads_none_means_n_heads(self):
        config = self._config(n_heads=6, n_kv_heads=None)
        self.assertIn("must divide n_heads (6)", self._message(config, 4))

    def test_mla_has_n_heads_only(self):
        config = self._config(n_heads=6)
        self.assertIn("must divide n_heads (6)", self._message(config, 4))


if __name__ == "__main__":
    unittest.main()
