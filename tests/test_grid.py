"""A grid of tiny cells: what is refused, which jobs it has, that its rows are those of a plain run, and that a killed one goes on."""
import os
import re
import signal
import subprocess
import time
from collections import Counter

import pandas as pd
import pytest

from ddrepro.cli import main
from ddrepro.grid import dry_run, grid_status, kept_plan, planned, run_grid, states_of
from ddrepro.grid_cells import read_cells
from ddrepro.grid_jobs import gather, jobs_of
from ddrepro.grid_work import job_folder, log_of, tries
from helpers import DDREPRO, PATIENCE, one_thread

CELLS = "paper,row,data set,IPC,seeds,profile,table,iterations\ndsdm,Random,digits,1,1,test,1,\ndsdm,DM,digits,1,1,test,1,{}\n"
ITERATIONS = 400   # enough for the other job to be over first, few enough for a loaded machine: 5 to 30 a second


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder for runs, and children that compute on one thread"
    monkeypatch.setenv("DDREPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DDREPRO_WORKERS", "0")
    monkeypatch.setenv("DDREPRO_PROGRESS_SECONDS", "0.5")
    monkeypatch.delenv("DDREPRO_LOG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(place, text, name="cells.csv"):
    (place / name).write_text(text)
    return place / name


def command(*words, **options):
    "Start `ddrepro grid` in a group of its own"
    return subprocess.Popen([*DDREPRO, "grid", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, **options)


def until(true, what):
    "Wait for something"
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(.1)


def standing(file) -> Counter:
    return Counter(found.state for found in states_of(kept_plan(file)).values())


# Refusals

@pytest.mark.parametrize("row, why", [
    ("dsdm,Randm,digits,1,test", "row 1 (line 2), column row: methods must be one of"),
    ("dsdm,DM,digitz,1,test", "the nearest is 'digits'"),
    ("dsdm,DM,digits,ten,test", "row 1 (line 2), column ipc: parameter 'ipc' must be list[int]; got 'ten'"),
    ("dsdm,DM,digits,0,test", "column ipc: ipc must be at least 1, got 0"),
    ("dsdm,DM,digits,1,tset", "the nearest is 'test'"),
    ("avd,DM,digits,1,test", "column paper: paper must be one of"),
    ("avdd,dm,digits,1,test", "column dataset: dataset must be one of"),
    ("dsdm,DM,digits,9000,test", "column ipc: "),
])
def test_a_bad_cell_is_refused_with_its_place(place, row, why):
    file = table(place, f"paper,row,dataset,ipc,profile,table\n{row}\n")
    with pytest.raises(ValueError) as refusal: gather(read_cells(file))
    assert why in str(refusal.value).replace("column methods", "column row")
    assert not (place / "runs").exists()


def test_a_row_that_nothing_can_run_is_refused(place, monkeypatch):
    monkeypatch.setattr("ddrepro.papers.dsdm.is_known", lambda row: row != "DC")
    file = table(place, "paper,row,dataset,ipc,profile,table\ndsdm,DC,digits,1,test,1\n")
    with pytest.raises(ValueError, match="no line can run; DC: no method of this name yet"): gather(read_cells(file))


def test_everything_wrong_is_said_at_once_and_ends_with_2(place, capsys):
    file = table(place, "paper,ipc,profile\ndsdm,x,test\ndsdm,1,test\nvldd,1,tst\n")
    assert main(["grid", str(file)]) == 2
    said = capsys.readouterr().err
    assert "row 1 (line 2), column ipc" in said and "row 3 (line 4), column profile" in said and "Traceback" not in said
    assert not (place / "runs").exists()


@pytest.mark.parametrize("words, why", [
    (("--profile", "slrum"), "the nearest is 'slurm'"), (("--gpus", "1"), "gpus is for --profile slurm"),
    (("--jobs", "0"), "jobs must be at least 1, got 0"), (("--hours", "0"), "hours must be above 0"),
    (("more.csv",), "grid takes one table, or status and a table"),
])
def test_options_are_refused(place, words, why, capsys):
    file = table(place, CELLS.format(3))
    try: status = main(["grid", str(file), *words])
    except SystemExit as end: status = end.code
    assert status == 2 and why in capsys.readouterr().err


def test_nothing_of_snakemake_is_imported_before_it_is_run(place):
    script = "import sys, ddrepro.grid, ddrepro.cli; sys.exit('snakemake' in sys.modules)"
    assert subprocess.run([DDREPRO[0], "-c", script]).returncode == 0


def test_without_snakemake_the_extra_is_named(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "snakemake", None)
    with pytest.raises(ImportError, match=r"pip install 'ddrepro\[grid\]'"): run_grid(table(place, CELLS.format(3)))


# Jobs

def test_what_is_shared_is_prepared_once(place):
    rows = "dsdm,DM,digits,1;2,2,1,,\ndsdm,DSDM,digits,1;2,1,1,4,\ndsdm,DSDM,digits,1,1,1,,2\nvldd,Herding;Distilled,,20,1,baselines,,\n"
    jobs = jobs_of(read_cells(table(place, with_profile(rows))))
    counts = Counter((job.kind, job.what) for job in jobs.values())
    assert counts["prepare", "real means"] == 2                  # one a seed, for both IPC
    assert counts["prepare", "pool"] == 1                        # for all of DSDM
    assert counts["prepare", "real features"] == 1               # for the two with four draws
    assert counts["prepare", "experts"] == 1                     # for herding and the distilled pairs
    assert counts["shard", ""] == 2
    features = next(job for job in jobs.values() if job.what == "real features")
    assert [jobs[n].what for n in features.needs] == ["pool"]
    for job in jobs.values():
        assert set(job.needs) <= set(list(jobs)[:list(jobs).index(job.id)]), job.label
        if job.kind == "evaluate" and "random" not in job.label and "herding" not in job.label: assert f"distill-{job.run}" in job.needs


def with_profile(rows) -> str:
    "Rows of paper, row, data set, IPC, seeds, table, draws, shards as a table in the profile test"
    return "paper,row,dataset,ipc,seeds,table,draws,shards,profile\n" + "\n".join(f"{row},test" for row in rows.splitlines()) + "\n"


def test_rows_that_ask_for_the_same_share_their_jobs(place):
    text = "paper,row,dataset,ipc,table,profile,eval_seeds\ndsdm,DM,digits,1,1,test,1\ndsdm,DM,digits,1,1,test,3\n"
    jobs = jobs_of(read_cells(table(place, text)))
    assert [job.kind for job in jobs.values()] == ["distill", "evaluate"]
    assert [job.networks for job in jobs.values()] == [0, 3]


# Runs

def alone(file) -> pd.DataFrame:
    "Rows of the same plans without a grid, in another folder of runs"
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("DDREPRO_RUNS", os.environ["DDREPRO_RUNS"] + "-alone")
        return pd.concat([row.plan().run().rows for row in read_cells(file)], ignore_index=True)


def test_a_killed_grid_goes_on_and_has_the_rows_of_a_plain_run(place):
    pytest.importorskip("snakemake", reason="the extra grid is not installed: pip install 'ddrepro[grid]'")
    file = table(place, CELLS.format(ITERATIONS))
    assert "would run 3 jobs: 1 distill, 2 evaluate" in dry_run(file)
    assert grid_status(file).startswith(f"{file}: 0 of 3 jobs done, 3 waiting")
    jobs = {job.kind + ("" if job.kind == "distill" else job.label.split()[1].strip(",")): job for job in planned(file).jobs.values()}
    distill, random = jobs["distill"], jobs["evaluaterandom"]

    child = command(file, "--jobs", "2", "--threads", "1")
    log = log_of(distill.id)
    busy = lambda: log.exists() and re.search(r"distil dm, seed 0: [1-9]\d* of", log.read_text())      # an iteration is done
    until(lambda: (child.poll() is not None) or busy() and standing(file)["done"] == 1, "the grid does not start")
    assert child.poll() is None, child.communicate()[0]
    assert standing(file) == {"done": 1, "running": 1, "waiting": 1}
    finished = {p: p.stat().st_mtime_ns for p in (place / "runs" / random.run).glob("*")}
    with pytest.raises(ValueError, match="this grid is running"): run_grid(file)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: standing(file)["running"] == 0, "the job outlives its controller")
    assert standing(file) == {"done": 1, "stopped": 1, "waiting": 1}
    assert list((place / "runs" / distill.run).glob("checkpoint-*"))            # it was told to stop, and kept what it had

    again = command(file, "--jobs", "2", "--threads", "1")
    said = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 0, said
    assert f"{file}: 3 of 3 jobs done" in said
    assert {p: p.stat().st_mtime_ns for p in (place / "runs" / random.run).glob("*")} == finished
    assert [facts["end"] for facts in tries(job_folder(random.id)) if "end" in facts] == ["done"]
    assert [facts["end"] for facts in tries(job_folder(distill.id)) if "end" in facts] == ["stopped", "done"]

    before = {p: p.stat().st_mtime_ns for p in place.glob("runs/*/*") if p.name[0] != "." and p.parent.name != "grid"}
    with one_thread(): ours = pd.concat([row.plan().run().rows for row in read_cells(file)], ignore_index=True)
    assert {p: p.stat().st_mtime_ns for p in place.glob("runs/*/*") if p.name[0] != "." and p.parent.name != "grid"} == before
    pd.testing.assert_frame_equal(ours, alone(file))
