from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.fake_torchtitan import FakeTorchtitan, fake_0_2, fake_0_3, fake_fork, make

# A model that TP 2 fits and TP 4 does not, and what a call with each must do.
PRELUDE = """
import warnings
from types import SimpleNamespace as NS
import torchtitan_tp_validate as tpv
MODEL = NS(model_args=NS(n_heads=8, n_kv_heads=2, n_layers=2))

def refuses(function, **more):
    assert function(MODEL, parallel_dims=NS(tp=2), **more) is MODEL
    try:
        function(MODEL, parallel_dims=NS(tp=4), **more)
    except tpv.TPCompatError:
        return True
    return False
"""


def script(body: str) -> str:
    return PRELUDE + textwrap.dedent(body)


@pytest.fixture
def line_0_2(tmp_path: Path) -> FakeTorchtitan:
    return fake_0_2(tmp_path)


@pytest.fixture
def line_0_3(tmp_path: Path) -> FakeTorchtitan:
    return fake_0_3(tmp_path)


@pytest.mark.parametrize(
    ("make_fake", "module", "function", "more"),
    [
        (fake_0_2, "torchtitan.models.llama3.infra.parallelize", "parallelize_llama", "job_config=None"),
        (fake_0_2, "torchtitan.models.llama4.infra.parallelize", "parallelize_llama", "job_config=None"),
        (fake_0_2, "torchtitan.models.qwen3.infra.parallelize", "parallelize_qwen3", "job_config=None"),
        (fake_0_3, "torchtitan.models.llama3.parallelize", "parallelize_llama", "training=None"),
        (fake_0_3, "torchtitan.models.qwen3_5.parallelize", "parallelize_qwen3_5", "training=None"),
        (
            fake_fork,
            "torchtitan.models.qwen3_5_moe.parallelize",
            "parallelize_qwen3_5_moe",
            "training=None, model_converters=None, parallelism=None",
        ),
    ],
)
@pytest.mark.parametrize("imported", ["before", "after"])
def test_install_guards_a_module_imported_before_or_after(
    tmp_path: Path,
    make_fake: Callable[[Path], FakeTorchtitan],
    module: str,
    function: str,
    more: str,
    imported: str,
) -> None:
    package = module.removesuffix(".parallelize").removesuffix(".infra")
    load = f"import {module} as defining; import {package} as package"
    before, after = (load, "") if imported == "before" else ("", load)
    make_fake(tmp_path).expect(
        script(f"""
        warnings.simplefilter("ignore")
        {before}
        tpv.install()
        {after}
        bound = [defining.{function}, package.{function}, package.model_registry().parallelize_fn]
        for f in bound:
            assert f is bound[0]
            assert refuses(f, {more})
        assert defining.calls == [MODEL] * 3  # only the calls that fit went through
        tpv.uninstall()
        for f in (defining.{function}, package.{function}, package.model_registry().parallelize_fn):
            assert not refuses(f, {more})
            assert not hasattr(f, "__wrapped__")
        """)
    )


def test_uninstall_restores_the_identical_objects_in_modules_and_specs(line_0_3: FakeTorchtitan) -> None:
    line_0_3.write("users_code.py", "from torchtitan.models.llama3 import parallelize_llama as mine\n")
    line_0_3.expect(
        script("""
        import users_code
        import torchtitan.models.llama3 as llama3, torchtitan.models.llama3.parallelize as defining
        [original] = [defining.parallelize_llama]  # a list, so that no module holds it under a name
        keep = [original]
        del original
        spec = llama3.model_registry()
        tpv.install()
        import torchtitan.models.qwen3_5
        late = llama3.model_registry()
        for f in (users_code.mine, llama3.parallelize_llama, defining.parallelize_llama, spec.parallelize_fn,
                  late.parallelize_fn):
            assert f is not keep[0] and refuses(f, training=None)
        tpv.uninstall()
        for f in (users_code.mine, llama3.parallelize_llama, defining.parallelize_llama, spec.parallelize_fn,
                  late.parallelize_fn):
            assert f is keep[0]
        """)
    )


def test_install_twice_is_install_once(line_0_3: FakeTorchtitan) -> None:
    line_0_3.expect(
        script("""
        import torchtitan.models.llama3.parallelize as defining
        keep = [defining.parallelize_llama]
        tpv.install()
        first = [defining.parallelize_llama]
        tpv.install()
        assert defining.parallelize_llama is first[0] and first[0].__wrapped__ is keep[0]
        tpv.uninstall()
        tpv.uninstall()
        assert defining.parallelize_llama is keep[0]
        tpv.install()
        assert refuses(defining.parallelize_llama, training=None)
        """)
    )


def test_somebody_elses_later_patch_stays_and_our_guard_inside_it_goes_quiet(
    line_0_3: FakeTorchtitan,
) -> None:
    line_0_3.expect(
        script("""
        import torchtitan.models.llama3.parallelize as defining
        tpv.install()

        def theirs(model, *, _ours=defining.parallelize_llama, **kwargs):
            return _ours(model, **kwargs)

        defining.parallelize_llama = theirs
        assert refuses(theirs, training=None)
        [state] = [s for s in tpv.installed().not_guarded if s.faulty]
        assert state.detail == "replaced by somebody else after install()", state
        tpv.uninstall()
        assert defining.parallelize_llama is theirs
        assert not refuses(theirs, training=None)
        """)
    )


def test_somebody_elses_earlier_patch_is_guarded_and_restored(line_0_3: FakeTorchtitan) -> None:
    line_0_3.expect(
        script("""
        import torchtitan.models.llama3.parallelize as defining

        class Theirs:
            def __call__(self, model, *, parallel_dims, training):
                return model

        theirs = [Theirs()]
        defining.parallelize_llama = theirs[0]
        tpv.install()
        assert refuses(defining.parallelize_llama, training=None)
        tpv.uninstall()
        assert defining.parallelize_llama is theirs[0]
        """)
    )


def test_the_context_manager_uninstalls_only_what_it_installed(line_0_3: FakeTorchtitan) -> None:
    line_0_3.expect(
        script("""
        import torchtitan.models.llama3.parallelize as defining
        with tpv.installed() as handle:
            assert handle and refuses(defining.parallelize_llama, training=None)
            with tpv.installed():
                pass
            assert handle.active
        assert not handle
        assert not refuses(defining.parallelize_llama, training=None)
        try:
            with tpv.installed():
                raise KeyError("from inside")
        except KeyError:
            assert not tpv.installed()
        """)
    )


def test_twenty_threads_leave_it_consistent(line_0_3: FakeTorchtitan) -> None:
    line_0_3.expect(
        script("""
        import sys, threading, random, importlib
        sys.setswitchinterval(1e-6)
        import torchtitan.models.llama3.parallelize as defining
        keep = [defining.parallelize_llama]
        barrier = threading.Barrier(20)
        errors = []

        def work(seed):
            dice = random.Random(seed)
            barrier.wait()
            try:
                for _ in range(15):
                    dice.choice([tpv.install, tpv.uninstall, lambda: tpv.installed().targets])()
                    if dice.random() < 0.2:
                        importlib.import_module("torchtitan.models.qwen3_5")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(20)]
        for t in threads: t.start()
        for t in threads: t.join(60)
        assert not any(t.is_alive() for t in threads) and not errors, errors
        import torchtitan.models.qwen3_5.parallelize as qwen
        tpv.install()
        assert defining.parallelize_llama.__wrapped__ is keep[0]
        assert refuses(defining.parallelize_llama, training=None)
        assert refuses(qwen.parallelize_qwen3_5, training=None)
        tpv.uninstall()
        assert defining.parallelize_llama is keep[0]
        assert not hasattr(qwen.parallelize_qwen3_5, "__wrapped__")
        """)
    )


def test_the_state_says_what_is_guarded_and_what_not_and_why(line_0_2: FakeTorchtitan) -> None:
    output = line_0_2.expect(
        script("""
        assert not tpv.installed() and not tpv.installed().guarded
        import torchtitan.models.qwen3
        print(tpv.install(strict=True))
        """)
    )
    waiting = "guarded when its module is imported"
    assert [line for line in output.splitlines() if not line.startswith("transformers: ")] == [
        f"llama3: torchtitan.models.llama3.infra.parallelize.parallelize_llama: {waiting}",
        f"llama4: torchtitan.models.llama4.infra.parallelize.parallelize_llama: {waiting}",
        "qwen3: torchtitan.models.qwen3.infra.parallelize.parallelize_qwen3: guarded",
        "qwen3_5_moe: parallelize_qwen3_5_moe: torchtitan 0.2.2 has no such model",
        "deepseek_v3: parallelize_deepseekv3: torchtitan 0.2.2 has no such model",
        "gpt_oss: parallelize_gptoss: torchtitan 0.2.2 has no such model",
        "kimi_k2_7: parallelize_kimi_k2_5: torchtitan 0.2.2 has no such model",
        "muse_glimmer: parallelize_muse_glimmer: torchtitan 0.2.2 has no such model",
        "transformers_backend: parallelize_hf_transformers: torchtitan 0.2.2 has no such model",
    ]


BROKEN = {
    "unknown release": (
        lambda folder: make(folder, "0.9.1", {"llama3": "parallelize_llama"}, infra=False),
        "torchtitan 0.9.1 is not a release that the guards were tested with (0.2.0, 0.2.1, 0.2.2, 0.3.0): "
        "1 entry points were found in it and are guarded.",
    ),
    "renamed function": (
        lambda folder: make(folder, "0.3.0", {"llama3": "shard_llama"}, infra=False),
        "torchtitan.models.llama3.parallelize.parallelize_llama is not guarded: "
        "its module does not define parallelize_llama.",
    ),
    "other signature": (
        lambda folder: make(
            folder, "0.3.0", {"llama3": "parallelize_llama"}, infra=False, signature="net, dims"
        ),
        "torchtitan.models.llama3.parallelize.parallelize_llama is not guarded: "
        "parallelize_llama(net, dims) takes no model and no parallel_dims.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_guarded_is_warned_of_by_name_and_raises_when_strict(
    tmp_path: Path, case: str
) -> None:
    make_fake, problem = BROKEN[case]
    output = make_fake(tmp_path).expect(
        script("""
        try:
            tpv.install(strict=True)
        except tpv.InstallError as error:
            print(error)
        assert not tpv.installed()  # strict: nothing was put in place
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tpv.install()
        print(*(w.message for w in caught), sep="\\n")
        """)
    )
    lines = output.splitlines()
    gone = [line for line in lines if line.strip().startswith(("torchtitan has no ", "torchtitan lacks "))]
    assert [line for line in lines if line not in gone] == [
        "Cannot guard everything:",
        f"  {problem}",
        problem,
    ]
    # A release has everything; of a tree that is like none, five things are told, and how many more.
    assert len(gone) == (12 if case == "unknown release" else 0)
    assert not gone or gone[-1].endswith(" more names that are read: tp-validate doctor lists them.")


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_function_that_is_replaced_in_its_own_module_is_reported_and_breaks_no_import(
    tmp_path: Path, imported: str
) -> None:
    fake = fake_0_3(tmp_path)
    with (tmp_path / "torchtitan/models/llama3/parallelize.py").open("a") as stream:
        stream.write("\nparallelize_llama = lambda net: net\n")
    load = "import torchtitan.models.llama3 as llama3"
    output = fake.expect(
        script(f"""
        {load if imported == "before" else ""}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tpv.install()
            {load}
        print(*(w.message for w in caught), sep="\\n")
        [state] = [s for s in tpv.installed().not_guarded if s.faulty]
        print(state)
        assert llama3.parallelize_llama("net") == "net"
        if {imported == "before"}:
            tpv.uninstall()
            try:
                tpv.install(strict=True)
            except tpv.InstallError:
                print("strict")
        """)
    )
    problem = "<lambda>(net) takes no model and no parallel_dims"
    entry_point = "torchtitan.models.llama3.parallelize.parallelize_llama"
    expected = [f"{entry_point} is not guarded: {problem}.", f"llama3: {entry_point}: {problem}"]
    assert output.splitlines() == expected + (["strict"] if imported == "before" else [])


def test_a_moved_file_is_reported(tmp_path: Path) -> None:
    fake = fake_0_3(tmp_path)
    (tmp_path / "torchtitan/models/llama3/parallelize.py").unlink()
    result = fake.run("import torchtitan_tp_validate as tpv; tpv.install(strict=True)")
    assert "torchtitan.models.llama3.parallelize.parallelize_llama is not guarded: " in result.stderr
    assert "the package has no parallelize.py or infra/parallelize.py" in result.stderr


HIDDEN = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in {hidden} else real(name, *a)
import torchtitan_tp_validate as tpv
tpv.install()
print(*(state.model for state in tpv.installed().guarded))
"""


def test_without_torchtitan_and_transformers_nothing_is_guarded_silently(tmp_path: Path) -> None:
    result = FakeTorchtitan(tmp_path).run(HIDDEN.format(hidden=("torchtitan", "transformers")))
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr
    assert "InstallWarning: torchtitan is not installed here" in result.stderr


def test_the_check_itself_loads_no_torch_no_torchtitan_and_no_wrapt(line_0_3: FakeTorchtitan) -> None:
    line_0_3.expect(
        script("""
        import sys
        import torchtitan_tp_validate.wrappers.llama3
        assert tpv.valid_tp_degrees(MODEL) == [1, 2]
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"torch", "torchtitan", "wrapt"}, loaded
        """)
    )


def test_the_trainer_refuses_the_job_before_it_starts(line_0_3: FakeTorchtitan) -> None:
    line_0_3.write(
        "torch/distributed/elastic/multiprocessing/errors.py",
        "class ErrorHandler: ...\n\n\ndef record(f, error_handler=None):\n    return f\n",
    )
    line_0_3.write(
        "torchtitan/trainer.py",
        """
        class Trainer:
            def __init__(self, config):
                self.started = True
        """,
    )
    line_0_3.expect(
        script("""
        tpv.install()
        from torchtitan.trainer import Trainer
        from torchtitan.models.llama3 import model_registry

        def job(tp, fn=None):
            spec = model_registry()
            spec.model, spec.flavor = NS(layers=[NS(attention=NS(n_heads=8, n_kv_heads=2))]), "tiny"
            spec.parallelize_fn = fn or spec.parallelize_fn
            return NS(model_spec=spec, parallelism=NS(tensor_parallel_degree=tp))

        class UsersTrainer(Trainer):
            pass

        for trainer in (Trainer, UsersTrainer):
            assert trainer(job(2)).started and trainer(config=job(1)).started
            for call in (lambda: trainer(job(4)), lambda: trainer(config=job(4))):
                try:
                    call()
                except tpv.TPCompatError:
                    continue
                raise AssertionError("not refused")

        def unknown(model, *, parallel_dims): ...
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert Trainer(job(4, unknown)).started  # what it shards is its own business
        assert str(caught[0].message) == (
            "Not validated at startup: llama3 tiny is parallelized by __main__.unknown, "
            "which is not guarded.")
        assert caught[0].category is tpv.NotValidatedWarning

        tpv.uninstall()
        assert Trainer(job(4)).started
        assert not hasattr(Trainer.__init__, "__wrapped__")
        """)
    )
