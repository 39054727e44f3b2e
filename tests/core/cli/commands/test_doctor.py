"""``doctor``."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema

from tests.core.cli.conftest import Program


def test_the_doctor_as_json(tp_validate: Program) -> None:
    status, out, _ = tp_validate("doctor", "--output-format", "json")
    document = json.loads(out)
    jsonschema.validate(
        document,
        json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema-doctor.json").read_text()),
    )
    assert status == int(any(target["faulty"] for target in document["targets"]))
    assert document["problem"] is None
    assert {"python", "torch"} <= set(document["versions"])
