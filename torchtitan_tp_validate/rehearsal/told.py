"""Say in words what a rehearsal found."""

from __future__ import annotations

from collections.abc import Iterator

from torchtitan_tp_validate.rehearsal.findings import Difference, Rehearsal

OUTCOMES = {
    "equal": "equal to one process",
    "differs": "differs from one process",
    "dies": "dies",
    "hangs": "hangs",
}

_MOST_SHOWN = 3
_MOST_TRACEBACK = 6


def name(rehearsal: Rehearsal) -> str:
    """Return the model and the degrees that it was rehearsed at."""
    degrees = ", ".join(f"{axis} {degree}" for axis, degree in rehearsal.degrees.items()) or "one rank"
    return f"{rehearsal.model} at {degrees}"


def seen(rehearsal: Rehearsal) -> list[str]:
    """Return what was seen, the likeliest cause first, and how much more there is."""
    lines = list(_seen(rehearsal))
    more = len(_causes(rehearsal)) - _MOST_SHOWN
    return [*lines, f"and {more} more"] if more > 0 else lines


def stack(rehearsal: Rehearsal) -> list[str]:
    """Return the end of the traceback of the first rank that did not end, or of the stack that it hung in."""
    end = _first_end(rehearsal)
    # A stack has the innermost call first, under a heading.
    lines = end["traceback"].strip().splitlines() if end else []
    return lines[:_MOST_TRACEBACK] if end and end["how"] == "hung" else lines[-_MOST_TRACEBACK:]


def circumstances(rehearsal: Rehearsal) -> Iterator[str]:
    """Yield what the rules say, and what is not as in the run."""
    yield f"by the rules: {rehearsal.verdict.partition(chr(10))[0]}"
    for cut in rehearsal.cuts:
        yield f"smaller than in the run: {cut}"
    if rehearsal.stand_ins:
        yield f"not the run's own: {', '.join(rehearsal.stand_ins)}"


def whole_text(rehearsal: Rehearsal) -> str:
    """Return everything, in lines."""
    lines = [*seen(rehearsal), *(f"  {line}" for line in stack(rehearsal)), *circumstances(rehearsal)]
    heading = f"{name(rehearsal)}: {OUTCOMES[rehearsal.outcome]}"
    return "\n".join((heading, *(f"  {line}" for line in lines)))


def _seen(rehearsal: Rehearsal) -> Iterator[str]:
    if rehearsal.outcome == "equal":
        sizes = " and ".join(map(str, dict.fromkeys(rehearsal.local_batch_sizes)))
        resumed = ", and over one more resumed from a checkpoint" if rehearsal.resumed else ""
        validated = "validation loss, " if rehearsal.validated else ""
        yield (
            f"loss, {validated}gradient norm, {rehearsal.compared} gradients and all copies over two steps, "
            f"at local batch sizes {sizes}{resumed}; worst relative difference {rehearsal.worst:.1e}"
        )
    elif end := _first_end(rehearsal):
        others = len([other for other in rehearsal.ends if other["how"] == end["how"]]) - 1
        who = f"rank {end['rank']}{f' and {others} more' if others else ''}"
        error = end["error"].strip().partition("\n")[0]
        yield f"{who}, {end['stage']}{f': {error}' if error else ''}"
    else:
        if rehearsal.output:
            yield f"the first wrong output of the forward pass is that of {rehearsal.output}"
        yield from map(_told, _causes(rehearsal)[:_MOST_SHOWN])
        issues = dict.fromkeys(one.issue for one in rehearsal.differences if one.issue)
        yield from (f"known: {issue}" for issue in issues)


def _first_end(rehearsal: Rehearsal) -> dict[str, str] | None:
    """Return how the first rank ended that did not wait for others."""
    ends = sorted(rehearsal.ends, key=lambda end: end["how"] == "waited")
    return dict(ends[0]) if ends else None


def _causes(rehearsal: Rehearsal) -> list[Difference]:
    """Return the first difference of each kind and parameter."""
    first: dict[tuple[str, str], Difference] = {}
    for difference in rehearsal.differences:
        first.setdefault((difference.what, difference.name), difference)
    return list(first.values())


def _told(difference: Difference) -> str:
    where = f"step {difference.step}, local batch size {difference.local_batch_size}"
    if difference.what == "copies":
        return f"the copies of {difference.name} on several ranks are not equal after {where}"
    if difference.what == "uninitialized":
        return f"{difference.name} is never initialized: it is what the memory happens to hold"
    if difference.what == "trainable":
        return f"{difference.name} is trained here or in one process, not in both"
    of = f" of {difference.name}" if difference.name else ""
    times = f"{difference.factor:.3f} times that of one process"
    looks = f": {difference.looks_like}" if difference.looks_like else ""
    return f"{difference.what}{of} is {times}{looks} ({where}; off by {difference.distance:.1e})"
