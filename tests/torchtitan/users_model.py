from __future__ import annotations

import dataclasses
from typing import Any

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3.sharding import set_llama3_sharding_config


class UsersModel(Decoder):
    """A model that the package has never heard of, made of torchtitan's modules."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        adapter: Any = None

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            set_llama3_sharding_config(self, enable_sp=True)
            if self.adapter is not None:
                # Borrowed from a layer: a linear that is split by columns.
                self.adapter.sharding_config = self.layers[0].feed_forward.w1.sharding_config
