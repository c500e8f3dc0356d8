#!/usr/bin/env bash
# Makes .venv with everything mmgcp needs.
#
#   tools/environment/make_env.sh [VENV_DIR]
#
# Where the python on the PATH already holds a working OpenMMLab stack, .venv
# only adds mmgcp and its test tools on top of it: nothing is rebuilt and that
# environment is not written to. Otherwise the versions pinned in
# requirements/ are installed and mmcv is built from source, once for each
# (python, torch) pair: the wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/mmgcp.
#
# It says what it does and how far it is; what pip and the compiler say goes to
# VENV_DIR/make_env.log.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."

source tools/environment/steps.sh

MMCV_VERSION=2.0.1
VENV=${1:-.venv}
STAMP="$VENV/.mmgcp-$(cat pyproject.toml setup.py requirements/*.txt tools/environment/make_env.sh |
    cksum | cut -d' ' -f1)"
WHEELS="${XDG_CACHE_HOME:-$HOME/.cache}/mmgcp/wheels"
# numpy 2 beside a torch that was built for numpy 1 can be imported, but not used
CHECK='import mmcv.ops, mmdet, mmyolo, numpy, torch; torch.from_numpy(numpy.zeros(1))'

[ -e "$STAMP" ] && exit 0

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo 'mmgcp needs Python 3.8 or newer (3.11 is tested) with the venv module.' >&2
    return 1
}

# Prints the first python on the PATH that holds a working OpenMMLab stack.
find_stack() {
    local candidate
    for candidate in ${PYTHON:-} python python3; do
        if "$candidate" -c "$CHECK" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

pip() { step "$1" "$VENV/bin/python" -m pip install "${@:2}"; }

# Builds an mmcv wheel with compiled ops that fits the .venv, unless there is one, and names it in
# WHEEL.
find_or_build_mmcv() {
    local key dir sources old_exec
    key=$("$VENV/bin/python" -c 'import sys, torch, platform; print(
        f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}-{platform.machine()}")')
    dir="$WHEELS/$key"
    if ! compgen -G "$dir/mmcv-$MMCV_VERSION-*.whl" >/dev/null; then
        pip '4/6 installing what builds mmcv' wheel ninja
        sources=$(mktemp -d)
        trap "rm -rf '$sources'" EXIT
        mkdir -p "$dir"
        # What its setup.py expects of exec() is not so any more in Python 3.13
        old_exec="$PWD/tools/environment/old_exec${PYTHONPATH:+:$PYTHONPATH}"
        step "4/6 downloading mmcv $MMCV_VERSION" env PYTHONPATH="$old_exec" \
            "$VENV/bin/python" -m pip download --no-deps --no-binary :all: --no-build-isolation \
            -d "$sources" "mmcv==$MMCV_VERSION"
        tar -xzf "$sources/mmcv-$MMCV_VERSION.tar.gz" -C "$sources"
        # The headers of torch >= 2.1 refuse C++14, which mmcv's setup.py asks for.
        sed -i.orig 's/-std=c++14/-std=c++17/g' "$sources/mmcv-$MMCV_VERSION/setup.py"
        # -v: only then the compiler's lines, which say how far it is, come while it runs
        step "4/6 building mmcv $MMCV_VERSION for $key: about 6 minutes on 2 cores, once" \
            env PYTHONPATH="$old_exec" MMCV_WITH_OPS=1 CFLAGS='-O1 -w' PATH="$(cd "$VENV/bin" && pwd):$PATH" \
            MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
            "$VENV/bin/python" -m pip wheel -v --no-build-isolation --no-deps \
            -w "$sources/out" "$sources/mmcv-$MMCV_VERSION"
        mv "$sources"/out/mmcv-*.whl "$dir/"
    else
        say "4/6 mmcv $MMCV_VERSION has been built before: $dir"
    fi
    WHEEL=$(compgen -G "$dir/mmcv-$MMCV_VERSION-*.whl" | head -n 1)
}

PYTHON_EXE=$(find_python)
STACK=$(find_stack)
mkdir -p "$VENV"
LOG="$(cd "$VENV" && pwd)/make_env.log"
: >"$LOG"
say "what pip and the compiler say goes to $LOG"
if [ -n "$STACK" ]; then
    say "using the OpenMMLab stack of $STACK as it is"
    step "1/3 making $VENV" "$STACK" -m venv "$VENV"
    # Nothing of the stack is replaced by what mmgcp and its tests need
    CONSTRAINTS=$(mktemp)
    "$STACK" - "$VENV" "$CONSTRAINTS" <<'PY'
import importlib.metadata as metadata, pathlib, re, subprocess, sys
packages = [p for p in sys.path if p.endswith('-packages')]
target = subprocess.check_output(
    [f'{sys.argv[1]}/bin/python', '-c', 'import site; print(site.getsitepackages()[0])'], text=True)
pathlib.Path(target.strip(), 'existing_stack.pth').write_text('\n'.join(packages) + '\n')
installed = {item.metadata['Name']: item.version for item in metadata.distributions()}
tests = re.findall(r'^[\w-]+', pathlib.Path('requirements/tests.txt').read_text(), re.M)
pathlib.Path(sys.argv[2]).write_text(''.join(
    f'{name}=={version}\n' for name, version in installed.items() if name and name not in tests))
PY
    pip '2/3 installing what mmgcp and its tests need' -c "$CONSTRAINTS" \
        -r requirements/runtime.txt -r requirements/tests.txt
    # Without dependencies: its metadata ask for torch >= 2.0, but it runs with 1.13
    pip '2/3 installing torch-pruning' --no-deps -r requirements/pruning.txt
    rm -f "$CONSTRAINTS"
    # ruff is a program, which python looks for in .venv even if the stack has it
    "$VENV/bin/python" -m ruff --version >/dev/null 2>&1 ||
        pip '2/3 installing ruff' --ignore-installed "$(grep '^ruff' requirements/tests.txt)"
    LAST=3/3
else
    step "1/6 making $VENV with $PYTHON_EXE" "$PYTHON_EXE" -m venv "$VENV"
    pip '2/6 installing torch, mmengine, mmdet, mmyolo' \
        -r requirements/openmmlab.txt -r requirements/runtime.txt
    pip '3/6 installing what pruning and the tests need' \
        -r requirements/pruning.txt -r requirements/tests.txt
    find_or_build_mmcv
    pip "5/6 installing mmcv $MMCV_VERSION" "$WHEEL"
    LAST=6/6
fi
pip "$LAST installing mmgcp" --no-deps -e .
step "$LAST trying it" "$VENV/bin/python" -c "$CHECK; import mmgcp, torch_pruning"
rm -f "$VENV"/.mmgcp-*
touch "$STAMP"
say "$VENV is ready: source $VENV/bin/activate"
