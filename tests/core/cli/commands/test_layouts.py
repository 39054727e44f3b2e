"""What `tp-validate layouts` says of its own arguments, and of what it found."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import torchtitan
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.rehearsal import memory
from torchtitan_tp_validate.rehearsal.memory import Sent, State, Traffic
from torchtitan_tp_validate.search import Layout

GIB = 2**30
SVG = "{http://www.w3.org/2000/svg}"
SCHEMA = json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema-layouts.json").read_text())
LAYOUTS = [
    Layout(Degrees(tp=1, dp_shard=8)),
    Layout(Degrees(tp=1, dp_shard=4, dp_replicate=2)),
    Layout(Degrees(tp=2, dp_shard=4), repairs=("NUM004",)),
    Layout(Degrees(tp=8), pp=1),
]


class Meter:
    """Lays out a model of 40 GiB, whose shards are even but for tensor parallelism's."""

    whole = State(10 * GIB, 10 * GIB, 20 * GIB)

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.name = "debug 8B"

    def measure(self, degrees: Mapping[str, int], world_size: int) -> State:
        assert world_size == 8
        self.measured.append(degrees["tp"])
        return State(GIB, GIB, 3 * GIB if degrees["tp"] < 8 else 4 * GIB)

    def follow_step(self, degrees: Mapping[str, int], world_size: int) -> Traffic:
        assert world_size == 8
        if degrees["tp"] > 1:
            return Traffic(uncounted="it cannot be followed.")
        sent = [
            Sent(0, ("dp_shard",), (0, 1), 2**20),
            Sent(0, ("dp_shard",), (0, 7), 2**19),
            Sent(0, ("ep",), (0, 1), 2**21),
            # The first rank of another stage sends less to some, and more to others.
            Sent(4, ("dp_shard",), (4, 5), 2**18),
            Sent(4, ("pp",), (0, 4), 2**19),
        ]
        return Traffic(tuple(sent), peak=3 * GIB, taken=7 * GIB)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """A search that finds four layouts, and what measures them."""
    meter = Meter()

    @contextmanager
    def layout_meter(arguments: list[str], *, replicate_kv_heads: bool) -> Iterator[Meter]:
        assert (arguments, replicate_kv_heads) == (["--config", "8b"], False)
        yield meter

    search = SimpleNamespace(
        axes=["tp", "dp_replicate", "dp_shard"],
        considered=9,
        candidates=LAYOUTS,
        judged=4,
        excluded=Counter(TP002=5),
        confirmed=lambda: iter(LAYOUTS),
        fields=lambda layout: {"tp": layout.of("tp")},
        arguments=lambda layout: [],
    )
    monkeypatch.setattr(torchtitan, "installed", contextlib.nullcontext)
    monkeypatch.setattr(torchtitan, "search_layouts", lambda *_, **__: (search, meter.name))
    monkeypatch.setattr(memory, "layout_meter", layout_meter)
    return meter


def test_layouts_that_hold_too_much_are_left_out_and_counted(tp_validate: Program, meter: Meter) -> None:
    words = ["layouts", "--world-size", "8", "--memory", "5GiB", "--", "--config", "8b"]
    assert tp_validate(*words).out == (
        "debug 8B on 8 ranks:\n"
        "\n"
        "tp  dp_replicate  dp_shard  GiB per rank  told     repairs\n"
        " 1             1         8          5.00\n"
        " 2             1         4          5.00           NUM004\n"
        "\n"
        "The first is the run with: as it is\n"
        "\n"
        "9 layouts are there; arithmetic leaves 4, of which 4 were judged in full for this list.\n"
        "Excluded, by each rule that a layout breaks: TP002 5, MEMORY 2.\n"
    )
    # Two replicas of 40 GiB on eight ranks of 5 need not be laid out.
    assert meter.measured == [1, 2, 8]


TRAFFIC = ["layouts", "--world-size", "8", "--traffic", "--limit", "3"]


def test_what_is_sent_is_listed_or_why_it_is_not_known(tp_validate: Program, meter: Meter) -> None:
    lines = tp_validate(*TRAFFIC, "--gpus-per-node", "4", "--", "--config", "8b").out.splitlines()
    sent = "ep 2.00 MiB, dp_shard 1.00 MiB, dp_shard 0.50 MiB across nodes, pp 0.50 MiB across nodes"
    assert lines[2:6] == [
        "tp  dp_replicate  dp_shard  GiB in a step  told     repairs  sent by a rank in a step",
        f" 1             1         8           3.00                    {sent}",
        f" 1             2         4           3.00                    {sent}",
        " 2             1         4              -           NUM004   not counted",
    ]
    assert lines[7:9] == ["The first is the run with: as it is", "Not counted: it cannot be followed."]
    assert not meter.measured
    out = tp_validate(*TRAFFIC, "--output-format", "concise", "--", "--config", "8b").out
    assert (
        out.splitlines()[0] == "dp_shard 8: 3.00 GiB in a step; ep 2.00 MiB, dp_shard 1.50 MiB, pp 0.50 MiB"
    )
    words = [*TRAFFIC, "--memory", "5GiB", "--output-format", "concise", "--", "--config", "8b"]
    # With parameters and optimizer state, a rank takes 7.
    said = "dp_shard 8: 5.00 GiB per rank, 3.00 GiB in a step (MEMORY); ep"
    assert tp_validate(*words).out.startswith(said)


def test_what_is_sent_is_data(tp_validate: Program, meter: Meter) -> None:
    words = ["--output-format", "json", "--", "--config", "8b"]
    document = json.loads(tp_validate(*TRAFFIC, *words).out)
    jsonschema.validate(document, SCHEMA)
    first, _, last = document["layouts"]
    assert first["sent"] == [
        {"axes": ["ep"], "across_nodes": None, "bytes": 2**21},
        {"axes": ["dp_shard"], "across_nodes": None, "bytes": 3 * 2**19},
        {"axes": ["pp"], "across_nodes": None, "bytes": 2**19},
    ]
    assert (first["uncounted"], last["sent"], last["uncounted"]) == ("", None, "it cannot be followed.")
    assert (first["bytes_in_a_step"], last["bytes_in_a_step"]) == (3 * GIB, None)
    document = json.loads(tp_validate(*TRAFFIC, "--gpus-per-node", "4", *words).out)
    assert [one["across_nodes"] for one in document["layouts"][0]["sent"]] == [False, False, True, True]


def test_a_picture_has_a_bar_for_each_layout(tp_validate: Program, meter: Meter, tmp_path: Path) -> None:
    words = [*TRAFFIC, "--memory", "5GiB", "--output-format", "svg", "--output-file", tmp_path / "a.svg"]
    assert tp_validate(*words, "--", "--config", "8b").status == 0
    drawn = ElementTree.parse(tmp_path / "a.svg").getroot()
    said = [one.text for one in drawn.iter(f"{SVG}text")]
    assert said[:3] == ["debug 8B on 8 ranks", "dp_shard 8", "tp 2, dp_shard 4"]
    assert said[3:6] == ["held by the fullest rank, GiB", "5.00", "5.00"]
    assert said[9:12] == ["sent by a rank in a step, MiB", "4.00", "not counted"]
    assert (said[6:9], said[12:]) == (["parameters", "gradients", "optimizer"], ["ep", "dp_shard", "pp"])
    sent = [("ep: 2.00 MiB", 160.0), ("dp_shard: 1.50 MiB", 120.0), ("pp: 0.50 MiB", 40.0)]
    bars = [(one[0].text, float(one.attrib["width"])) for one in drawn.iter(f"{SVG}rect") if len(one)]
    one = [("parameters: 1.00 GiB", 64.0), ("gradients: 1.00 GiB", 64.0), ("optimizer: 3.00 GiB", 192.0)]
    assert bars == [*one, *one, *sent]
    # Alone it is drawn too; and foreign text is text.
    rest = ["--memory", "5GiB", "--limit", "1", "--output-format", "svg", "--", "--config", "8b"]
    meter.name = "<8B> & more"
    alone = ElementTree.fromstring(tp_validate("layouts", "--world-size", "8", *rest).out)
    assert next(alone.iter(f"{SVG}text")).text == "<8B> & more on 8 ranks"
    assert float(alone.attrib["width"]) < float(drawn.attrib["width"])


def test_a_picture_of_nothing_is_not_drawn(tp_validate: Program, meter: Meter) -> None:
    words = ["layouts", "--world-size", "8", "--output-format", "svg", "--", "--config", "8b"]
    status, out, err = tp_validate(*words)
    assert (status, out) == (2, "")
    assert "--output-format svg draws what --memory and --traffic tell: give one of them" in err


def test_the_list_is_as_long_as_it_may_be(tp_validate: Program, meter: Meter) -> None:
    options = ["--world-size", "8", "--limit", "1", "--output-format", "concise"]
    words = ["layouts", *options, "--", "--config", "8b"]
    assert tp_validate(*words).out == "dp_shard 8\n"
    assert not meter.measured


def test_what_is_written_down_is_no_list(tp_validate: Program, meter: Meter) -> None:
    options = ["--world-size", "8", "--emit", "cli", "--output-format", "json"]
    words = ["layouts", *options, "--", "--config", "8b"]
    status, out, err = tp_validate(*words)
    assert (status, out) == (2, "")
    assert "--emit writes no list: leave --output-format out" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which run? give torchtitan's arguments after --"),
        (["--", "--config", "8b"], "--world-size is missing: how many ranks are there?"),
        (["--world-size", "0"], "'0' is not a whole number from 1 to"),
        (["--memory", "80"], ""),
        (["--memory", "80 gib"], ""),
        (["--memory", "much"], "'much' is no size: write 80GiB, 141GB or a number of bytes"),
        (["--memory", "0GB"], "'0GB' is no size"),
        (["--memory", "80KiB"], "'80KiB' is no size"),
        (["--tp", "2"], "there is no option '--tp'"),
        (["--emit", "yaml"], "there is no 'yaml'; choose from cli, toml, recipe"),
    ],
)
def test_arguments_that_are_wrong_are_told(tp_validate: Program, words: list[str], told: str) -> None:
    status, out, err = tp_validate("layouts", *words)
    assert (status, out) == (2, "")
    assert (told or "which run? give torchtitan's arguments after --") in err
