#!/usr/bin/env bash
# What one TPU VM does for scripts/tpu_pod.sh, which calls it over ssh on all of them:
#
#   setup [--share SERVER:/PATH --mount DIR]   mounts the shared file system, installs ftjax
#   start [--env KEY=VALUE ...] -- ARGS        starts `python ARGS`, which outlives the ssh session
#   status                                     one line: ftjax-worker HOST idle | running | ended STATUS [asked]
#   stop [--now]                               SIGTERM once: the run saves and ends with 75. --now: SIGKILL
#   logs [-f] [LINES]
#
# A run is known by the lock that its processes hold: it survives neither a kill nor a reboot, and no stale pid can fake it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
run=${FTJAX_RUN_DIR:-$HOME/.ftjax-run}
mkdir -p "$run"

die() {
    echo "error: $(hostname): $1" >&2
    exit "${2:-1}"
}

is_running() {
    ! flock --shared --nonblock "$run/lock" true
}

setup() {
    local share='' mount=''
    while [ $# -gt 0 ]; do
        case $1 in
        --share) share=$2 && shift 2 ;;
        --mount) mount=$2 && shift 2 ;;
        *) die "setup has no option $1" 2 ;;
        esac
    done
    if [ -n "$share" ] && ! mountpoint -q "$mount"; then
        sudo apt-get install -y -q nfs-common
        sudo mkdir -p "$mount"
        # hard: a server that is slow for a minute must not turn into an I/O error in the middle of a save.
        sudo mount -t nfs -o rw,hard "$share" "$mount"
        sudo chmod 1777 "$mount"
    fi
    local python=${PYTHON:-python3}
    # The older TPU VM images come with Python 3.10, and none is sure to have venv.
    if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python3 -m pip install --user --quiet uv
        python3 -m uv python install --quiet 3.12
        python=$(python3 -m uv python find 3.12)
    fi
    PYTHON=$python bash "$here/install.sh" tpu
    touch "$run/ready"
    echo "$(hostname): set up"
}

start() {
    local settings=()
    while [ "${1:---}" != -- ]; do
        [ "$1" = --env ] || die "start has no option $1" 2
        settings+=("$2") && shift 2
    done
    [ $# -eq 0 ] || shift
    exec 9>"$run/lock"
    flock --nonblock 9 || die "a run is going on here; stop it first" 3
    rm -f "$run/exit" "$run/asked" "$run/pid"
    # The lock is inherited, so there is no moment in which neither holds it.
    setsid --fork bash "$here/tpu_worker.sh" supervise "${settings[@]}" -- "$@" </dev/null >>"$run/log" 2>&1
    echo "$(hostname): started; its output goes to $run/log"
}

supervise() {
    local settings=() child code=0
    while [ "$1" != -- ]; do
        settings+=("$1") && shift
    done
    shift
    # SIGTERM when the machine shuts down goes to every process. It is for the run alone, whose status must be kept.
    trap '' TERM HUP
    cd "$root"
    echo "--- $(date --iso-8601=seconds) python $(printf '%q ' "$@")"
    # Unbuffered, because the log is what is watched; the signal is given back, because ignoring is inherited.
    env --default-signal=TERM "${settings[@]}" .venv/bin/python -u "$@" &
    child=$!
    echo "$child" >"$run/pid"
    wait "$child" || code=$?
    echo "--- $(date --iso-8601=seconds) ended with status $code"
    echo "$code" >"$run/exit.new"
    mv "$run/exit.new" "$run/exit"
}

status() {
    local state=idle
    if is_running; then
        state=running
    elif [ -e "$run/exit" ]; then
        state="ended $(cat "$run/exit")"
    elif [ -e "$run/pid" ]; then
        state="ended 137" # killed, or the machine was: nobody was left to write a status
    elif [ ! -e "$run/ready" ]; then
        state=bare
    fi
    if [ -e "$run/asked" ]; then
        state="$state asked"
    fi
    echo "ftjax-worker $(hostname) $state"
}

stop() {
    if ! is_running; then
        echo "$(hostname): no run"
        return
    fi
    [ -s "$run/pid" ] || die "the run is only just starting; try again"
    if [ "${1:-}" = --now ]; then
        touch "$run/asked"
        kill -KILL "$(cat "$run/pid")"
        echo "$(hostname): killed"
    elif [ -e "$run/asked" ]; then
        # ftjax.train takes a second SIGTERM as "at once", without saving.
        echo "$(hostname): was asked before, and is saving; stop --now does not wait"
    else
        touch "$run/asked"
        kill -TERM "$(cat "$run/pid")"
        echo "$(hostname): asked to save and end"
    fi
}

logs() {
    local follow=()
    if [ "${1:-}" = -f ]; then
        follow=(-F) && shift
    fi
    [ -e "$run/log" ] || die "no log yet"
    exec tail -n "${1:-100}" "${follow[@]}" "$run/log"
}

case ${1:-} in
setup | start | supervise | status | stop | logs) "$@" ;;
*) die "usage: tpu_worker.sh setup|start|status|stop|logs; see its first lines" 2 ;;
esac
