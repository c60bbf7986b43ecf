"""What the command answers: JSON for scripts, completion for shells, a way on for words that are no paper."""
import json
import os
import shlex
import shutil
import subprocess

import pytest

from ddrepro.cli import main
from helpers import DDREPRO, PATIENCE


def answer(capsys, line: str):
    "(status, standard output, standard error) of a command line"
    status = main(shlex.split(line))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("line, key", [("methods --json", "paper"), ("methods dm --dataset cifar10 --json", "value"), ("data list --json", "found")])
def test_json_is_one_value_with_the_facts_of_the_table(capsys, line, key):
    status, out, err = answer(capsys, line)
    assert (status, err) == (0, "") and key in json.loads(out)[0]


def test_every_method_has_its_paper_and_year(capsys):
    lines = {line["name"]: line["paper"] for line in json.loads(answer(capsys, "methods --json")[1])}
    assert lines.pop("random") == "" and all(paper[-4:].isdecimal() for paper in lines.values())
    assert lines["dc"] == "Zhao et al., ICLR 2021" and lines["avdd"] == "Kushwaha et al., TMLR 2024"


@pytest.mark.parametrize("line, words", [
    ("methods dc --dataset nope", ["dataset must be one of", "'cifar10'", "got 'nope'"]),
    ("methods --dataset cifar10", ["--dataset cifar10 needs a method", "ddrepro methods dm --dataset cifar10"]),
    ("run mtt", ["is a method (Cazenavette et al., CVPR 2022)", "ddrepro run avdd -p methods mtt", 'get_method("mtt"']),
    ("run idc", ["is a method (Kim et al., ICML 2022)", "no paper with a notebook"]),
    ("run nothing", ["paper must be one of 'avdd'"]),
    ("index nowhere", ["nowhere is not a folder"]),
])
def test_what_cannot_be_done_says_what_can(capsys, line, words):
    status, out, err = answer(capsys, line)
    assert (status, out) == (2, "") and err.count("\n") == 1
    for word in words: assert word in err, err


def in_bash(*words: str) -> list:
    "What bash offers at a tab behind these words"
    typed = " ".join(shlex.quote(word) for word in ("ddrepro", *words))
    script = f'''ddrepro() {{ {shlex.join(DDREPRO)} "$@"; }}
eval "$(ddrepro completion bash)"
COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _ddrepro; printf '%s\\n' "${{COMPREPLY[@]}}"'''
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("words, offered", [
    (["me"], ["methods"]),
    (["run", ""], ["avdd", "dsdm", "vldd"]),
    (["run", "avdd", "-p", "iter"], ["iterations"]),
    (["run", "avdd", "-p", "controls", ""], ["true", "false"]),
    (["data", "c"], ["check"]),
    (["grid", "--profile", ""], ["local", "slurm"]),
    (["methods", "cafe"], ["cafe", "cafe_dsa"]),
    (["nonsense", ""], []),
])
def test_bash_completes(words, offered):
    assert in_bash(*words) == offered


@pytest.mark.parametrize("shell, check", [("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])])
def test_scripts_are_of_their_shell(capsys, tmp_path, shell, check):
    script = answer(capsys, f"completion {shell}")[1]
    assert "ddrepro complete --" in script
    if shutil.which(shell) is None: pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([*check, str(tmp_path / "script")], capture_output=True).returncode == 0
