#!/usr/bin/env bash
# Tests of the CPU kernels on a library built with sanitizers: bash tests/sanitize.sh [arguments of pytest]
#
# Without arguments, what calls the kernels in all their ways. The first finding ends the run: sanitizers stop the
# process. FUSEDRES_SANITIZE chooses them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export FUSEDRES_SANITIZE=${FUSEDRES_SANITIZE:-address,undefined}
if [ $# = 0 ]; then
    # not the forks, whose children would report of memory that is their parent's
    network="(network and (float64 or way or strides or bits)) or (network_autograd and not check and not compiled)"
    smooth="smooth and not check and not compiled"
    set -- -n 2 -k "(cpu and not forked and not triton and not compiled) or $network or $smooth" tests/test_cpu.py \
        tests/test_layer.py tests/test_exact.py tests/test_anything.py tests/test_network.py \
        tests/test_network_autograd.py tests/test_smooth.py tests/test_stack_changes.py tests/test_recording.py \
        tests/test_residual.py tests/test_plain_layer.py
fi

read -r library _ < <("$PYTHON" -m fusedres build)
# what the library is linked with has to be there before Python is
runtimes=$(ldd "$library" | awk '$1 ~ /^lib(a|ub)san/ {print $3}')
: "${runtimes:?$library is linked with no sanitizer}"

# Python and torch free little at exit, so leaks are not looked for. Fresh memory is all NaN, in every dtype.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:malloc_fill_byte=255:max_malloc_fill_size=67108864
export UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD=${runtimes//$'\n'/ }
"$PYTHON" -c "import sys; from fusedres import native; sys.exit(native.missing())"
# --capture=sys: a sanitizer's last words go past pytest to the terminal
"$PYTHON" -m pytest -x -q -p no:cacheprovider --capture=sys "$@"
