"""make_patches.py places the guard in trees that it has not seen, and says what it cannot place."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import apply_patches
import make_patches
import pytest
from make_patches import CannotPatchError, Patched

from tests.patches.trees import RELEASE, ROOT, add_model, make, put, snapshot, with_check
from torchtitan_tp_validate.wrappers import TARGETS

GENERATIONS = ("model_args", "layer", "layers")


def functions(patched: Patched) -> dict[str, ast.FunctionDef]:
    """Every top-level function of the changed files, by dotted name."""
    return {
        f"{path.removesuffix('.py').replace('/', '.')}.{node.name}": node
        for path, text in patched.files.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def first_statement(function: ast.FunctionDef) -> str:
    """What a function does first, its docstring aside."""
    return ast.unparse(function.body[0 if ast.get_docstring(function) is None else 1])


def reformat_and_reorder(file: Path) -> None:
    """Other quotes, indentation and line breaks, no comments, and every function in another place."""
    module = ast.parse(file.read_text())
    places = [index for index, node in enumerate(module.body) if isinstance(node, ast.FunctionDef)]
    in_order = [module.body[index] for index in places]
    for index, node in zip(places, reversed(in_order), strict=True):
        module.body[index] = node
    text = re.sub(r"^( +)", lambda match: match[0] * 2, ast.unparse(module), flags=re.MULTILINE)
    file.write_text(f"# Reformatted.\n\n\n{text}\n")


def test_a_reformatted_reordered_and_extended_release_is_guarded_in_the_same_places(
    checkout: Path, pristine: Path
) -> None:
    before = make_patches.patch(pristine)
    models = checkout / "torchtitan" / "models"
    shutil.copytree(models / "llama3", models / "newmodel")
    new = next(models.glob("newmodel/**/parallelize.py"))
    new.write_text(new.read_text().replace("def parallelize_llama(", "def parallelize_newmodel("))
    for entry_point in before.guarded:
        reformat_and_reorder(checkout / f"{entry_point.module.replace('.', '/')}.py")
    reformat_and_reorder(new)

    after = make_patches.patch(checkout)

    added = f"{new.relative_to(checkout).with_suffix('').as_posix().replace('/', '.')}.parallelize_newmodel"
    assert {str(x) for x in after.guarded} == {*map(str, before.guarded), added}
    defined = functions(after)
    for entry_point in after.guarded:
        is_transformers = "transformers_modeling_backend" in entry_point.module
        config = "model.model.config" if is_transformers else after.generation.config
        assert first_statement(defined[str(entry_point)]) == f"validate_tp_compat({config}, parallel_dims.tp)"
    assert after.unified == before.unified
    for path, text in after.files.items():
        compile(text, path, "exec")


def test_every_known_entry_point_of_the_release_is_guarded(pristine: Path) -> None:
    patched = make_patches.patch(pristine)
    assert {str(x) for x in patched.guarded} == {
        str(entry_point) for target in TARGETS.values() for entry_point in target.entry_points()
    }
    if RELEASE == "0.2.0":
        assert patched.left_alone == []
    else:
        flux, encoders = patched.left_alone
        assert flux.endswith(".parallelize_flux: its model has no n_heads that could be checked")
        assert encoders.endswith("takes no model")
    assert patched.unified == (
        [
            "Decoder.Config.update_from_config in torchtitan/models/common/decoder.py",
            "Qwen35Model.Config.update_from_config in torchtitan/models/qwen3_5/model.py",
        ]
        if RELEASE == "0.3.0"
        else []
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_made_tree_is_patched_fires_and_comes_back(tmp_path: Path, generation: str) -> None:
    tree, out = make(tmp_path / "tree", generation), tmp_path / "out"
    add_model(tree, generation, "newmodel", "parallelize_newmodel")
    for file in tree.glob("torchtitan/models/**/parallelize.py"):
        reformat_and_reorder(file)
    before = snapshot(tree)
    patched = make_patches.patch(tree)
    make_patches.write(patched, out)
    told = apply_patches.run(tree, out, check=False, reverse=False)
    assert told.complete
    assert told.lines[1].startswith(f"the guard fires in {len(patched.guarded)} entry points: ")
    assert any(entry_point.function == "parallelize_newmodel" for entry_point in patched.guarded)
    apply_patches.run(tree, out, check=False, reverse=True)
    assert snapshot(tree) == before


def test_the_fork_passes_its_own_tests_and_is_refused_by_its_one_layer_config(tmp_path: Path) -> None:
    tree, out = make(tmp_path / "tree", "layer"), tmp_path / "out"
    put(
        tree,
        "torchtitan/models/qwen3_5_moe/config.py",
        """
        from types import SimpleNamespace


        class Config:
            layer = SimpleNamespace(
                attention=SimpleNamespace(n_heads=16, n_kv_heads=2),
                deltanet=SimpleNamespace(n_key_heads=3),
                moe=SimpleNamespace(),
            )
        """,
    )
    make_patches.write(make_patches.patch(tree), out)
    apply_patches.run(tree, out, check=False, reverse=False)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", make_patches.TESTS]
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout
    code = """
        from types import SimpleNamespace as NS
        from torchtitan.models.qwen3_5_moe.config import Config
        from torchtitan.models.qwen3_5_moe.parallelize import parallelize_qwen3_5_moe

        rest = dict(training=None, model_converters=None, parallelism=None)
        model = NS(config=Config())
        mesh = NS(tp=2, get_mesh=lambda name: name)
        assert parallelize_qwen3_5_moe(model, parallel_dims=mesh, **rest) == "tp"
        try:
            parallelize_qwen3_5_moe(model, parallel_dims=NS(tp=4), **rest)
        except ValueError as error:
            print(error)
        """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout == (
        "Tensor parallel degree (4) must divide n_kv_heads (2). For Qwen3.5-MoE, max supported TP is 2.\n"
    )


def test_main_of_march_2026_is_patched_and_all_of_it_refuses(tmp_path: Path) -> None:
    """The job's config had another name, and an experiment kept its function in another file."""
    tree, out = make(tmp_path / "tree", "layer"), tmp_path / "out"
    put(tree, "torchtitan/models/llama3/model.py", with_check("trainer_config"))
    experiment = "torchtitan/experiments/rl/unified/models/parallelize.py"
    put(tree, experiment, "def parallelize_qwen3(model, parallel_dims):\n    return model\n")
    patched = make_patches.patch(tree)
    assert len(patched.unified) == len(patched.left_alone) == 1
    make_patches.write(patched, out)
    told = apply_patches.run(tree, out, check=False, reverse=False)
    assert told.complete
    assert told.lines[1:] == (
        "the guard fires in 3 entry points and 1 config-time check: "
        '"Tensor parallel degree (4) must divide n_kv_heads (2)."',
    )


# --- refusals ----------------------------------------------------------------------------------------

LLAMA3 = "torchtitan.models.llama3.parallelize"
_FILE = "torchtitan/models/llama3/parallelize.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make(tmp_path / "tree", "layers")


def refusal(tree: Path) -> str:
    with pytest.raises(CannotPatchError) as error:
        make_patches.patch(tree)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import os\n\ndef parallelize_lama(model, parallel_dims):\n    return os\n",
            f"{LLAMA3}.parallelize_llama: its module does not define parallelize_llama.",
        ),
        (
            "import os\n\nif os:\n    def parallelize_llama(model, parallel_dims):\n        return os\n",
            f"{LLAMA3}.parallelize_llama: its module does not define parallelize_llama.",
        ),
        (
            "import os\n\ndef parallelize_llama(model, world_mesh):\n    return os\n",
            f"{LLAMA3}.parallelize_llama: parallelize_llama(model, world_mesh) takes no parallel_dims.",
        ),
        (
            "import os\n\ndef parallelize_llama(model, *args):\n    return os\n",
            f"{LLAMA3}.parallelize_llama takes parallel_dims through * or **.",
        ),
        (
            "import os\n\ndef parallelize_llama(model, parallel_dims): return os\n",
            f"{LLAMA3}.parallelize_llama has its body on the line of its def.",
        ),
        (
            "def parallelize_llama(model, parallel_dims):\n    return model\n",
            f"{_FILE} imports nothing: there is no place for an import in it.",
        ),
    ],
)
def test_an_entry_point_without_a_place_is_refused_by_name(tree: Path, source: str, reason: str) -> None:
    put(tree, _FILE, source)
    assert refusal(tree) == reason


def test_every_missing_entry_point_is_named(tree: Path) -> None:
    for model in ("llama3", "qwen3_5"):
        (tree / f"torchtitan/models/{model}/parallelize.py").unlink()
    wanted = "the package has no parallelize.py or infra/parallelize.py."
    assert refusal(tree) == (
        f"{LLAMA3}.parallelize_llama: {wanted}\n"
        f"  torchtitan.models.qwen3_5.parallelize.parallelize_qwen3_5: {wanted}"
    )


RL = "torchtitan.experiments.rl.unified"
_RL = RL.replace(".", "/")
_FUNCTION = "def parallelize_qwen3(model, parallel_dims):\n    return model\n"


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        # upstream pull request #2545, and main for some weeks
        (
            f"{_RL}/models/parallelize.py",
            _FUNCTION,
            f"{RL}.parallelize.parallelize_qwen3: the package has no parallelize.py or infra/parallelize.py; "
            f"{_RL}/models/parallelize.py defines it",
        ),
        (
            f"{_RL}/plugin.py",
            "",
            f"{RL}.parallelize.parallelize_qwen3: the package has no parallelize.py or infra/parallelize.py",
        ),
        (
            f"{_RL}/infra/parallelize.py",
            "def parallelize_qwen3_moe(model, parallel_dims):\n    return model\n",
            f"{RL}.infra.parallelize.parallelize_qwen3: its module does not define parallelize_qwen3",
        ),
        (
            f"{_RL}/parallelize.py",
            "import os\n\ndef parallelize_qwen3(model, *args):\n    return os\n",
            f"{RL}.parallelize.parallelize_qwen3 takes parallel_dims through * or **",
        ),
        (
            f"{_RL}/parallelize.py",
            _FUNCTION,
            f"{_RL}/parallelize.py imports nothing: there is no place for an import in it",
        ),
    ],
)
def test_an_experiment_without_a_place_is_left_alone_and_named(
    tree: Path, file: str, source: str, reason: str
) -> None:
    put(tree, file, source)
    patched = make_patches.patch(tree)
    assert [entry_point.function for entry_point in patched.guarded] == [
        "parallelize_llama",
        "parallelize_qwen3_5",
    ]
    assert file not in patched.files
    assert patched.left_alone == [reason]


def test_the_script_says_why_and_writes_nothing(tree: Path, tmp_path: Path) -> None:
    (tree / _FILE).unlink()
    command = [
        sys.executable,
        ROOT / "scripts" / "make_patches.py",
        "--source",
        tree,
        "--out",
        tmp_path / "o",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        f"Cannot make the patch: {LLAMA3}.parallelize_llama: "
        "the package has no parallelize.py or infra/parallelize.py.\n"
    )
    assert not (tmp_path / "o").exists()


def test_a_missing_entry_point_of_a_real_release_is_refused(checkout: Path) -> None:
    entry_point = next(TARGETS["qwen3"].entry_points(checkout))
    file = checkout / f"{entry_point.module.replace('.', '/')}.py"
    file.write_text(file.read_text().replace("def parallelize_qwen3(", "def parallelize_gwen3("))
    assert refusal(checkout) == f"{entry_point}: its module does not define parallelize_qwen3."


def test_a_tree_without_any_known_model_is_refused(tree: Path) -> None:
    for model in ("llama3", "qwen3_5"):
        shutil.rmtree(tree / "torchtitan/models" / model)
    assert refusal(tree) == "it has no parallelize function under any known name."


def test_a_tree_whose_layers_are_described_in_an_unknown_way_is_refused(tree: Path) -> None:
    put(
        tree,
        "torchtitan/models/common/decoder.py",
        "class Decoder:\n    class Config:\n        blocks: list\n",
    )
    assert refusal(tree) == (
        "it is unknown how this torchtitan describes its layers: there is neither a Decoder.Config with "
        "'layers' or 'layer' in torchtitan/models/common/decoder.py nor a BaseModelArgs in "
        "torchtitan/protocols/model.py."
    )


def test_a_tree_without_a_place_for_the_helper_is_refused(tree: Path) -> None:
    (tree / "torchtitan/distributed/tensor_parallel.py").unlink()
    assert (
        refusal(tree) == "there is no torchtitan/distributed/tensor_parallel.py to put validate_tp_compat in."
    )


def test_what_is_imported_already_is_not_imported_again(tree: Path) -> None:
    path = "torchtitan/distributed/tensor_parallel.py"
    put(tree, path, "import math\n\nused = math\n")
    assert make_patches.patch(tree).files[path].count("import math") == 1


def test_a_patched_tree_is_refused(tree: Path) -> None:
    patched = make_patches.patch(tree)
    for path, text in patched.files.items():
        put(tree, path, text)
    assert refusal(tree) == "tests/unit_tests/test_tp_compat.py is there already."
    (tree / "tests/unit_tests/test_tp_compat.py").unlink()
    assert refusal(tree) == "torchtitan/distributed/tensor_parallel.py defines validate_tp_compat already."


def test_the_unit_tests_call_functions_as_the_checkout_defines_them(tree: Path) -> None:
    """main had ``model_converters`` until 2026-04-27, and ``trainer_config`` until 2026-05-28."""
    stock = make_patches.patch(tree).files[make_patches.TESTS]
    assert stock == (make_patches.HELPER / "test_layers.py").read_text(encoding="utf-8")
    path = "torchtitan/models/llama3/parallelize.py"
    text = (tree / path).read_text(encoding="utf-8")
    put(tree, path, text.replace("training,", "training, model_converters: object = None,"))
    put(tree, "torchtitan/models/llama3/model.py", with_check("trainer_config").replace("fig,", "fig,\n "))
    tests = make_patches.patch(tree).files[make_patches.TESTS]
    assert stock.count('ac_config")') == tests.count('ac_config", "model_converters")') == 1
    assert stock.count("update_from_config(config=") == tests.count("update_from_config(trainer_config=") == 1
    ast.parse(tests)


def test_a_file_that_is_no_python_is_refused(tree: Path) -> None:
    put(tree, "torchtitan/distributed/tensor_parallel.py", "def (:\n")
    assert refusal(tree).startswith("torchtitan/distributed/tensor_parallel.py cannot be parsed: ")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} is no torchtitan checkout: it has no torchtitan folder or no assets/version.txt."
    )


# --- torchtitan's own check, and imports ---------------------------------------------------------------


def unified(tree: Path, body: str) -> tuple[Patched, str]:
    """What becomes of an ``update_from_config`` of a model's own."""
    path = "torchtitan/models/llama3/model.py"
    head = "class Llama3Model:\n    class Config:\n        def update_from_config(self, *, config):\n"
    body = textwrap.indent(f"{textwrap.dedent(body)}return 'n_heads'\n", " " * 12)
    put(tree, path, f"import os\n\n\n{head}{body}")
    patched = make_patches.patch(tree)
    return patched, patched.files.get(path, "")


CHECK = """
tp = config.parallelism.tensor_parallel_degree
if tp > 1 and self.layers[0].n_heads % tp:
    n_heads = self.layers[0].n_heads
    raise ValueError(f"tensor_parallel_degree ({tp}) must divide n_heads ({n_heads}).")
"""


def test_a_check_without_a_base_gives_way_to_the_helper(tree: Path) -> None:
    patched, text = unified(tree, CHECK)
    assert patched.unified == ["Llama3Model.Config.update_from_config in torchtitan/models/llama3/model.py"]
    assert text == (
        "import os\n\nfrom torchtitan.distributed.tensor_parallel import validate_tp_compat\n\n\n"
        "class Llama3Model:\n    class Config:\n        def update_from_config(self, *, config):\n\n"
        "            validate_tp_compat(self, config.parallelism.tensor_parallel_degree)\n"
        "            return 'n_heads'\n"
    )


BASE = "Decoder.Config.update_from_config(self, config=config)\n"


@pytest.mark.parametrize("parameter", ["config", "trainer_config", "job_config"])
def test_the_helper_is_asked_about_the_functions_own_parameter(tree: Path, parameter: str) -> None:
    """main called it ``trainer_config`` from 2026-03-18 to 2026-05-28."""
    path = "torchtitan/models/llama3/model.py"
    put(tree, path, with_check(parameter))
    call = f"            validate_tp_compat(self, {parameter}.parallelism.tensor_parallel_degree)\n"
    assert call in make_patches.patch(tree).files[path]


def test_a_check_without_a_jobs_config_is_left_alone_and_named(tree: Path) -> None:
    path = "torchtitan/models/llama3/model.py"
    put(tree, path, with_check("tp").replace("            tp = tp.parallelism.tensor_parallel_degree\n", ""))
    patched = make_patches.patch(tree)
    assert path not in patched.files
    assert patched.left_alone == [
        "Llama3Model.Config.update_from_config in torchtitan/models/llama3/model.py "
        "has no parameter whose .parallelism it reads"
    ]


def test_a_check_behind_a_base_that_asks_goes_without_replacement(tree: Path) -> None:
    check = textwrap.indent(CHECK, " " * 12)
    method = f"        def update_from_config(self, *, config):{check}"
    head = "import os\n\n\nclass Decoder:\n    class Config:\n        layers: list\n\n"
    put(tree, make_patches.DECODER, head + method)
    patched, text = unified(tree, BASE + CHECK)
    assert [place.split()[0] for place in patched.unified] == [
        "Decoder.Config.update_from_config",
        "Llama3Model.Config.update_from_config",
    ]
    assert "validate_tp_compat(self" in patched.files[make_patches.DECODER]
    assert "validate_tp_compat" not in text
    assert "must divide" not in text


def test_a_check_behind_a_base_without_one_is_replaced(tree: Path) -> None:
    _, text = unified(tree, BASE + CHECK)
    assert "validate_tp_compat(self" in text
    assert "must divide" not in text


def test_what_later_lines_need_stays(tree: Path) -> None:
    _, text = unified(tree, f"{CHECK}\nself.degree = tp\n")
    assert "            tp = config.parallelism.tensor_parallel_degree\n" in text
    assert "must divide" not in text


@pytest.mark.parametrize(
    "more",
    [
        "    raise NotImplementedError('Weight tying is not supported.')\n",
        "elif config.vision:\n    raise ValueError(f'must divide {config.vision.num_heads}')\n",
    ],
)
def test_a_check_that_refuses_other_things_too_is_left_alone_and_named(tree: Path, more: str) -> None:
    patched, text = unified(tree, CHECK + more)
    assert text == ""
    assert patched.unified == []
    assert patched.left_alone == [
        "Llama3Model.Config.update_from_config in torchtitan/models/llama3/model.py "
        "refuses other things than head counts too"
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import os\n", "import os\n\nfrom {} import {}\n"),
        ("import os\nimport torch\n", "import os\nimport torch\n\nfrom {} import {}\n"),
        (
            "import os\n\nfrom torchtitan.models import utils\n",
            "import os\n\nfrom {} import {}\nfrom torchtitan.models import utils\n",
        ),
        ("import os\n\nfrom . import model\n", "import os\n\nfrom {} import {}\n\nfrom . import model\n"),
        (
            "from torchtitan.config import A\nfrom torchtitan.tools import B\n",
            "from torchtitan.config import A\nfrom {} import {}\nfrom torchtitan.tools import B\n",
        ),
        ("from {} import (\n    a,\n    z,\n)\n", "from {} import a, {}, z\n"),
        (
            "from {} import maybe_enable_async_tp  # why\n",
            "from {} import (\n    maybe_enable_async_tp,\n    {},\n)  # why\n",
        ),
        ("from {} import NoParallel as N\n", "from {} import NoParallel as N, {}\n"),
        ("from {} import *\n", "from {} import *\n"),
    ],
)
def test_the_import_goes_where_upstreams_sorter_would_have_it(tree: Path, before: str, after: str) -> None:
    def filled(text: str) -> str:
        module, name = make_patches.HELPER_MODULE, make_patches.HELPER_NAME
        return text.replace("from {}", f"from {module}").replace("{}", name)

    function = "\n\ndef parallelize_llama(model, parallel_dims):\n    return model\n"
    put(tree, _FILE, filled(before) + function)
    imports, _, _ = make_patches.patch(tree).files[_FILE].partition("\n\ndef ")
    assert imports == filled(after)
