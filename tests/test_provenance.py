"""Digests of code: across modules, processes and sessions, and what a run makes of them."""
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch

from ddrepro.core.provenance import code_digest, store_code
from ddrepro.core.readers import Undigestible
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.method import Diverged
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.evaluate.runs import experiment_digest
from ddrepro.evaluate.tasks import TASKS
from ddrepro.methods import get_method, list_methods, register
from ddrepro.methods.avdd import AVDD
from ddrepro.methods.dm import DM
from ddrepro.nets.recipes import RECIPES, Recipe

FILES = {
    "__init__.py": "",
    "numbers.py": "SCALE = 3\nUNUSED = 4\n",
    "helpers.py": "from . import numbers\n\ndef scaled(x):\n    return numbers.SCALE * x\n\ndef unused(x): return x\n",
    "methods.py": """
        from .helpers import scaled

        class Base:
            def start(self): return self.match(1)

        class Own(Base):
            def match(self, x):
                from .late import shifted
                return shifted(scaled(x))
        """,
    "late.py": "def shifted(x): return x + 1\n",
}
DIGEST = "import {0}.methods as m; from ddrepro.core.provenance import code_digest; print(code_digest(m.Own))"

def package(folder, name, **changes):
    "Write FILES as a package, with some files changed or added"
    (folder / name).mkdir()
    for file, text in (FILES | {f"{k}.py": v for k, v in changes.items()}).items():
        (folder / name / file).write_text(textwrap.dedent(text))

def digest_elsewhere(folder, name, hash_seed="0"):
    "The digest of a package's method, in a process of its own"
    paths = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run([sys.executable, "-c", DIGEST.format(name)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": hash_seed})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

@pytest.fixture
def digest(tmp_path, monkeypatch):
    "The digest of a package's method, here"
    monkeypatch.syspath_prepend(tmp_path)
    def digest(name, **changes):
        package(tmp_path, name, **changes)
        return code_digest(__import__(f"{name}.methods", fromlist=["Own"]).Own)
    return digest

def test_modules_neighbours_and_imports_do_not_count(digest):
    first = digest("first")
    assert digest("second") == first
    helpers = FILES["helpers.py"]
    assert digest("with_neighbours", helpers=f"import json\n{helpers}\ndef another(x): return json.dumps(x)\n") == first
    documented = helpers.replace("    return", '    "Times the scale"\n    # so\n    return')
    assert digest("with_docstring", helpers=documented) == first
    assert digest("with_unused", numbers=FILES["numbers.py"].replace("4", "5")) == first

def test_a_function_may_move(digest):
    first = digest("first")
    moved = FILES["helpers.py"].replace("from . import numbers", "from . import numbers as numbers")
    merged = textwrap.dedent(FILES["methods.py"]).replace("from .helpers import scaled", moved)
    assert digest("moved", methods=merged, helpers="") == first
    above = FILES["late.py"] + textwrap.dedent(FILES["methods.py"]).replace("        from .late import shifted\n", "")
    assert digest("moved_above", methods=above, late="") == first
    here = FILES["late.py"] + textwrap.dedent(FILES["methods.py"]).replace("from .late", "from .methods")
    assert digest("moved_import", methods=here, late="") == first

@pytest.mark.parametrize("file, old, new", [
    ("numbers", "SCALE = 3", "SCALE = 3.5"), ("helpers", "SCALE * x", "SCALE + x"), ("late", "x + 1", "x - 1"),
    ("methods", "match(1)", "match(2)"), ("methods", "shifted(scaled(x))", "scaled(shifted(x))")])
def test_what_is_reached_counts(digest, file, old, new):
    text = textwrap.dedent(FILES[f"{file}.py"])
    assert old in text
    assert digest("first") != digest("changed", **{file: text.replace(old, new)})

def test_processes_agree(tmp_path, digest):
    tables = """
        SET = {"a", "b", len, print, (1, 2)}
        TABLE = {"x": lambda x: x, "y": frozenset({"c", "d", "e"})}
        def shifted(x): return x in SET or TABLE or x in {"p", "q", "r"}
        """
    here = digest("tables", late=tables)
    assert {digest_elsewhere(tmp_path, "tables", seed) for seed in ("1", "2", "3")} == {here}

def test_an_installed_package_is_followed_from_its_own_definitions(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    package(folder, "plugin")
    package(folder, "plugin2", numbers="SCALE = 4\n")
    assert digest_elsewhere(folder, "plugin") != digest_elsewhere(folder, "plugin2")

def session(text, **names):
    "What a text defines without a source that could be read"
    exec(textwrap.dedent(text), names)
    return names

@pytest.mark.parametrize("text, old, new", [
    ("from enum import Enum\nclass Kind(Enum):\n    A = 1\ndef f(): return Kind.A", "A = 1", "A = 2"),
    ("from typing import NamedTuple\nclass Row(NamedTuple):\n    a: int = 1\ndef f(): return Row()", "= 1", "= 2"),
    ("from functools import partial\ndef g(x, y): return x\nf = partial(g, y=1)", "y=1", "y=2"),
    ("from functools import singledispatch\n@singledispatch\ndef f(x): return 1\n@f.register\ndef _(x: int): return 2",
     "return 2", "return 3"),
    ("import functools\ndef d(g):\n    @functools.wraps(g)\n    def w(): return g() + 1\n    return w\n@d\ndef f(): 0",
     "+ 1", "+ 2"),
    ("import torch\ndef g(x): return x\nf = torch.compile(g)", "return x", "return -x"),
    ("import torch\n@torch.no_grad()\ndef f(x): return x", "no_grad", "enable_grad"),
    ("import torch\n@torch.no_grad()\ndef f(x): return x", "return x", "return -x"),
    ("import torch\nT = torch.arange(3)\ndef f(x): return T * x", "(3)", "(4)"),
    ("import numpy as np\nT = np.ones(2)\ndef f(x): return T * x", "ones", "zeros"),
    ("import torch\nnet = torch.nn.Linear(1, 1, bias=False)\nnet.weight.data.fill_(1)\ndef f(x): return net(x)",
     "fill_(1)", "fill_(2)"),
    ("import re\nP = re.compile('a')\ndef f(x): return P.match(x)", "'a'", "'b'"),
    ("class C:\n    def __init__(self): self.a = 1\nc = C()\ndef f(x): return c.a", "a = 1", "a = 2"),
    ("class C:\n    @staticmethod\n    def s(): return 1\ndef f(x: C): return x.s()", "return 1", "return 2"),
    ("class C:\n    def s(self): return 1\ndef f(x: 'list[C]'): return x[0].s()", "return 1", "return 2"),
    ("class C:\n    def s(self): return 1\ndef f(x: list[C] | None): return x[0].s()", "return 1", "return 2"),
    ("class C:\n    @classmethod\n    def s(cls): return 1\nf = C.s", "return 1", "return 2"),
    ("LEVELS = {'a': [(lambda x: x + 1, 2)]}\ndef f(x): return LEVELS['a']", "x + 1", "x + 2"),
    ("async def g(): return 1\ndef f(): return g", "return 1", "return 2"),
    ("X = 1\ndef f():\n    def inner(): return [X for _ in range(2)]\n    return inner", "X = 1", "X = 2"),
    ("def f(x, y=1): return x", "y=1", "y=2"), ("def f(x, *, y=1): return x", "y=1", "y=2"),
    ("f = lambda x: x\nf.rate = 1", "rate = 1", "rate = 2")])
def test_kinds_of_definitions_and_data(text, old, new):
    assert old in text
    digests = [code_digest(session(t)["f"]) for t in (text, text, text.replace(old, new))]
    assert digests[0] == digests[1] != digests[2]

@pytest.mark.parametrize("text", [
    "import threading, pathlib\nlock = threading.Lock()\np = pathlib.Path('.')\ndef f(): return lock, p, []",
    "from os import environ\ndef f(): environ['DDREPRO_A_TEST'] = str(int(environ.get('DDREPRO_A_TEST', 0)) + 1)",
    "from multiprocessing import get_context\ndef f(): return get_context('spawn').Lock(), get_context()",
    "n = 0\ndef f():\n    global n\n    n += 1",
    "_seen = {}\ndef f(x=1): return _seen.setdefault(x, len(_seen))",
    "def make():\n    n = 0\n    def f():\n        nonlocal n\n        n += 1\n    return f\nf = make()",
    "from functools import lru_cache\n@lru_cache\ndef f(x=1): return x",
    "d = {}\nd['self'] = d\nclass A:\n    def f(self): return B, d\nclass B(A):\n    def g(self): return A\nf = A.f"])
def test_running_changes_nothing(text):
    f = session(text)["f"]
    before = code_digest(f)
    if "self" not in text: f()
    assert code_digest(f) == before

@pytest.mark.parametrize("text, old, new", [
    ("_options = {'rate': 1.}\ndef f(): return _options['rate']", "1.", "2."),
    ("class A:\n    _weights = [1.]\n    def f(self): return self._weights\nf = A", "[1.]", "[2.]"),
    ("from pathlib import Path\nFILE = Path('one.txt')\ndef f(): return FILE.name", "one", "two")])
def test_private_constants_and_paths_count_by_value(text, old, new):
    digests = [code_digest(session(t)["f"]) for t in (text, text, text.replace(old, new))]
    assert digests[0] == digests[1] != digests[2]

@pytest.mark.parametrize("text", [
    "import random\nr = random.Random(0)\ndef f(): return r.random()",
    "import numpy as np\nr = np.random.default_rng(0)\ndef f(): return r.random()",
    "import torch\nr = torch.Generator()\ndef f(): return torch.rand(1, generator=r)"])
def test_a_generator_that_draws_has_no_digest(text):
    with pytest.raises(Undigestible, match="depends on those drawn before"): code_digest(session(text)["f"])

def test_a_data_set_counts_by_its_fingerprint():
    text = "def f(): return real.batch('train', [0])"
    digits = load_data("digits_av")
    first, other = (code_digest(session(text, real=real)["f"]) for real in (digits, digits.restrict(["image"])))
    assert first != other and first == code_digest(session(text, real=digits)["f"])

def test_a_name_that_is_bound_later_or_shadows_a_builtin():
    names = session("def f(x): return sum(x) + later")
    digests = [code_digest(names["f"])]
    for change in ({"later": 1}, {"later": 2}, {"sum": max}, {"sum": lambda x: 0}):
        names.update(change)
        digests.append(code_digest(names["f"]))
    assert len(set(digests)) == len(digests)

def test_what_is_not_written_in_python_is_refused(monkeypatch):
    kernel = torch._C._nn.gelu
    names = session("def f(x): return kernel(x)", kernel=kernel)
    assert code_digest(names["f"]) == code_digest(names["f"])
    monkeypatch.setattr("ddrepro.core.provenance.is_library", lambda package: package == "torch")
    with pytest.raises(Undigestible, match="f reaches math.exp, which is not written in Python"):
        import math
        code_digest(session("def f(x): return kernel(x)", kernel=math.exp)["f"])


# Experiments

def test_no_digest_follows_the_registries():
    def digests(): return tuple(experiment_digest(method, TASKS["classification"]) for method in (AVDD(), DM()))

    before = digests()

    @register
    @dataclass(frozen=True)
    class Another(DM):
        name = "another of a test"

    RECIPES["another of a test"] = Recipe("another of a test", 1, 1)
    try: assert digests() == before
    finally:
        del RECIPES["another of a test"]
        from ddrepro.methods import _methods
        del _methods["another of a test"]
    assert before[0] != before[1]

EXPERIMENTS = """
from ddrepro.evaluate.tasks import TASKS
from ddrepro.evaluate.runs import experiment_digest
from ddrepro.methods import get_method, list_methods
print([experiment_digest(get_method(name), task) for name in list_methods().name for task in TASKS.values()])
"""

def test_processes_agree_on_every_method_and_running_changes_none(tmp_path):
    names = list_methods().name.tolist()
    def digests(): return [experiment_digest(get_method(name), task) for name in names for task in TASKS.values()]
    before = digests()
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", EXPERIMENTS], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(before), done.stderr
    real, tiny = load_data("digits_av").restrict(["image"]), Recipe("tiny", epochs=1, batch=64, rate=1e-3)
    small = dict(ipc=1, width=4, batch=8, iterations=2)
    methods = [get_method("dm", **small), get_method("dsdm", pool_epochs=1, models=2, **small)]
    experiments = [Experiment(method, recipe=tiny, eval_seeds=1, part="validation") for method in methods]
    assert not run_all(experiments, real, runs=tmp_path, store=tmp_path / "store", progress=False).stale.any()
    assert digests() == before

def test_published_values_are_in_the_hash_of_an_experiment_alone(monkeypatch):
    before = experiment_digest(get_method("mtt"), TASKS["classification"])
    monkeypatch.setitem(sys.modules["ddrepro.methods.mtt"].PUBLISHED_MTT, "another", {})
    assert experiment_digest(get_method("mtt"), TASKS["classification"]) == before

METHOD = """
    from dataclasses import dataclass
    from ddrepro.methods.dm import DM

    WEIGHT = 1.

    def weighted(loss): return WEIGHT * loss

    @dataclass(frozen=True)
    class Own(DM):
        name = "own"

        def match(self, real, synthetic): return weighted(super().match(real, synthetic))
    """

@pytest.fixture
def own_rows(tmp_path):
    "Distil and evaluate by a method typed in a session: its rows, and whether they were made now"
    real = load_data("digits_av")
    tiny = Recipe("tiny", epochs=1, batch=32, rate=1e-3)
    def own_rows(text):
        own = session(text)["Own"](ipc=1, width=4, batch=8, iterations=2, lr=50.)
        experiment = Experiment(own, recipe=tiny, eval_seeds=1, part="validation")
        rows = run_all([experiment], real, runs=tmp_path, store=tmp_path / "store", progress=False)
        folder = tmp_path / rows.run[0]
        return rows, {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}, folder
    return own_rows

def test_an_edited_method_of_ones_own_is_run_again(own_rows):
    rows, stamps, folder = own_rows(METHOD)
    assert not rows.stale.any()
    kept, same_stamps, _ = own_rows(METHOD + "\n    # a comment\n    def neighbour(): pass\n")
    assert kept.equals(rows) and same_stamps == stamps
    edited, _, elsewhere = own_rows(METHOD.replace("WEIGHT = 1.", "WEIGHT = -1."))
    assert not edited.stale.any() and edited.digest[0] != rows.digest[0]
    assert elsewhere != folder                       # a run of its own, beside the first
    back, same_stamps, _ = own_rows(METHOD)
    assert back.equals(rows) and same_stamps == stamps

def test_a_checkpoint_of_other_code_is_not_continued(own_rows):
    _, _, folder = own_rows(METHOD)
    first = DistilledData.load(folder / "distilled").tensors["image"]
    diverging = "return WEIGHT * (loss / 0 if _calls.append(1) or len(_calls) > 1 else loss)"
    fails = METHOD.replace("return WEIGHT * loss", diverging)
    with pytest.raises(Diverged): own_rows(fails.replace("WEIGHT = 1.", "WEIGHT = -1.\n    _calls = []"))
    broken, = {file.parent for file in folder.parent.glob("*/checkpoint-*")}
    assert broken != folder and not (broken / "certificate.txt").exists()
    shutil.rmtree(folder)
    own_rows(METHOD)
    assert torch.equal(DistilledData.load(folder / "distilled").tensors["image"], first)

def test_what_cannot_be_digested_is_computed_anew(own_rows, capsys):
    kernel = "import ctypes\n    kernel = ctypes.CFUNCTYPE(ctypes.c_int)()\n"
    text = METHOD.replace("WEIGHT = 1.", f"{kernel}    WEIGHT = 1.")
    text = text.replace("return WEIGHT * loss", "return WEIGHT * (loss if kernel is not None else 0)")
    rows, stamps, _ = own_rows(text)
    again, other_stamps, _ = own_rows(text)
    assert again.accuracy.tolist() == rows.accuracy.tolist()
    assert other_stamps["certificate.txt"] != stamps["certificate.txt"]
    assert capsys.readouterr().out.count("computed anew") == 1
    assert store_code(session(text)["Own"]) != store_code(session(text)["Own"])
