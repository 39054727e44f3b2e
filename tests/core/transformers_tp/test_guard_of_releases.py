"""What install() says of transformers releases that it does not know, in stand-in packages without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.fake_torchtitan import FakeTorchtitan

OLD = ("integrations", "distribute_model", "model, tp_plan, distributed_config, device_mesh, tp_size")
NEW = ("distributed", "apply_tensor_parallelism", "model, tp_mesh, tp_plan")
PRELUDE = """
import warnings
from types import SimpleNamespace as NS
import torchtitan_tp_validate as tpv
warnings.simplefilter("error")

class Model:
    config = NS(model_type="llama", to_dict=lambda: {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
    tp_plan = _tp_plan = {"model.layers.*.self_attn.k_proj": "colwise"}

MESH = NS(size=lambda: 4)
"""


def fake(folder: Path, version: str, package: str, function: str, parameters: str) -> FakeTorchtitan:
    """A transformers of this version with one function that distributes a model."""
    tree = FakeTorchtitan(folder)
    tree.write("transformers/modeling_utils.py", "class PreTrainedModel:\n    def post_init(self): pass\n")
    tree.write(
        f"transformers/{package}/tensor_parallel.py",
        f"def {function}({parameters}):\n    return 'distributed'\n",
    )
    metadata = folder / f"transformers-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n", encoding="utf-8")
    return tree


@pytest.mark.parametrize(
    ("version", "where", "call"),
    [
        ("5.2.0", OLD, "(Model(), 'auto', None, MESH, 4)"),
        ("5.15.0", ("integrations", "apply_tensor_parallelism", OLD[2]), "(Model(), 'auto', None, MESH, 4)"),
        ("5.16.0", ("distributed", "apply_tensor_parallelism", "model, tp_mesh"), "(Model(), MESH)"),
        ("5.23.0", NEW, "(Model(), MESH, {'model.layers.0.self_attn.k_proj': 'colwise'})"),
    ],
)
def test_every_layout_is_guarded_before_and_after_its_import_and_restored(
    tmp_path: Path, version: str, where: tuple[str, str, str], call: str
) -> None:
    package, function, _ = where
    fake(tmp_path, version, *where).expect(f"""{PRELUDE}
tpv.install(strict=True)
import transformers.{package}.tensor_parallel as module
for again in range(2):
    try:
        module.{function}{call}
        raise SystemExit("not refused")
    except tpv.TPCompatError as error:
        assert str(error).startswith("Tensor parallel degree (4) must divide num_key_value_heads (2).")
    [state] = [s for s in tpv.installed().guarded if s.model == "transformers"]
    assert state.detail == "guarded", state
    kept = [module.{function}]  # a list, so that no module holds it under a name
    tpv.uninstall()
    assert module.{function}{call} == "distributed"
    assert module.{function} is kept[0].__wrapped__
    tpv.install(strict=True)
""")


def test_what_the_plan_does_not_split_by_heads_is_let_through(tmp_path: Path) -> None:
    fake(tmp_path, "5.23.0", *NEW).expect(f"""{PRELUDE}
tpv.install()
from transformers.distributed.tensor_parallel import apply_tensor_parallelism as apply
gathered = {{"model.layers.0.self_attn.k_proj": "colwise_gather_output", "lm_head": "colwise_gather_output"}}
assert apply(Model(), MESH, gathered) == "distributed"
assert apply(Model(), MESH, {{}}) == "distributed"
assert apply(Model(), NS(size=lambda: 2), None) == "distributed"
try:
    apply(Model(), MESH, None)
    raise SystemExit("not refused")
except tpv.TPCompatError:
    pass
""")


def test_up_to_5_14_expert_parallelism_follows_the_expert_plan_alone(tmp_path: Path) -> None:
    fake(tmp_path, "5.14.1", *OLD).expect(f"""{PRELUDE}
tpv.install()
from transformers.integrations.tensor_parallel import distribute_model
model = Model()
model._ep_plan = {{"model.layers.*.mlp.experts": "grouped_gemm"}}
for config in ({{"enable_expert_parallel": True}}, NS(enable_expert_parallel=True)):
    assert distribute_model(model, "auto", config, MESH, 4) == "distributed"
for config in ({{}}, NS(enable_expert_parallel=False)):
    try:
        distribute_model(model, "auto", config, MESH, 4)
        raise SystemExit("not refused")
    except tpv.TPCompatError:
        pass
""")


def test_a_model_that_cannot_be_read_is_loaded_and_said_to_be_unchecked(tmp_path: Path) -> None:
    fake(tmp_path, "5.23.0", *NEW).expect(f"""{PRELUDE}
tpv.install()
from transformers.distributed.tensor_parallel import apply_tensor_parallelism as apply
Model.config = NS(model_type="odd", to_dict=lambda: {{"model_type": "odd", "num_hidden_layers": 2}})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert apply(Model(), MESH, None) == "distributed"
[warning] = caught
assert warning.category is tpv.NotValidatedWarning
text = str(warning.message)
assert text.startswith("Not validated: the config has no num_attention_heads"), text
assert text.endswith("The model is loaded unchecked."), text
""")


@pytest.mark.parametrize(
    ("version", "where", "problem"),
    [
        (
            "5.24.0",
            NEW,
            "transformers 5.24.0 is not a release that the guard was tested with (5.2 to 5.23): "
            "transformers.distributed.tensor_parallel.apply_tensor_parallelism was found in it "
            "and is guarded.",
        ),
        (
            "5.23.0",
            ("distributed", "shard_model", "model, tp_mesh"),
            "transformers.distributed.tensor_parallel.apply_tensor_parallelism is not guarded: it is gone "
            "(looked for transformers.distributed.tensor_parallel.apply_tensor_parallelism or "
            "transformers.integrations.tensor_parallel.apply_tensor_parallelism or "
            "transformers.integrations.tensor_parallel.distribute_model).",
        ),
        (
            "5.23.0",
            ("distributed", "apply_tensor_parallelism", "net, axes"),
            "transformers.distributed.tensor_parallel.apply_tensor_parallelism is not guarded: "
            "apply_tensor_parallelism(net, axes) takes no model and no tp_mesh or device_mesh.",
        ),
    ],
)
def test_what_is_not_known_or_cannot_be_guarded_is_said_by_name(
    tmp_path: Path, version: str, where: tuple[str, str, str], problem: str
) -> None:
    output = fake(tmp_path, version, *where).expect(f"""{PRELUDE}
import transformers.{where[0]}.tensor_parallel as module
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tpv.install()
print(*[warning.message for warning in caught if "torchtitan" not in str(warning.message)], sep="\\n")
assert {{warning.category for warning in caught}} == {{tpv.InstallWarning}}
tpv.uninstall()
try:
    tpv.install(strict=True)
    raise SystemExit("not raised")
except tpv.InstallError as error:
    assert str(caught[-1].message) in str(error)
assert not tpv.installed()
""")
    assert output == f"{problem}\n"


def test_fix_tp_plan_reaches_the_class_whenever_it_is_imported_and_leaves_it_as_it_was(
    tmp_path: Path,
) -> None:
    fake(tmp_path, "5.23.0", *NEW).expect(f"""{PRELUDE}
tpv.install(fix_tp_plan=True)
from transformers.modeling_utils import PreTrainedModel
wrapped = PreTrainedModel.post_init
import transformers.distributed.tensor_parallel
[state] = [s for s in tpv.installed().guarded if s.model == "transformers"]
assert state.detail == "guarded, and plans are completed", state
tpv.uninstall()
assert PreTrainedModel.post_init is wrapped.__wrapped__
tpv.install()
assert PreTrainedModel.post_init is wrapped.__wrapped__
tpv.install(fix_tp_plan=True)
assert PreTrainedModel.post_init is not wrapped.__wrapped__
""")
