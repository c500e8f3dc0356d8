#!/usr/bin/env bash
# Runs the tests that are not slow on the OpenMMLab stack of a Python, which is left as it is.
#
#   tools/environment/check_stack.sh path/to/python [VENV_DIR [arguments of pytest]]
#
# What the tests need beside it goes to VENV_DIR; default: .venv-stack
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${1:?"usage: $0 PYTHON [VENV_DIR [arguments of pytest]]"}
VENV=${2:-.venv-stack}
shift $(($# < 2 ? $# : 2))
export PYTHON OMP_NUM_THREADS=1
before=$("$PYTHON" -m pip freeze)
tools/environment/make_env.sh "$VENV"
[ "$before" = "$("$PYTHON" -m pip freeze)" ] ||
    { echo "the environment of $PYTHON has been changed" >&2; exit 1; }
"$VENV/bin/python" -m pytest -q -n 2 --dist worksteal -m 'not slow' "${@:-tests}"
