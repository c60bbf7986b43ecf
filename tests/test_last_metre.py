"""What happens around finished work: it is printed or not, written or not, stopped, watched, or refused before it begins."""
import errno
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from ddrepro.cli import main
from ddrepro.core.files import make_folder, write_atomic
from ddrepro.core.share import CannotWrite, cannot_write, place, remedy_for
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import write_sample
from ddrepro.distill.loop import Checkpoints, distill, run_identity
from ddrepro.distill.unroll import Snapshots
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.nets.recipes import Recipe
from helpers import DDREPRO, KERNEL, PATIENCE, run_command, run_script

ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "Windows": {"PYTHONIOENCODING": "cp1252"},
    "no UTF-8 locale": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
FULL_DEVICE = Path("/dev/full")
TINY_METHOD = dict(width=4, batch=8, iterations=3)


def in_shell(line: str, **variables):
    "A line of bash in which $DDREPRO is the command; the finished process"
    env = os.environ | {"DDREPRO": shlex.join(DDREPRO)} | variables
    return subprocess.run(["bash", "-c", line.replace("ddrepro", "eval $DDREPRO")], env=env, capture_output=True, timeout=PATIENCE)


# Printing

@pytest.mark.parametrize("variables", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_what_cannot_be_encoded_is_replaced(variables):
    done = in_shell("ddrepro methods dsdm", **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"pool_epochs" in done.stdout and done.stdout.count(b"?") >= (variables.get("PYTHONIOENCODING") == "ascii")


def test_a_reader_that_leaves_early_is_no_error():
    done = in_shell("set -o pipefail; ddrepro methods dsdm | true")
    assert (done.returncode, done.stderr) == (0, b"")
    done = in_shell("ddrepro methods dsdm >&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = in_shell("ddrepro run avdd -p ipc 3.5 >&- 2>&-")
    assert done.returncode == 2


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="no /dev/full on this system")
def test_a_table_that_a_full_disk_took_is_said_to_be_lost():
    done = in_shell("ddrepro methods > /dev/full")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stderr == b"ddrepro: standard output cannot be written: [Errno 28] No space left on device\n"


# A report of a few lines

TINY = {
    "parameters": "lines: list[str] = []  # with a result\nseconds: float = 0.0  # to wait\nout: str = ''",
    "work": "import time\nfrom ddrepro.core.progress import Progress\nfor i in Progress('steps', range(20)): time.sleep(seconds / 20)",
    "final-table": "print('DM 50 × 1')",
    "rows": "print('dataset,row,ipc,modality,seed,eval_seed,accuracy\\ndigits,DM,1,A,0,0,50')",
    "provenance": "print('{}')",
}
# a shell that starts a job in the background has it ignore interrupts, and so do its children: here they are heard
AS_TINY = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from ddrepro import cli, cli_runs
cli_runs.share_path = lambda name: Path(name)
sys.exit(cli.main())
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A folder in which `ddrepro run tiny` makes a report"
    cells = [new_code_cell(source, metadata={"tags": [tag]}) for tag, source in TINY.items()]
    (tmp_path / "nbs").mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / "nbs/repro_tiny.ipynb")
    monkeypatch.setattr("ddrepro.cli_runs.share_path", lambda name: tmp_path / name)
    monkeypatch.setenv("DDREPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_that_cannot_be_printed_is_made(tiny, monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text): raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    status = main(["run", "tiny", "--name", "same", "--reports", "made"])
    said = capsys.readouterr().err
    assert status == 0 and (tiny / "made/same.html").exists() and "50" in (tiny / "made/same.csv").read_text()
    assert "report: made/same.html" in said and "standard output cannot be written: [Errno 28]" in said


def test_a_report_in_a_terminal_without_its_letters(tiny, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["run", "tiny"]) == 0
    assert narrow.buffer.getvalue().startswith(b"DM 50 ? 1\n\nreport: ")


# Writing

def fail_with(number):
    def fail(*words, **options): raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize("number, helps", [
    (errno.ENOSPC, "free some space, or name another folder by out"),
    (errno.EDQUOT, "free some space, or name another folder by out"),
    (errno.EROFS, "; name another folder by out"),
    (errno.EACCES, "; name another folder by out"),
    (errno.ENAMETOOLONG, "give a shorter name, or name another folder by out"),
    (errno.EIO, "; name another folder by out"),
])
def test_every_reason_says_what_helps(tmp_path, monkeypatch, number, helps):
    file = place(tmp_path / "elsewhere", "name another folder by out") / "0a/loss.csv"
    write_atomic(file, b"before")
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(CannotWrite) as refusal: write_atomic(file, b"after" * 1000)
    assert str(refusal.value).startswith(f"cannot write {file} (5,000 bytes): {os.strerror(number)}") and helps in str(refusal.value)
    assert str(refusal.value).endswith("; what was there before is untouched")
    assert file.read_bytes() == b"before" and [p.name for p in file.parent.iterdir()] == ["loss.csv"]


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CannotWrite, match="File name too long; give a shorter name"): write_atomic(tmp_path / ("x" * 300), b"")
    with pytest.raises(CannotWrite, match="File name too long"): make_folder(tmp_path / ("x" * 300) / "runs")


LIMITED = '''
import resource, sys
from pathlib import Path
import torch
from ddrepro.core.files import save_tensors
from ddrepro.core.certificates import runs_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
save_tensors(runs_folder() / "small.safetensors", {"x": torch.zeros(8)}, "means", {})
try: save_tensors(runs_folder() / "large.safetensors", {"x": torch.zeros(5000)}, "means", {})
except OSError as error: print(error)
'''

def test_a_limit_on_the_size_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.ENVIRONMENT", os.environ | {"DDREPRO_RUNS": str(tmp_path / "runs")})
    done = run_script(LIMITED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path}/runs/large.safetensors (20,") and "File too large" in done.stdout
    assert "; set DDREPRO_RUNS to a folder elsewhere; what was there before is untouched" in done.stdout
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["small.safetensors"]


def test_a_full_disk_ends_a_distillation_by_name(tmp_path, monkeypatch):
    real, method = load_data("digits"), get_method("dm", "digits", ipc=1, **TINY_METHOD)
    e = Experiment(method, recipe=Recipe("tiny", epochs=1, batch=32, rate=1e-3), eval_seeds=1)
    monkeypatch.setenv("DDREPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(CannotWrite, match=f"{tmp_path}/runs/.*No space left on device; free some space, or set DDREPRO_RUNS"):
        run_all([e], real, compute=dict(device="cpu", compile=False), progress=False)


def test_what_does_not_go_through_files_says_so_too(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotWrite, match="taken is a file, not a folder"): write_sample(torch.zeros(1, 8, 8), tmp_path / "taken/a")
    with pytest.raises(CannotWrite, match="taken is a file, not a folder; name another folder by spill"): Snapshots(tmp_path / "taken/spill")
    monkeypatch.setattr("tempfile.TemporaryFile", fail_with(errno.EROFS))
    with pytest.raises(CannotWrite, match="Read-only file system; name another folder by spill"): Snapshots(tmp_path / "spill")
    samples = write_sample(torch.rand(3, 8, 8), tmp_path / "a")
    assert samples.read_bytes().startswith(b"\x89PNG") and remedy_for("somewhere/x") == "choose another folder"
    assert "(1,000 bytes)" in str(cannot_write("x", OSError(errno.ENOSPC, "full"), 1000))


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 40 kB, where this process may mount one"
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True)
    if mounted.returncode: pytest.skip("this process may not mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_report_for_which_the_disk_has_no_room(tiny, small_disk, capsys):
    (small_disk / "ballast").write_bytes(bytes(32_000))
    status = main(["run", "tiny", "--name", "same", "--reports", str(small_disk / "reports")])
    said = capsys.readouterr().err
    assert status == 2 and f"cannot write {small_disk}/reports/same.html: No space left on device" in said
    assert "free some space, or name another folder by --reports" in said
    assert f"The run is finished: ddrepro report {tiny}/runs/notebooks/same.ipynb --html FILE renders it" in said
    assert main(["report", str(tiny / "runs/notebooks/same.ipynb"), "--html", str(tiny / "later.html")]) == 0
    assert (tiny / "later.html").exists()


def test_a_checkout_one_may_only_read(tiny, small_disk, monkeypatch, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setenv("DDREPRO_RUNS", str(small_disk))
    status = main(["run", "tiny"])
    assert (status, capsys.readouterr().err) == (2, f"ddrepro: cannot write {small_disk}/notebooks: Read-only file system; "
                                                    "set DDREPRO_RUNS to a folder elsewhere\n")
    status = main(["run", "tiny", "--reports", str(small_disk / "x")])
    assert status == 2 and "Read-only file system; name another folder by --reports" in capsys.readouterr().err
    status = main(["run", "tiny", "-p", "out", str(small_disk / "x")])
    assert status == 2 and "Read-only file system; name another folder by -p out" in capsys.readouterr().err


def test_a_file_in_the_way(tiny, capsys):
    (tiny / "taken").write_text("kept")
    assert main(["run", "tiny", "--reports", "taken"]) == 2
    assert "cannot write taken: File exists; move away what is there, or name another folder by --reports" in capsys.readouterr().err
    assert main(["report", "nowhere.ipynb"]) == 2 and "there is no notebook nowhere.ipynb" in capsys.readouterr().err
    assert main(["bench", "matching", "--json", "taken/x.json"]) == 2
    assert "taken is a file, not a folder" in capsys.readouterr().err and (tiny / "taken").read_text() == "kept"


# Stopping

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_work_says_what_goes_on_with_it(tiny, number, status):
    env = os.environ | {"DDREPRO_PROGRESS_SECONDS": ".2"}
    words = ["run", "tiny", "-p", "seconds", "600"]
    command = subprocess.Popen([sys.executable, "-c", AS_TINY, *words], cwd=tiny, env=env, stderr=subprocess.PIPE, text=True)
    said = []
    for line in command.stderr:
        said.append(line)
        if "steps: " in line: break
    command.send_signal(number)
    rest = command.stderr.read()
    assert command.wait(PATIENCE) == status, (said, rest)
    assert rest.splitlines()[-1] == "ddrepro: stopped; ddrepro run tiny -p seconds 600 goes on where it was"
    assert "Traceback" not in rest and not (tiny / "reports/tiny.html").exists()
    saved, = (tiny / "runs/notebooks").glob("*.ipynb")
    assert "KeyboardInterrupt" in saved.read_text()      # the kernel itself was interrupted, not killed


def test_an_interrupt_keeps_what_was_done(tmp_path):
    real, method = load_data("digits"), get_method("dm", "digits", ipc=1, **TINY_METHOD | dict(iterations=50))
    settings = dict(compute=None, device="cpu", compile=False, folder=tmp_path, progress=False)

    class Interrupted(type(method)):
        name = "interrupted"
        def loss(self, context, S, state, t):
            if t == 7: raise KeyboardInterrupt
            return super().loss(context, S, state, t)

    own = Interrupted(**{name: getattr(method, name) for name in type(method).__dataclass_fields__})
    with pytest.raises(KeyboardInterrupt): distill(own, real, 0, **settings)
    saved = Checkpoints(tmp_path, run_identity(own, real, 0, tuple(range(10)))).load()
    assert saved.t == 7 and len(saved.curve) == 7


# Watching

LOOP = '''
import time
from ddrepro.core.progress import Progress
for i in Progress("pictures", range(40), unit="image"): time.sleep(.02)
print("done")
'''

def test_a_job_tells_how_far_it_is_in_plain_lines(tmp_path, monkeypatch):
    quick = {"DDREPRO_PROGRESS_SECONDS": ".2"}
    monkeypatch.setattr("helpers.ENVIRONMENT", os.environ | quick)
    done = run_script(LOOP)
    lines = done.stderr.splitlines()
    assert done.stdout == "done\n" and 3 <= len(lines) <= 6, lines
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") and "\r" not in line for line in lines)
    assert "pictures: " in lines[0] and " of 40 image (" in lines[0] and "/s, " in lines[0] and lines[0].endswith("s left")
    assert lines[-1].endswith(", done")
    monkeypatch.setattr("helpers.ENVIRONMENT", os.environ | quick | {"TQDM_DISABLE": "1"})
    assert run_script(LOOP).stderr == ""
    monkeypatch.setattr("helpers.ENVIRONMENT", os.environ | {"DDREPRO_PROGRESS_SECONDS": "soon"})
    assert "DDREPRO_PROGRESS_SECONDS must be a number of seconds above 0, got 'soon'" in run_script(LOOP).stderr


@pytest.mark.parametrize("progress", [True, False])
def test_distilling_appends_to_a_log(tmp_path, monkeypatch, progress, capsys):
    log = tmp_path / "log"
    log.write_text("before\n")
    monkeypatch.setenv("DDREPRO_LOG", str(log))
    monkeypatch.setenv("DDREPRO_PROGRESS_SECONDS", ".001")
    method = get_method("dm", "digits", ipc=1, **TINY_METHOD | dict(iterations=20))
    distill(method, load_data("digits"), 0, device="cpu", compile=False, progress=progress)
    lines = log.read_text().splitlines()
    assert lines[0] == "before" and any("distil dm, seed 0: " in line for line in lines) == progress
    assert "distil" not in capsys.readouterr().err


def test_every_long_loop_is_in_the_one_room():
    package = Path(main.__code__.co_filename).parent
    using = [p.relative_to(package).as_posix() for p in package.rglob("*.py") if "import tqdm" in p.read_text(encoding="utf-8")]
    assert sorted(using) == ["core/progress.py", "report/report.py", "report/running.py"]     # the report strips bars, running prints past one


# Refusing

SLIPS = {
    "avdd": "'avdd' is a paper, not a command: ddrepro run avdd",
    "AVDD -p ipc 3": "ddrepro run avdd -p ipc 3",
    "metods": "the nearest is 'methods'",
    "data chekc": "the nearest is 'check'",
    "run": "run needs a paper, one of avdd, dsdm, vldd",
    "run Avdd": "the nearest is 'avdd'",
    "run -p ipc 3 avdd": "the paper stands before -p: ddrepro run avdd -p ipc 3",
    "run avdd ipc=3": "-p ipc 3",
    "run avdd ipc 3": "-p ipc 3",
    "run avdd --ipc 3": "-p ipc 3",
    "run avdd --ipc=3": "-p ipc 3",
    "run avdd -ipc 3": "-p ipc 3",
    "run avdd -p ipc": "-p takes a name and a value, got 'ipc' alone",
    "run avdd -p ipc=": "-p ipc gives no value",
    "run avdd -p ipc 3.5": "got 3.5, which is float",
    "run avdd -p ipc three": "must be list[int]",
    "run avdd -p icp 3": "the nearest is 'ipc'",
    "run avdd --name a/b": "without folders, got 'a/b'",
    "run avdd --name ..": "without folders, got '..'",
    f"run avdd --name {'x' * 250}": "at most 200 bytes, got 250",
    "methods dm --ipc many": "invalid int value: 'many'",
}
BY_THE_PAPER = {
    "run avdd -p ipc 0": "ipc must be at least 1, got 0",
    "run avdd -p ipc 5000": "ipc can be at most 110",
    "run avdd -p dataset digits": "dataset must be one of 'av_folder', 'av_mnist', 'ave', 'digits_av', 'music21', 'vggs10k', 'vggsound'",
    "run avdd -p dataset vggs10k": "vggs10k",
    "run avdd -p profile fast": "profile must be one of",
    "run avdd -p methods dn": "the nearest is 'dm'",
    "run avdd -p methods=": "gives no value",
    "run avdd -p device cuda:x": "device must be one of",
    "run avdd -p seeds -1": "seeds must be at least 0, got -1",
    "run dsdm -p table 9": "table must be one of 1, 2, 3, 4",
    "run dsdm -p table 2 -p speech digits": "speech must be one of",
    "run dsdm -p table 1 -p ipc 1 5000": "ipc can be at most 110",
    "run vldd -p pairs 100000": "digit_scenes has 25,000 pairs",
    "run vldd -p size 32": "the pictures of digit_scenes have one size",
    "run vldd -p split part": "give dataset caption_csv and file",
    "run vldd -p file captions.csv": "give both, or neither",
    "run vldd -p dataset caption_csv -p file nowhere.csv": "nowhere.csv",
    "run vldd -p seeds 5": "use as many experts (-p experts 5)",
    "run vldd -p encoders ResNet": "the nearest is",
}

def said_by(words: str, capsys):
    try: status = main(words.split())
    except SystemExit as stop: status = stop.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@pytest.mark.parametrize("words", [*SLIPS, *BY_THE_PAPER])
def test_slips_are_met_with_help_and_start_nothing(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDREPRO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("ddrepro.cli_runs.run_notebook", lambda *words: pytest.fail("a kernel was started"))
    status, said = said_by(words, capsys)
    assert status == 2 and (SLIPS | BY_THE_PAPER)[words] in said, said
    assert list(tmp_path.iterdir()) == []      # nothing was made either


@pytest.mark.parametrize("words", ["", "help", "help run", "run --help", "--help"])
def test_help_is_no_error(words, capsys):
    status, said = said_by(words, capsys)
    assert status == 0 and "usage: ddrepro" in said


MODULES = '''
import sys, time
from ddrepro.cli import main
status = main(sys.argv[1:])
heavy = "torch torchvision sklearn scipy.stats matplotlib nbconvert papermill jupyter_client".split()
print(status, *[name for name in heavy if name in sys.modules])
'''

def loaded(*words): return run_script(MODULES, *words).stdout.split()


def test_a_refusal_loads_no_more_than_it_needs():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert loaded("run", "avdd", "-p", "ipc", "3.5") == ["2"]
    assert loaded("run", "avdd", "--name", "a/b") == ["2"]
    assert loaded("run", "avdd", "-p", "ipc", "0") == ["2", "torch"]
    assert loaded("run", "avdd", "-p", "ipc", "5000") == ["2", "torch"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20      # 6 s where it was written


def test_a_refusal_before_and_in_a_notebook_is_the_same(tiny):
    "A paper that nobody registered is asked nothing by the command; its notebook's own error is told in a line"
    cells = json.loads((tiny / "nbs/repro_tiny.ipynb").read_text())
    cells["cells"][1]["source"] = "raise ValueError('lines cannot be empty')"
    (tiny / "nbs/repro_tiny.ipynb").write_text(json.dumps(cells))
    done = run_command([sys.executable, "-c", AS_TINY, "run", "tiny"], tiny)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ddrepro: the notebook stopped with ValueError: lines cannot be empty"
