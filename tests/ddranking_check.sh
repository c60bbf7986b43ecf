#!/bin/bash
# Score a set that ddrepro exports with the package ddranking, whose numpy and scipy are older than ddrepro's: in an environment of its own.
#   tests/ddranking_check.sh [ENVIRONMENT]      a folder that is kept for the next time; default one that is thrown away
# PYTHON is the interpreter that has ddrepro (default: python).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
environment=${1:-$work/environment}
if [ ! -x "$environment/bin/python" ] || ! "$environment/bin/python" -c "import ddranking" 2>/dev/null; then
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet "ddranking==0.2.0" "torch==2.11.0" "torchvision==0.26.0"
fi
"$python" "$here/ddranking_score.py" export "$work/set.pt"
cd "$work"
env -u PYTHONPATH "$environment/bin/python" "$here/ddranking_score.py" score "$work/set.pt"
