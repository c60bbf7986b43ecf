"""Make data/zoo anew: the sets of committed reports, their facts, and whether they score as the reports say.

    python data/make_zoo.py --runs runs    # all; a finished run in one of the folders is taken, others are made
    python data/make_zoo.py --only dsdm/digits/ipc1
"""
import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from ddrepro.core.certificates import environment, runs_folder
from ddrepro.core.files import write_json
from ddrepro.core.provenance import short_hash
from ddrepro.core.share import choose, project_root, share_path
from ddrepro.data import load_data
from ddrepro.distill import DistilledData
from ddrepro.distill.distilled import set_files
from ddrepro.distill.zoo import INDEX, check_zoo_name
from ddrepro.evaluate import evaluate
from ddrepro.evaluate.experiment import recipe_name, settled
from ddrepro.evaluate.runs import distillation_run, finished_run
from ddrepro.papers import get_paper
from ddrepro.papers.avdd import mtt_experiments
from ddrepro.papers.dsdm_settings import method_of
from ddrepro.report.parameters import declared_parameters

LICENCES = {
    "digits": "CC BY 4.0: made from scikit-learn's load_digits, the test part of UCI's Optical Recognition of "
              "Handwritten Digits (E. Alpaydin and C. Kaynak, 1998), https://archive.ics.uci.edu/dataset/80",
    "digits_av": "pictures as digits (CC BY 4.0, E. Alpaydin and C. Kaynak, 1998); sounds synthesised with eSpeak NG "
                 "for ddrepro, of no person, Apache-2.0 as ddrepro itself",
    "digit_scenes": "scenes drawn by ddrepro from digits (CC BY 4.0, E. Alpaydin and C. Kaynak, 1998)",
    "mnist": "MIT for the files it was made from (rasbt/mnist-pngs, 2022 Sebastian Raschka); MNIST itself, Y. LeCun, "
             "C. Cortes and C. Burges, whose pictures stem from NIST, states no licence there",
    "fashion_mnist": "MIT (zalandoresearch/fashion-mnist, 2017 Zalando SE)",
}
TOLERANCE = 1.    # points, beside two standard deviations of a report's own seeds


@dataclass(frozen=True)
class Kept:
    "A set of the zoo: where its rows stand, and the experiment that makes it"
    name: str           # method/dataset/ipcN, as `load_distilled` knows it
    report: str         # its rows, without suffix, under reports/
    row: str            # its name there
    dataset: str
    ipc: int
    experiment: callable                            # (real) → Experiment of seed 0
    options: dict = field(default_factory=dict)     # of `load_data`
    where: dict = field(default_factory=dict)       # column → value, which tell its rows from others of the name
    command: str = ""                               # that wrote the report


def parameters(paper: str, **given) -> dict:
    "The parameters of a paper's notebook, as its report was run"
    return {name: p.default for name, p in declared_parameters(share_path(f"nbs/repro_{paper}.ipynb")).items()} | given


def of_dsdm(row: str, ipc: int, changes: dict, **given):
    "An experiment of DSDM's Table 1"
    def make(real):
        settings = get_paper("dsdm").settings(parameters("dsdm", **given), real)
        return settings.experiment(method_of(changes.get("method", row)), ipc, row, 0, **changes.get("fields", {}))
    return make


def of_avdd(row: str, ipc: int):
    def make(real):
        given = parameters("avdd", ipc=ipc, seeds=5, eval_seeds=3)
        return next(e for e in get_paper("avdd").settings(given, real).rows([row]) if e.seed == 0)
    return make


def of_mtt(ipc: int):
    return lambda real: next(e for e in mtt_experiments(ipc) if e.label == "MTT" and e.seed == 0)


def of_vldd(row: str, pairs: int):
    def make(real):
        given = parameters("vldd", table=["baselines"], seeds=5, eval_seeds=2, experts=5, iterations=45)
        paper = get_paper("vldd")
        paper.check_values(given)
        plan = paper.check_request(given)
        found = [cell.experiment for cell in plan.cells if cell.experiment.name == row and cell.experiment.seed == 0]
        return next(e for e in found if e.method.ipc == pairs)
    return make


AT_LENGTH = dict(profile="laptop", iterations=20000, draws=100, own_recipes=True, controls=False, eval_seeds=5)
AT_LENGTH_WORDS = ("-p table 1 -p ipc 1 -p methods DM -p own_recipes true -p iterations 20000 -p draws 100 "
                   "-p eval_seeds 5 -p controls false")
DIGITS = "ddrepro run dsdm -p dataset digits -p table 1 -p ipc 1 10 -p eval_seeds 2"


def on_digits(ipc: int) -> list:
    "All methods side by side"
    five_seeds, own = f"{DIGITS} -p seeds 5 -p methods DM DSDM", f"{DIGITS} -p own_recipes true"
    common = dict(dataset="digits", ipc=ipc, report="comparison/digits")
    given, sets = dict(eval_seeds=2, controls=True), []
    for row in ("DM", "DSDM", "DSDM without factor"):
        changes = dict(method="DSDM", fields=dict(factor=1)) if row.endswith("factor") else {}
        name = "dsdm_without_factor" if changes else method_of(row)
        sets.append(Kept(f"{name}/digits/ipc{ipc}", row=row, experiment=of_dsdm(row, ipc, changes, **given),
                         where=dict(scored_by="common", place="Table 1"), command=five_seeds, **common))
    for row in ("DD", "DC", "DSA", "CAFE", "CAFE+DSA", "IDM", "M3D"):
        sets.append(Kept(f"{method_of(row)}/digits/ipc{ipc}", row=row,
                         experiment=of_dsdm(row, ipc, {}, own_recipes=True, **given),
                         where=dict(scored_by="own", place="Table 1"), command=own, **common))
    return sets


def on_pictures(dataset: str) -> list:
    "DM at the published length and 100 draws; DM and DSDM in small"
    sets = [Kept(f"dm/{dataset}/ipc1", f"cells/{dataset}_dm_ipc1_draws100", "DM", dataset, 1,
                 of_dsdm("DM", 1, {}, dataset=[dataset], **AT_LENGTH),
                 command=f"ddrepro run dsdm -p profile laptop -p dataset {dataset} {AT_LENGTH_WORDS}")]
    small = dict(dataset=[dataset], train_per_class=300, eval_seeds=1, controls=False)
    words = "-p table 1 -p ipc 10 -p train_per_class 300 -p seeds 5 -p eval_seeds 1"
    for row in ("DM", "DSDM"):
        sets.append(Kept(f"{row.lower()}/{dataset}/ipc10", "dsdm_mnist_fashion_ipc10", row, dataset, 10,
                         of_dsdm(row, 10, {}, **small), options=dict(train_per_class=300),
                         where=dict(place="Table 1"), command=f"ddrepro run dsdm -p dataset {dataset} {words}"))
    return sets


def all_kept() -> list:
    "Every set of the zoo, in the order it is made in"
    sets = []
    for ipc in (1, 10):
        sets += on_digits(ipc)
        sets.append(Kept(f"mtt/digits/ipc{ipc}", "mtt_digits", "MTT", "digits", ipc, of_mtt(ipc),
                         command="ddrepro.papers.avdd.mtt_experiments"))
        for row in ("DM", "AVDD"):
            sets.append(Kept(f"{row.lower()}/digits_av/ipc{ipc}", f"avdd_digits_av_ipc{ipc}", row, "digits_av", ipc,
                             of_avdd(row, ipc), command=f"ddrepro run avdd -p ipc {ipc} -p seeds 5 -p eval_seeds 3"))
    scenes = "ddrepro run vldd -p table baselines modality -p seeds 5 -p eval_seeds 2 -p experts 5 -p iterations 45"
    sets.append(Kept("vldd/digit_scenes/pairs100", "vldd_digit_scenes", "Distilled", "digit_scenes", 100,
                     of_vldd("Distilled", 100), where=dict(place="baselines"), command=scenes))
    return sets + on_pictures("mnist") + on_pictures("fashion_mnist")


def reported(kept: Kept) -> pd.DataFrame:
    "The rows of a report that tell of this set's row, all seeds"
    rows = pd.read_csv(share_path(f"reports/{kept.report}.csv"))
    rows = rows[(rows.row == kept.row) & (rows.dataset == kept.dataset) & (rows.ipc == kept.ipc)]
    for column, value in kept.where.items():
        if column in rows: rows = rows[rows[column] == value]
    if len(rows): return rows
    raise ValueError(f"{kept.name}: reports/{kept.report}.csv has no row {kept.row!r} of {kept.dataset}, IPC {kept.ipc}")


def run_of(e, real, folders: list):
    "A finished run of an experiment in one of the folders, which are only read; else it is made in the first"
    e, name = settled(e, real), short_hash(settled(e, real).distillation(real))
    for folder in folders:
        kept = finished_run(folder / name, e, real, None, ())
        if kept: return kept
    print(f"  {name} is in none of the folders: made anew in {folders[0]}", flush=True)
    return distillation_run(e, real, runs=folders[0], store=folders[0] / "store", progress=False)


def agreement(scores: pd.DataFrame, rows: pd.DataFrame) -> str:
    "How the scores of a kept set stand to the report's; ValueError where they lie beyond what its seeds spread over"
    own = rows[rows.seed == 0].drop_duplicates(["modality", "eval_seed"])
    both = scores.merge(own, on=["modality", "eval_seed"], suffixes=("", "_there"))
    if len(both) and (both.accuracy == both.accuracy_there).all(): return "the same to the last digit"
    words = []
    for m, of_one in scores.groupby("modality", sort=False):
        there = rows[rows.modality == m].groupby("seed").accuracy.mean()
        alone = rows[(rows.modality == m) & (rows.seed == 0)].accuracy
        mean, std = of_one.accuracy.mean(), there.std(ddof=1) if len(there) > 1 else alone.std(ddof=0)
        if not abs(mean - there.mean()) <= 2 * std + TOLERANCE:
            raise ValueError(f"{m} is {mean:.2f} here and {there.mean():.2f} ± {std:.2f} in the report")
        words.append(f"{m} {mean:.1f} here, {there.mean():.1f} ± {std:.1f} over {len(there)} seeds there")
    return "within two deviations and a point: " + "; ".join(words)


def make(kept: Kept, zoo: Path, folders: list, networks: int) -> dict:
    "Save a set in the zoo, score what was saved, and return its entry of the index"
    real = load_data(kept.dataset, **kept.options)
    e, rows = settled(kept.experiment(real), real), reported(kept)
    run = run_of(e, real, folders)
    with tempfile.TemporaryDirectory() as trial:
        run.distilled.save(Path(trial) / "set")
        s = DistilledData.load(Path(trial) / "set")
    there = sorted(set(rows[rows.seed == 0].eval_seed))[:networks]
    of_classes = dict(width=e.width, net=e.net, fusion=e.fusion) if s.task == "classification" else dict(dual=e.dual)
    scored = evaluate(s, real, e.recipe, seeds=there, part=e.part, epochs=e.epochs, **of_classes)
    how = agreement(scored, rows)          # a set that does not agree is not kept
    files = set_files(zoo / check_zoo_name(kept.name))
    s.save(files.card)
    size = sum(f.stat().st_size for f in files)
    said = rows[(rows.seed == 0) & rows.eval_seed.isin(there)].drop_duplicates(["modality", "eval_seed"])
    columns = ["modality", "eval_seed", "accuracy"]
    return dict(dataset=kept.dataset, options=kept.options, method=e.method.name, ipc=kept.ipc, seed=0, bytes=size,
                row=kept.row, report=f"reports/{kept.report}.csv", command=kept.command, recipe=recipe_name(e), width=e.width,
                recipe_fields=asdict(e.recipe), part=e.part, net=e.net, fusion=e.fusion,
                licence=LICENCES[kept.dataset], run=run.folder.name, reported_run=str(rows[rows.seed == 0].run.iloc[0]),
                scores=scored[columns].to_dict("records"), reported=said[columns].to_dict("records"),
                agreement=how, environment=environment() | dict(revision=""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path,
                        help="folders of runs; new ones go into the first (default: runs/)")
    parser.add_argument("--only", nargs="+", help="names of sets (default: all)")
    parser.add_argument("--networks", type=int, default=2, help="evaluation networks that check each set (default: 2)")
    args = parser.parse_args()
    zoo, sets = project_root() / "data/zoo", {kept.name: kept for kept in all_kept()}
    names = [choose("--only", name, sets) for name in args.only or sets]
    folders, failed = args.runs or [runs_folder()], []
    index = json.loads((zoo / INDEX).read_text()) if (zoo / INDEX).exists() else {}
    for name in names:
        try: index[name] = make(sets[name], zoo, folders, args.networks)
        except (ValueError, OSError, KeyError, StopIteration) as why:
            print(f"{name}: {type(why).__name__}: {why}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        print(f"{name}: {index[name]['bytes']:,} bytes; {index[name]['agreement']}", flush=True)
        write_json(zoo / INDEX, {n: index[n] for n in sets if n in index})
    print(f"{sum(x['bytes'] for x in index.values()):,} bytes in {len(index)} sets")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
