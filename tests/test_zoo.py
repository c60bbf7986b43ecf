"""The sets that travel with ddrepro: complete, small, licensed, and scoring what their entries say."""
import importlib.util
from dataclasses import replace

import pandas as pd
import pytest

from ddrepro.cli import main
from ddrepro.core.share import project_root, share_path
from ddrepro.data import load_data
from ddrepro.distill import load_distilled, zoo_table
from ddrepro.distill.zoo import zoo_entry, zoo_facts, zoo_folder, zoo_recipe
from ddrepro.evaluate import evaluate
from helpers import one_process

ALLOWED = {"digits", "digits_av", "digit_scenes", "mnist", "fashion_mnist"}


@pytest.fixture(scope="module")
def make_zoo():
    "The script data/make_zoo.py as a module"
    if project_root() is None: pytest.skip("the script is in a checkout")
    found = importlib.util.spec_from_file_location("make_zoo", share_path("data/make_zoo.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_set_is_whole_small_and_says_where_it_is_from():
    files = {f.relative_to(zoo_folder()).as_posix() for f in zoo_folder().glob("*/*/*")}
    assert files == {f"{name}.{end}" for name in zoo_facts() for end in ("json", "safetensors")}
    assert sum((zoo_folder() / f).stat().st_size for f in files) < 12e6
    for name, facts in zoo_facts().items():
        s = load_distilled(name)
        assert facts["dataset"] in ALLOWED and facts["licence"] and facts["command"], name
        assert (s.card["dataset"], s.card["seed"], s.ipc) == (facts["dataset"], 0, facts["ipc"]), name
        assert share_path(facts["report"]).is_file() if project_root() else True


def test_what_the_index_says_of_reports_stands_there(make_zoo):
    known = {kept.name: kept for kept in make_zoo.all_kept()}
    assert set(zoo_facts()) <= set(known)
    for name, facts in zoo_facts().items():
        rows = make_zoo.reported(known[name])
        own = rows[rows.seed == 0].drop_duplicates(["modality", "eval_seed"]).set_index(["modality", "eval_seed"]).accuracy
        for said in facts["reported"]: assert own[said["modality"], said["eval_seed"]] == said["accuracy"], name
        scored = pd.DataFrame(facts["scores"])
        assert make_zoo.agreement(scored, rows) == facts["agreement"], name
        exact = all(a["accuracy"] == b["accuracy"] for a, b in zip(facts["scores"], facts["reported"], strict=True))
        assert exact == (facts["agreement"] == "the same to the last digit"), name


def test_scores_beside_the_report_are_refused(make_zoo):
    kept = next(kept for kept in make_zoo.all_kept() if kept.name == "dsdm/digits/ipc1")
    rows, scores = make_zoo.reported(kept), pd.DataFrame(zoo_entry(kept.name)["scores"])
    with pytest.raises(ValueError, match="here and .* in the report"): make_zoo.agreement(scores.assign(accuracy=scores.accuracy - 20), rows)
    with pytest.raises(ValueError, match="here and .* in the report"): make_zoo.agreement(scores.assign(accuracy=float("nan")), rows)
    with pytest.raises(ValueError, match="has no row"): make_zoo.reported(replace(kept, row="DSDN"))


@pytest.mark.parametrize("name", ("dsdm/digits/ipc1", "m3d/digits/ipc1"))
def test_a_set_scores_what_its_entry_says(name):
    facts = zoo_entry(name)
    with one_process():
        rows = evaluate(load_distilled(name), load_data(facts["dataset"]), zoo_recipe(name), seeds=[0], width=facts["width"], device="cpu")
    said = next(row["accuracy"] for row in facts["scores"] if row["eval_seed"] == 0)
    assert abs(rows.accuracy.iloc[0] - said) < 3, "another machine rounds otherwise, by less than this"


def test_the_command_lists_and_shows(capsys):
    assert main(["zoo", "list"]) == 0
    listed = capsys.readouterr().out
    for name in zoo_table().name: assert name in listed
    assert main(["zoo", "show", "dsdm/digits/ipc10", "dm/digits/ipc1"]) == 0
    shown = capsys.readouterr().out
    for words in ("licence         CC BY 4.0", "load_distilled('dsdm/digits/ipc10')", "the same to the last digit", "of              DM, seed 0"):
        assert words in shown, words


@pytest.mark.parametrize("words, said", [
    (("show", "dsdm/digit/ipc10"), "the nearest is 'dsdm/digits/ipc10'"), (("show", "../secrets/ipc1"), "is named method/dataset/ipc10"),
    (("show",), "needs the name of a set"), (("list", "dsdm"), "zoo show dsdm shows one"),
])
def test_what_is_not_there_is_said(words, said, capsys):
    assert main(["zoo", *words]) == 2
    assert said in capsys.readouterr().err
