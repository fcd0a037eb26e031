#!/usr/bin/env bash
# Tests of the CPU kernels on a library built with sanitizers: bash tests/sanitize.sh [arguments of pytest]
#
# Without arguments, every test with "cpu" in its name that is not slow. The first finding ends the run: sanitizers stop
# the process. FUSEDRES_SANITIZE chooses them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export FUSEDRES_SANITIZE=${FUSEDRES_SANITIZE:-address,undefined}
if [ $# = 0 ]; then set -- -k cpu -m "not slow" tests; fi

read -r library _ < <("$PYTHON" -m fusedres build)
# what the library is linked with has to be there before Python is
runtimes=$(ldd "$library" | awk '$1 ~ /^lib(a|ub)san/ {print $3}')
: "${runtimes:?$library is linked with no sanitizer}"

# Python and torch free little at exit, so leaks are not looked for.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD=${runtimes//$'\n'/ }
"$PYTHON" -c "import sys; from fusedres import native; sys.exit(native.missing())"
"$PYTHON" -m pytest -x -q -p no:cacheprovider "$@"
