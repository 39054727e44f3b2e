"""Upstream faults that a rehearsal is known to show, told by what is wrong and by how much.

Source: the issues, and rehearsals of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A fault of torchtitan's.

    Attributes:
        release: how the releases that have it begin.
        parameter: a pattern of the parameters whose gradients are wrong.
        issue: what it is, and where upstream has it.
        looks_like: a word of what its factor means, or empty.
    """

    release: str
    parameter: str
    issue: str
    looks_like: str = ""

    def explains(self, release: str, parameter: str, looks_like: str) -> bool:
        """Whether this is it."""
        return (
            release.startswith(self.release)
            and re.search(self.parameter, parameter) is not None
            and self.looks_like in looks_like
        )


_KNOWN = (
    Known(
        "0.2.",
        r"\.router\.gate\.",
        "the gradient of the router's gate is not summed over TP ranks: upstream issue #1805, mended in "
        "#2416 after 0.2.2",
    ),
    Known(
        "0.2.",
        "",
        "a pipeline's gradients are not divided by the tokens of the batch: upstream issue #2972",
        looks_like="token",
    ),
    Known(
        "0.3.",
        r"\.mlp2_bias",
        "the second bias of gpt_oss's experts is added on every TP rank: upstream pull request #4245",
    ),
    Known(
        "0.3.",
        r"\.attention\.wo\.bias$",
        "the bias of gpt_oss's wo is divided by the TP degree in the backward pass too: "
        "ScaledBiasRowwiseLinear, still in main",
        looks_like="not summed over",
    ),
)


def upstream_issue(release: str, parameter: str, looks_like: str) -> str:
    """Return the upstream fault that a wrong gradient comes of, or nothing where none is known."""
    found = (known.issue for known in _KNOWN if known.explains(release, parameter, looks_like))
    return next(found, "")
