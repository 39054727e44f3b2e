"""The command line asks the installed torchtitan, whichever release it is."""

from __future__ import annotations

import json
import re
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from tests.forked import in_forks, run_module
from tests.torchtitan.installed import HAS_CONFIG_TREES
from tests.torchtitan.optional import missing_for_qwen3_5, needs_qwen3_5
from torchtitan_tp_validate import registry
from torchtitan_tp_validate.degrees import token_field

only_0_2 = pytest.mark.requires(torchtitan="0.2")  # reads TOML files
only_0_3 = pytest.mark.requires(torchtitan="0.3")  # has config registries

SCHEMA = json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema.json").read_text())

# Model, flavor and degrees of the TOML files in the repository of torchtitan 0.2.2
# (torchtitan/models/*/train_configs), which its wheel does not bring.
SHIPPED = {
    "llama3_debug": ("llama3", "debugmodel", 2048, {}),
    "llama3_8b": ("llama3", "8B", 8192, {}),
    "llama3_70b": ("llama3", "70B", 8192, {"tensor": 8}),
    "llama3_405b": ("llama3", "405B", 8192, {"tensor": 8}),
    "llama4_17bx16e": ("llama4", "17bx16e", 8192, {"tensor": 8, "expert": 1}),
    "llama4_17bx128e": ("llama4", "17bx128e", 8192, {"tensor": 8, "expert": 1}),
    "qwen3_0.6b": ("qwen3", "0.6B", 4096, {}),
    "qwen3_32b": ("qwen3", "32B", 4096, {}),
    "deepseek_v3_16b": ("deepseek_v3", "16B", 4096, {"expert": 8}),
    "deepseek_v3_671b": ("deepseek_v3", "671B", 4096, {"tensor": 8, "expert": 1}),
    "flux_dev": ("flux", "flux-dev", 2048, {}),
}


def toml(model: str, flavor: str, seq_len: int, degrees: dict[str, int]) -> str:
    parallelism = "".join(f"{name}_parallel_degree = {degree}\n" for name, degree in degrees.items())
    return (
        f'[model]\nname = "{model}"\nflavor = "{flavor}"\n'
        f"[training]\nseq_len = {seq_len}\n[parallelism]\n{parallelism}"
    )


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    for name, job in SHIPPED.items():
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (tmp_path / "jobs" / f"{name}.toml").write_text(toml(*job))
    return tmp_path / "jobs"


@only_0_3
def test_the_audit_finds_the_two_configs_that_cannot_start(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = tp_validate("audit", "--output-format", "json")
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA)
    by_status = {
        status: {result["name"] for result in document["results"] if result["status"] == status}
        for status in document["summary"]
    }
    assert "Traceback" not in err
    if missing_for_qwen3_5:
        assert "qwen3_5" in by_status["skipped"]
    expected = set() if missing_for_qwen3_5 else {"qwen35_122b_a10b", "qwen35_397b_a17b"}
    # Their dispatchers want a degree that the command line has yet to give.
    incomplete = {name for name in by_status["incompatible"] if name.endswith(("hybridep", "async_ep"))}
    # They would train wrong, as the installed torchtitan is.
    faulty = {name for name in by_status["incompatible"] if "lora" in name or "modeling_backend" in name}
    assert (status, by_status["incompatible"] - incomplete - faulty) == (1, expected)
    for result in document["results"]:
        if result["name"] in incomplete | faulty:
            (problem,) = result["judgements"][0]["problems"]
            assert problem["code"] in (("RUN001",) if result["name"] in incomplete else ("NUM007", "NUM011"))
            assert ("requires expert parallelism" in problem["text"]) is (result["name"] in incomplete)
    assert by_status["not_validated"] == set()
    assert len(by_status["compatible"]) > 50
    assert {"rl", "autoparallel.llama3"} <= by_status["skipped"]
    reasons = {result["name"]: result["reason"] for result in document["results"]}
    assert reasons["autoparallel.llama3"] == (
        "this torchtitan lists autoparallel.llama3, but does not ship it."
    )
    by_name = {result["name"]: result for result in document["results"]}
    if find_spec("torchao") is None:
        assert "torchao is not installed" in reasons["llama3_debugmodel_float8"]
        assert "Hopper or Blackwell" not in str(reasons)
    else:
        assert by_name["llama3_debugmodel_float8"]["not_judged"] == [
            "the hardware: this machine has no GPU of SM89 or later, and the config was judged as on one"
        ]
        unskipped = [name for name in by_name if re.search("float8|mxfp8|nvfp4|flex_flash|405b", name)]
        assert len(unskipped) >= 17
        assert by_status["skipped"].isdisjoint(unskipped)
    for bad in expected:
        assert by_name[bad]["location"]["file"].endswith("qwen3_5/config_registry.py")
        assert by_name[bad]["valid_tp_degrees"] == [1, 2]


@only_0_3
@needs_qwen3_5
def test_an_audit_of_one_module_says_it_in_full(tp_validate: Program) -> None:
    status, out, _ = tp_validate("audit", "qwen3_5")
    assert status == 1
    assert out.count("\nTensor parallel degree (") == 2
    assert out.startswith("qwen35_122b_a10b (by torchtitan's rule):\nTensor parallel degree (4) must divide")
    assert out.endswith("\n2 do not fit, 9 fit.\n")
    status, out, _ = tp_validate("audit", "gpt_oss")
    assert (status, out) == (0, "4 fit.\n")


@only_0_3
def test_an_audit_of_a_users_own_module(
    tp_validate: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_configs.py").write_text(
        "from torchtitan.models.llama3.config_registry import llama3_8b\n\n\n"
        "def mine():\n    config = llama3_8b()\n    config.parallelism.tensor_parallel_degree = 16\n"
        "    return config\n\n\ndef broken():\n    raise RuntimeError('no such disk')\n"
    )
    status, out, _ = tp_validate("audit", "my_configs", "--output-format", "github")
    assert status == 1
    assert f"file={tmp_path / 'my_configs.py'},line=4::Tensor parallel degree (16)" in out
    assert out.splitlines()[1].endswith("::cannot be built here: no such disk.")


@only_0_3
def test_an_audit_says_what_cannot_be_imported_or_is_not_there(tp_validate: Program, tmp_path: Path) -> None:
    status, _, err = tp_validate("audit", "qwen3_6")
    assert (status, err.splitlines()[-1]) == (
        2,
        "tp-validate: torchtitan has no module 'qwen3_6'; did you mean qwen3_5 or qwen3?",
    )
    status, out, _ = tp_validate("audit", "rl")
    assert (status, out.startswith("rl: torchtitan.experiments.rl.config_registry cannot be imported")) == (
        2,
        True,
    )
    (tmp_path / "job.toml").write_text("")
    status, out, _ = tp_validate("audit", tmp_path / "job.toml")
    assert (status, "this torchtitan does not read TOML files" in out) == (2, True)


@only_0_3
@needs_qwen3_5
def test_a_run_is_judged_as_the_launcher_does(tp_validate: Program) -> None:
    run = ("check", "--", "--module", "qwen3_5", "--config", "qwen35_35b_a3b")
    flag = "--parallelism.tensor_parallel_degree"
    status, out, _ = tp_validate(*run, flag, "2")
    assert (status, out) == (
        0,
        "this run: TP 2 with EP 8 fits Qwen3.5-MoE by torchtitan's rule. Degrees that work: 1, 2. "
        "Not validated: FSDP001: data_parallel_shard_degree is left to the number of ranks, which is not "
        "known before the run starts.\n",
    )
    status, out, _ = tp_validate(*run, flag, "4")
    assert status == 1
    assert out.splitlines()[1] == (
        "Tensor parallel degree (4) must divide n_kv_heads (2). For Qwen3.5-MoE, max supported TP is 2."
    )
    # all degrees, and the sequence length
    status, out, _ = tp_validate(*run, "--parallelism.expert_parallel_degree", "3")
    assert (status, "Expert parallel degree (3) must divide num_experts (256)" in out) == (1, True)
    status, out, _ = tp_validate(*run, flag, "2", "--training.seq_len", "33")
    assert (status, "TP009 seq_len = 33 is not a multiple of 2" in out) == (1, True)


@only_0_3
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--module", "lama3", "--config", "x"), "torchtitan has no module 'lama3'; did you mean llama3"),
        (
            ("--module", "llama3", "--config", "llama3_8bb"),
            "llama3 has no config 'llama3_8bb'; did you mean llama3_8b",
        ),
        (("--module", "llama3"), "torchtitan does not take the job: --config is required."),
    ],
)
def test_a_run_that_does_not_exist_is_bad_usage(
    tp_validate: Program, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = tp_validate("check", "--", *arguments)
    assert (status, out) == (2, "")
    assert f"tp-validate: {message}" in err
    assert "Traceback" not in err


def test_a_flavor_is_judged_without_a_run(tp_validate: Program) -> None:
    flavor = ("check", "--model", "llama3", "--flavor", "8B", "--tp")
    fits = "llama3 8B: TP 8 fits Llama 3 by torchtitan's rule. Degrees that work: 1, 2, 4, 8."
    only_built = "TP005: the feed-forward's size is known when the model is built"
    assert tp_validate(*flavor, "8", "--seq-len", "8192")[:2] == (
        0,
        f"{fits}\n" if HAS_CONFIG_TREES else f"{fits} Not validated: {only_built}.\n",
    )
    assert tp_validate(*flavor, "8").out.endswith(f"TP009: no {token_field()} is given.\n")
    status, out, _ = tp_validate(*flavor, "16")
    assert (status, out.splitlines()[1]) == (
        1,
        "Tensor parallel degree (16) must divide n_kv_heads (8). For Llama 3, max supported TP is 8.",
    )
    status, _, err = tp_validate("check", "--model", "llama3", "--flavor", "8b", "--tp", "2")
    assert (status, err) == (2, "tp-validate: llama3 has no flavor '8b'; did you mean 8B?\n")
    status, _, err = tp_validate("check", "--model", "lama3", "--flavor", "8B", "--tp", "2")
    assert (status, "torchtitan has no model 'lama3'; did you mean llama3" in err) == (2, True)
    status, out, err = tp_validate("check", "--model", "flux", "--flavor", "flux-dev", "--tp", "2")
    assert status == 2
    # The flux of 0.2.0 imports what nothing installs.
    assert "parallelize_flux, which is not guarded." in out or "No module named 'einops'" in err


def test_the_table_has_every_flavor_and_its_degrees(tp_validate: Program) -> None:
    status, out, _ = tp_validate("table", "--model", "llama3", "--model", "qwen3", "--tp", "2,8,16")
    assert status == 0
    lines = out.splitlines()
    headings = ["model", "flavor", "heads", "KV", "2", "8", "16", "KV", "shared", "binding", "constraint"]
    assert lines[0].split() == headings
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines[1:]}
    shared = {"llama3": ["16", "32"], "qwen3": ["8", "16", "32"]}
    binding = ["TP002", "n_kv_heads", "="]
    assert rows["llama3", "8B"] == ["32", "8", "yes", "yes", "-", *shared["llama3"], *binding, "8"]
    assert rows["qwen3", "30B-A3B"] == ["32", "4", "yes", "-", "-", *shared["qwen3"], *binding, "4"]
    assert len(rows) == len(registry.model("llama3").flavors) + len(registry.model("qwen3").flavors)


def test_the_table_as_json_markdown_and_by_world_size(tp_validate: Program) -> None:
    table = ("table", "--model", "llama3", "--tp", "2,8", "--output-format")
    document = json.loads(tp_validate(*table, "json", "--world-size", "12").out)
    jsonschema.validate(document, SCHEMA)
    assert {result["status"] for result in document["results"]} == {"listed"}
    (result,) = (result for result in document["results"] if result["name"] == "llama3 8B")
    assert [(j["compatible"], j["in_world"]) for j in result["judgements"]] == [(True, True), (True, False)]
    assert (
        "| llama3 8B | yes | yes | TP002 n_kv_heads = 8 | 1, 2, 4, 8 |" in tp_validate(*table, "markdown").out
    )
    out = tp_validate("table", "--model", "llama3", "--tp", "2,8", "--world-size", "12").out
    assert re.search(r" yes  \(yes\)  16 32 +TP002", out)
    assert out.endswith("(yes), (-): the degree does not divide 12 ranks.\n")


def test_shared_kv_heads_are_judged_by_the_launchers_flag(tp_validate: Program) -> None:
    model = ("check", "--model", "llama3", "--flavor", "8B", "--output-format", "json", "--tp", "16")
    status, out, _ = tp_validate(*model)
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA)
    (result,) = document["results"]
    assert (status, result["kv_replication_tp_degrees"]) == (1, [16, 32])
    status, out, _ = tp_validate(*model, "--replicate-kv-heads")
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA)
    (result,) = document["results"]
    assert (status, result["valid_tp_degrees"]) == (0, [1, 2, 4, 8, 16, 32])
    assert tp_validate(*model[:-1], "24", "--replicate-kv-heads").status == 1


@only_0_3
@needs_qwen3_5
def test_a_run_with_shared_kv_heads_is_judged_as_the_launcher_would(tp_validate: Program) -> None:
    run = ("--", "--module", "qwen3_5", "--config", "qwen35_122b_a10b")
    assert tp_validate("check", *run).status == 1
    assert tp_validate("check", "--replicate-kv-heads", *run).status == 0
    status, out, _ = tp_validate(
        "check", "--replicate-kv-heads", *run, "--parallelism.context_parallel_degree", "2"
    )
    assert status == 1
    assert "Context Parallel is not yet supported for Qwen3.5." in out
    assert tp_validate("audit", "qwen3_5", "--replicate-kv-heads").status == 0


@in_forks
@only_0_2
def test_a_toml_job_is_judged_in_a_process_that_has_imported_no_model(shipped: Path, tmp_path: Path) -> None:
    job = ["--job.config_file", str(shipped / "llama3_8b.toml"), "--parallelism.tensor_parallel_degree", "16"]
    ended = run_module("torchtitan_tp_validate", ["check", "--", *job], out=tmp_path)
    assert ended.returncode == 1, ended
    assert "Tensor parallel degree (16) must divide n_kv_heads (8)." in ended.output, ended


@in_forks
@pytest.mark.requires(torchtitan=("0.2.0", "0.2.1"))
def test_the_older_releases_are_rehearsed_as_well(tmp_path: Path) -> None:
    model = ["--model", "llama3", "--flavor", "debugmodel", "--tp", "2"]
    ended = run_module("torchtitan_tp_validate", ["rehearse", *model], out=tmp_path)
    assert ended.returncode == 0, ended
    assert "llama3 debugmodel at tp 2, dp_shard 2: equal to one process" in ended.output, ended


def test_hugging_face_weights_of_split_heads_are_refused_unless_the_adapter_is_repaired(
    tp_validate: Program, tmp_path: Path
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(toml("llama3", "8B", 8192, {}))
    run = ["--module", "llama3", "--config", "llama3_8b"]
    run = run if HAS_CONFIG_TREES else ["--job.config_file", str(job)]
    off = "--checkpoint.no-enable" if HAS_CONFIG_TREES else "--checkpoint.no_enable"
    split = "CKPT001 Hugging Face weights of 8 key-value heads are split over 16 ranks:"

    def check(*flags: str, tp: int, checkpoint: str = "--checkpoint.enable") -> tuple[int, str]:
        degree = ("--parallelism.tensor_parallel_degree", str(tp), checkpoint)
        command = ("check", "--world-size", "16", *flags, "--", *run, *degree, "--checkpoint.last_save_in_hf")
        status, out, _ = tp_validate(*command)
        return status, out

    for flags, tp in (((), 1), (("--replicate-kv-heads",), 16)):
        assert check(*flags, tp=tp, checkpoint=off)[0] == 0
        status, out = check(*flags, tp=tp)
        assert (status, split in out) == (1, True), out
        status, out = check(*flags, "--repair", tp=tp)
        assert (status, "Repaired: CKPT001." in out) == (0, True), out


def test_the_table_of_everything_reads_what_is_guarded(tp_validate: Program) -> None:
    status, out, _ = tp_validate("table", "--all", "--output-format", "json")
    results = json.loads(out)["results"]
    assert status == 0
    listed = [result for result in results if result["status"] == "listed"]
    assert len(listed) > 40
    assert all(result["valid_tp_degrees"][0] == 1 for result in listed)
    skipped = {result["group"] for result in results if result["status"] == "skipped"}
    assert "flux" in skipped
    assert not skipped & {"llama3", "qwen3", "deepseek_v3"}
    # As shipped, a TP degree of its own is what every flavor has.
    bad = [result["name"] for result in listed if len(result["valid_tp_degrees"]) < 2]
    assert bad == []


@only_0_2
def test_the_jobs_that_0_2_ships_all_fit_but_for_a_known_fault(tp_validate: Program, shipped: Path) -> None:
    status, out, _ = tp_validate("audit", shipped)
    # TP 8 and no EP: its routers would train wrong.
    (refused,) = [line for line in out.splitlines() if line.endswith("(by torchtitan's rule):")]
    assert (status, "deepseek_v3_671b.toml" in refused, "NUM001" in out) == (1, True, True)
    status, out, err = tp_validate("audit", shipped, "--allow", "NUM001", "--output-format", "json")
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA)
    assert status == 0, out
    skipped = [result for result in document["results"] if result["status"] == "skipped"]
    # The flux of 0.2.0 imports what nothing installs.
    assert [result["reason"].partition(": ")[2] for result in skipped] in ([], ["No module named 'einops'."])
    assert document["summary"]["compatible"] == len(SHIPPED) - len(skipped)
    assert "Traceback" not in err
    status, out, _ = tp_validate("audit", shipped, "--repair")
    assert (status, f"{len(SHIPPED) - len(skipped)} fit" in out.splitlines()[-1]) == (0, True)


@only_0_2
def test_a_folder_with_a_bad_job_an_unknown_one_and_a_broken_one(
    tp_validate: Program, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "more" / "bad.toml"
    bad.parent.mkdir()
    good.write_text(toml("llama3", "8B", 8192, {"tensor": 8}))
    bad.write_text(toml("llama3", "8B", 8192, {"tensor": 16}))
    status, out, _ = tp_validate("audit", tmp_path)
    assert status == 1
    assert out.startswith(f"{bad} (by torchtitan's rule):\nTensor parallel degree (16) must divide")
    assert out.endswith("\n1 do not fit, 1 fit.\n")
    status, out, _ = tp_validate("audit", bad, "--output-format", "github")
    assert f"file={bad},line=7::Tensor" in out

    (tmp_path / "unknown.toml").write_text(toml("llama3", "9B", 8192, {}))
    (tmp_path / "broken.toml").write_text("[model")
    (tmp_path / "field.toml").write_text('[model]\nnmae = "llama3"')
    status, out, _ = tp_validate("audit", tmp_path)
    assert status == 2
    assert f"{tmp_path / 'unknown.toml'}: llama3 has no flavor '9B'; did you mean 8B?" in out
    assert f"{tmp_path / 'broken.toml'} is not valid TOML: Expected ']'" in out
    assert "torchtitan does not take the job: Invalid field names" in out
    assert out.endswith("\n1 do not fit, 3 could not be judged, 1 fit.\n")


@only_0_2
def test_an_audit_needs_files(tp_validate: Program, tmp_path: Path) -> None:
    status, _, err = tp_validate("audit")
    assert (status, "this torchtitan keeps its training configs in TOML files" in err) == (2, True)
    status, _, err = tp_validate("audit", tmp_path)
    assert (status, f"no training config in {tmp_path}" in err) == (2, True)


@only_0_2
def test_a_toml_job_is_judged_with_its_overrides(tp_validate: Program, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(toml("llama3", "8B", 8192, {"tensor": 8}))
    run = ("check", "--", "--job.config_file", job)
    flag = "--parallelism.tensor_parallel_degree"
    assert tp_validate(*run)[:2] == (
        0,
        "this run: TP 8 fits Llama 3 by torchtitan's rule. Degrees that work: 1, 2, 4, 8.\n",
    )
    status, out, _ = tp_validate(*run, flag, "16")
    assert (status, "Tensor parallel degree (16) must divide n_kv_heads (8)." in out) == (1, True)
    status, out, _ = tp_validate(*run, "--training.seq_len", "33")
    assert (status, "TP009 seq_len = 33 is not a multiple of 16" in out) == (1, True)
    status, _, err = tp_validate("check", "--", "--job.config_file", tmp_path / "nothing.toml")
    assert (status, "nothing.toml cannot be read: No such file or directory." in err) == (2, True)
    status, _, err = tp_validate(*run, "--model.flavor", "8b")
    assert (status, "llama3 has no flavor '8b'; did you mean 8B?" in err) == (2, True)
    status, out, err = tp_validate(*run, "--no.such_flag", "1")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
