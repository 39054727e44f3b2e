from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from torchtitan_tp_validate.cli import main

SUBCOMMANDS = ("check", "table", "audit", "rule", "rules", "layouts", "rehearse", "doctor", "completion")


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the JSON document."""
        return json.loads(self.out)["results"]


class Program:
    """``tp-validate`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Result:
        self._capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *self._capsys.readouterr())


@pytest.fixture
def tp_validate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Program(capsys)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A Hugging Face config with 8 query and 2 key-value heads, and linear attention of 6."""
    content = {
        "model_type": "qwen3_5_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 6,
        "intermediate_size": 64,
        "vocab_size": 128,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return file
