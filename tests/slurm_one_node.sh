#!/usr/bin/env bash
# A grid on a real Slurm of one node, made of Debian's packages, in a machine or container without systemd.
#
#   sudo tests/slurm_one_node.sh [FOLDER]     # Python of .venv, or PYTHON=…; a few minutes on two cores
#
# Starts munged, slurmctld and slurmd with a configuration of its own (/etc/slurm/slurm.conf, taken away at the end; it
# refuses to replace one that is there: Snakemake unsets SLURM_CONF in jobs, so it can lie nowhere else), runs a tiny grid through `ddrepro grid --profile slurm`, kills one of its Slurm jobs, then the controller
# together with Snakemake, starts the grid again, and checks that nothing that was finished was made again and that the
# rows are those of the same plan run without a grid. Exits 0 when all of that holds.
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "slurmd needs root: sudo $0" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
work=$(mkdir -p "${1:-/tmp/ddrepro-slurm}" && cd "${1:-/tmp/ddrepro-slurm}" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export DDREPRO_RUNS="$work/runs"
conf=/etc/slurm/slurm.conf
unset DDREPRO_WORKERS SLURM_CONF
[ ! -e "$conf" ] || { echo "$conf is there: this machine has a Slurm already" >&2; exit 2; }
"$python" -c 'import snakemake, snakemake_executor_plugin_slurm' || { echo "needs: $python -m pip install 'ddrepro[grid]'" >&2; exit 2; }

say() { printf '\n=== %s\n' "$*"; }
ddrepro() { "$python" -c 'import sys; from ddrepro.cli import main; sys.exit(main())' "$@"; }

missing=()
command -v munged >/dev/null || missing+=(munge)
command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
fi

rm -rf "$work/runs" "$work/state" "$work/spool" "$work/log"
mkdir -p "$work/state" "$work/spool" "$work/log" /run/munge
node=$(hostname -s)
cores=$(nproc)
memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
started=()
controller=
stop() {
  [ -z "$controller" ] || { kill "$controller" 2>/dev/null && wait "$controller" 2>/dev/null; } || true
  for id in "${started[@]}"; do kill "$id" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -f "$conf"
}
trap stop EXIT
mkdir -p /etc/slurm
cat > "$conf" <<CONF
ClusterName=one
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
KillWait=15
NodeName=$node CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF

[ -f /etc/munge/munge.key ] || { install -d -o munge -g munge -m 700 /etc/munge; dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null; }
chown munge:munge /etc/munge/munge.key /run/munge
chmod 400 /etc/munge/munge.key
if ! munge -n >/dev/null 2>&1; then
  install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
  runuser -u munge -- munged --foreground >"$work/log/munged.log" 2>&1 & started+=($!)
fi
for _ in $(seq 50); do munge -n >/dev/null 2>&1 && break; sleep .2; done
slurmctld -D -f "$conf" >"$work/log/slurmctld.out" 2>&1 & started+=($!)
slurmd -D -f "$conf" >"$work/log/slurmd.out" 2>&1 & started+=($!)
for _ in $(seq 150); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep .2; done
say "Slurm"
sinfo --version
sinfo
sinfo -h -o %T | grep -q idle || { tail -5 "$work"/log/*; exit 1; }

cd "$work"
cat > cells.csv <<'CSV'
paper,row,data set,IPC,seeds,profile,table,iterations,shards
dsdm,Random;DM,digits,1;2,1,test,1,150,
dsdm,DSDM,digits,1,1,test,1,150,2
CSV
export DDREPRO_PROGRESS_SECONDS=1
arguments=(cells.csv --profile slurm --jobs 4 --threads 1 --memory 1500 --hours 0.5
           -- --slurm-init-seconds-before-status-checks 5 --seconds-between-status-checks 5)
stand() { ddrepro grid status cells.csv; }
states() { "$python" - <<'PY'
from ddrepro.grid import kept_plan, states_of
grid = kept_plan("cells.csv")
if grid:
    for found in states_of(grid).values(): print(found.state, found.job.kind, found.job.id)
PY
}
until_so() {   # until_so SECONDS WORDS…: until a job is in this state
  for _ in $(seq "$1"); do states | grep "^$2" >/dev/null && return 0; sleep 1; done
  echo "no job came to be: $2" >&2; stand; tail -20 runs/grid/tables/*/snakemake.log; exit 1
}

say "started"
# shellcheck disable=SC2024
"$python" -c 'import sys; from ddrepro.cli import main; sys.exit(main())' grid "${arguments[@]}" > first.log 2>&1 & controller=$!
slurm_id=
for _ in $(seq 1200); do   # the first distillation that has done an iteration
  read -r slurm_id comment < <(squeue -h -t R -o '%i %k' | grep distill) || true
  id=${comment#*wildcards_}
  [ -n "$slurm_id" ] && grep -qs 'distil .*: [1-9][0-9]* of' "runs/grid/jobs/$id/log.txt" && break
  sleep .5
done
say "killing Slurm's job $slurm_id, $id"
squeue -o '%.8i %.10T %k'
tail -1 "runs/grid/jobs/$id/log.txt"
scancel --signal=KILL --full "$slurm_id"
until_so 600 "done distill"
until_so 600 "running"
say "killing the controller and Snakemake at once"
stand
snakemake=$(pgrep -P "$controller" | head -1)
kill -KILL "$controller" "$snakemake"
wait "$controller" || true
states | awk '/^done (distill|evaluate)/ {print $3}' | sort > finished
find runs -maxdepth 2 -name 'certificate.txt' -printf '%p %T@\n' | sort > before
squeue -o '%.8i %.10T %k'
echo "finished: $(wc -l < finished) jobs, $(wc -l < before) runs; still in Slurm's queue: $(squeue -h | wc -l)"

say "started again"
ddrepro grid "${arguments[@]}"
find runs -maxdepth 2 -name 'certificate.txt' -printf '%p %T@\n' | sort > after
if [ -n "$(comm -23 before after)" ]; then echo "a finished run was made again" >&2; exit 1; fi
echo "all $(wc -l < before) runs that were finished are untouched; $(wc -l < after) now"
for job in $(cat finished); do
  ended=$(grep -c '"end": "done"' "runs/grid/jobs/$job/record.jsonl")
  [ "$ended" = 1 ] || { echo "$job was done $ended times" >&2; exit 1; }
done
say "tries of each job, and how they ended"
for job in runs/grid/jobs/*; do
  echo "$(basename "$job"): $(grep -c began "$job/record.jsonl"); $(grep -o '"end": "[a-z]*"' "$job/record.jsonl" | cut -d'"' -f4 | xargs)"
done

say "the same plan without a grid"
unset DDREPRO_PROGRESS_SECONDS
OMP_NUM_THREADS=1 "$python" - <<'PY'
import os
import pandas as pd
from ddrepro.grid_cells import read_cells

os.environ["DDREPRO_WORKERS"] = "0"
here, columns = os.environ["DDREPRO_RUNS"], ["method", "ipc", "seed", "eval_seed"]
for row in read_cells("cells.csv"):
    os.environ["DDREPRO_RUNS"] = here
    ours = row.plan().run().rows
    os.environ["DDREPRO_RUNS"] = here + "-alone"
    alone = row.plan().run().rows
    both = ours.merge(alone, on=columns, suffixes=("", " alone"))
    assert len(both) == len(ours) == len(alone)
    print(both[[*columns, "accuracy", "accuracy alone"]].to_string(index=False))
    if not row.shards: pd.testing.assert_frame_equal(ours, alone)     # bit for bit; shards differ by rounding
PY
say "all of it held"
