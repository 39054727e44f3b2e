"""How often a step gathers wk and wv, whose heads ranks share."""

from __future__ import annotations

import json
from pathlib import Path

from tests.forked import in_forks, run_module
from torchtitan_tp_validate.rehearsal.models import installed_line


@in_forks
def test_wk_and_wv_are_gathered_once_each_and_again_in_backward_only_where_it_computes_forward_again(
    tmp_path: Path,
) -> None:
    backends = installed_line().BACKENDS["llama3"]
    wanted = {
        f"llama3:8/2:ac={ac}{f',backend={backend}' if backend else ''}": [2, again]
        for backend in backends
        for ac, again in (("none", 0), ("selective", 2), ("full", 2))
    }
    result = run_module(f"{__package__}.count_gathers", [*wanted], out=tmp_path)
    assert result.returncode == 0, result
    lines = [line for line in result.output.splitlines() if line.startswith("{")]
    assert {case: counts for line in lines for case, counts in json.loads(line).items()} == wanted
