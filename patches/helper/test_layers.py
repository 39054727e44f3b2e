# Copyright (c) Meta Platforms, Inc. and affiliates.
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import importlib
import unittest
from types import SimpleNamespace

from torchtitan.config import ParallelismConfig
from torchtitan.distributed.tensor_parallel import validate_tp_compat


class TestTPCompat(unittest.TestCase):
    def _spec(self, model: str, flavor: str = "debugmodel"):
        module = importlib.import_module(f"torchtitan.models.{model}")
        return module.model_registry(flavor)

    def _config(self, model: str, flavor: str = "debugmodel", **head_counts: int):
        config = self._spec(model, flavor).model
        for layer in config.layers:
            for name, count in head_counts.items():
                setattr(layer.attention, name, count)
        return config

    def _delta_net(self, n_key_heads: int, n_value_heads: int):
        return SimpleNamespace(
            key_head_dim=16,
            value_head_dim=32,
            in_proj_q=SimpleNamespace(out_features=16 * n_key_heads),
            in_proj_v=SimpleNamespace(out_features=32 * n_value_heads),
        )

    def _message(self, config, tp: int) -> str:
        with self.assertRaises(ValueError) as raised:
            validate_tp_compat(config, tp)
        return str(raised.exception)

    def test_divisors_of_all_head_counts_are_accepted(self):
        for tp in (1, 2, 4):
            validate_tp_compat(self._config("llama3", n_heads=8, n_kv_heads=4), tp)

    def test_indivisible_n_kv_heads_is_refused(self):
        self.assertEqual(
            self._message(self._config("llama3", n_heads=8, n_kv_heads=2), 4),
            "Tensor parallel degree (4) must divide n_kv_heads (2). "
            "For Llama 3, max supported TP is 2.",
        )

    def test_more_kv_heads_than_ranks_must_divide_too(self):
        self.assertEqual(
            self._message(self._config("qwen3", n_heads=12, n_kv_heads=6), 4),
            "Tensor parallel degree (4) must divide n_kv_heads (6). "
            "For Qwen3, max supported TP is 6.",
        )

    def test_every_layer_counts(self):
        config = self._config("llama3", n_heads=8, n_kv_heads=4)
        config.layers[-1].attention.n_kv_heads = 2
        self.assertIn("must divide n_kv_heads (2)", self._message(config, 4))

    def test_mla_has_n_heads_only(self):
        self.assertEqual(
            self._message(self._config("deepseek_v3", n_heads=6), 4),
            "Tensor parallel degree (4) must divide n_heads (6). "
            "For DeepSeek-V3, max supported TP is 6.",
        )

    def test_every_gated_delta_net_counts(self):
        for heads, refused in (
            ((2, 8), "must divide n_key_heads (2)"),
            ((8, 6), "must divide n_value_heads (6)"),
        ):
            delta_nets = (self._delta_net(4, 8), self._delta_net(*heads))
            layers = [SimpleNamespace(attention=None, delta_net=x) for x in delta_nets]
            message = self._message(SimpleNamespace(layers=layers), 4)
            self.assertIn(refused, message)
            self.assertIn("max supported TP is 2.", message)

    def test_moe_is_named(self):
        config = self._config("qwen3", "debugmodel_moe", n_heads=8, n_kv_heads=2)
        self.assertIn("For Qwen3-MoE, max supported TP is 2.", self._message(config, 4))

    def test_update_from_config_refuses_a_later_layer(self):
        config = self._config("llama3", n_heads=8, n_kv_heads=4)
        config.layers[-1].attention.n_kv_heads = 2
        parallelism = ParallelismConfig(tensor_parallel_degree=4)
        with self.assertRaisesRegex(ValueError, r"must divide n_kv_heads \(2\)"):
            config.update_from_config(config=SimpleNamespace(parallelism=parallelism))

    def test_parallelize_fn_refuses_first_thing(self):
        for model in ("llama3", "qwen3", "deepseek_v3", "gpt_oss"):
            spec = self._spec(model)
            others = ("training", "parallelism", "compile_config", "ac_config")
            with self.assertRaisesRegex(ValueError, r"Tensor parallel degree \(3\)"):
                spec.parallelize_fn(
                    SimpleNamespace(config=spec.model),
                    parallel_dims=SimpleNamespace(tp=3),
                    dump_folder="",
                    **dict.fromkeys(others),
                )


if __name__ == "__main__":
    unittest.main()
