#!/usr/bin/env bash
# Fine-tunes on a Cloud TPU slice over plain gcloud and ssh: bash scripts/tpu_pod.sh --help
if ((BASH_VERSINFO[0] < 5)); then
    echo "error: this needs bash 5; macOS brings 3.2, and Homebrew a newer one" >&2
    exit 2
fi
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'HELP'
usage: bash scripts/tpu_pod.sh COMMAND [OPTIONS] [-- ARGUMENTS OF ftjax.train]

  create     makes the slice, and waits until it is there
  setup      copies this checkout to every host (or clones --git URL --ref REF), mounts --share, installs ftjax
  run        starts python -m ftjax.train ARGUMENTS on every host; a lost connection does not end it
  watch      all of the above as needed, until the run is finished: starts it again after a preemption (making a
             lost slice anew) and after a failure, --max-failures times
  status     the slice's state, and one line from each host
  logs       the end of one host's output; -f follows it, --worker N chooses the host, --lines N how much
  stop       SIGTERM to the run on every host: it saves and ends with status 75. --now kills it instead
  delete     gives the slice back, with all that is on its disks

  --project P  --zone Z  --name N  --type T      also from PROJECT, ZONE, NAME, TYPE in the environment
  --runtime R      TPU software version (RUNTIME); by default the one for the type
  --spot           cheaper, and may be taken away at any time
  --queued         through a queued resource: waits in the queue for as long as it takes. Give it to delete, too
  --reserved       the same, from your reservation
  --share S:/PATH  NFS share (SHARE) to mount on every host at --mount DIR (MOUNT, default /mnt/ftjax)
  --git URL        clone this instead of copying the checkout; --ref REF (default main) is a branch, tag or commit
  --program FILE   run this instead of ftjax.train, such as scripts/bench_step.py
  --env KEY=VALUE  into the environment of the run; may be repeated
  --iap            reach the hosts through Identity-Aware Proxy (no external addresses)
  --poll SECONDS   how often watch and create look (60)
  --max-failures N how many failures other than preemptions watch starts again after (3)
  --dry-run        prints every command, ready to paste, and runs none

An example: a v5e slice of 16 chips on spot, its run kept on a Filestore share.

  export PROJECT=my-project ZONE=us-west4-a NAME=ft TYPE=v5litepod-16 SHARE=10.0.0.2:/vol1
  bash scripts/tpu_pod.sh watch --spot -- --config configs/llama3_1_8b_lora.py --workdir /mnt/ftjax/runs/support

  bash scripts/tpu_pod.sh logs -f          # from another terminal
  bash scripts/tpu_pod.sh stop             # saves and ends; watch ends too
  bash scripts/tpu_pod.sh delete           # it costs money until then

Or step by step: create --spot, setup, run -- ARGUMENTS, status, logs, delete.
The workdir must lie on a file system that all hosts share: docs/tpu-pod.md says which, and why gs:// does not do.
HELP
}

die() {
    echo "error: $1" >&2
    exit "${2:-2}"
}

say() {
    echo "$(date +%H:%M:%S) $1" >&2
}

# ---- options ----

project=${PROJECT:-} zone=${ZONE:-} name=${NAME:-} type=${TYPE:-} runtime=${RUNTIME:-}
share=${SHARE:-} mount=${MOUNT:-/mnt/ftjax}
git_url='' git_ref=main program='' worker=0 lines=100 poll=60 max_failures=3
spot='' queued='' reserved='' iap='' follow='' now='' dry=''
settings=() arguments=()

command=${1:-}
case $command in
create | setup | run | watch | status | logs | stop | delete) shift ;;
-h | --help | help) usage && exit 0 ;;
'') usage >&2 && exit 2 ;;
*) die "no command ${command@Q}; --help lists them" ;;
esac

while [ $# -gt 0 ]; do
    case $1 in
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --reserved) reserved=yes queued=yes ;;
    --iap) iap=yes ;;
    --dry-run) dry=yes ;;
    --now) now=yes ;;
    -f) follow=yes ;;
    -h | --help) usage && exit 0 ;;
    --)
        shift
        arguments=("$@")
        break
        ;;
    --project | --zone | --name | --type | --runtime | --share | --mount | --git | --ref | --program | --env | --worker | \
        --lines | --poll | --max-failures)
        [ $# -ge 2 ] || die "$1 wants a value"
        case $1 in
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --name) name=$2 ;;
        --type) type=$2 ;;
        --runtime) runtime=$2 ;;
        --share) share=$2 ;;
        --mount) mount=${2%/} ;;
        --git) git_url=$2 ;;
        --ref) git_ref=$2 ;;
        --program) program=$2 ;;
        --env) settings+=(--env "$2") ;;
        --worker) worker=$2 ;;
        --lines) lines=$2 ;;
        --poll) poll=$2 ;;
        --max-failures) max_failures=$2 ;;
        esac
        shift
        ;;
    *) die "no option ${1@Q}; --help lists them, and the arguments of ftjax.train come after --" ;;
    esac
    shift
done

check_options() {
    local missing=()
    [ -n "$project" ] || missing+=(--project)
    [ -n "$zone" ] || missing+=(--zone)
    [ -n "$name" ] || missing+=(--name)
    if [ -z "$type" ]; then
        case $command in create | watch) missing+=(--type) ;; esac
    fi
    [ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]}, or their names in capitals in the environment"
    [ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved exclude each other"
    local number
    for number in "$worker" "$lines" "$poll" "$max_failures"; do
        [[ $number =~ ^[0-9]+$ ]] || die "${number@Q} is not a number"
    done
    local setting
    for setting in "${settings[@]}"; do
        [[ $setting == --env || $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env ${setting@Q} is not KEY=VALUE"
    done
    case $command in run | watch) [ -n "$program" ] || check_arguments ;; esac
}

# Every host must see the run's directory, and it must outlive the slice.
check_arguments() {
    local i workdir=''
    for ((i = 0; i < ${#arguments[@]}; i++)); do
        case ${arguments[i]} in
        --workdir) workdir=${arguments[i + 1]:-} ;;
        --workdir=*) workdir=${arguments[i]#--workdir=} ;;
        esac
    done
    [ ${#arguments[@]} -gt 0 ] || die "give the arguments of ftjax.train after --"
    case $workdir in
    "$mount"/*) ;;
    '') die "give --workdir $mount/...: the default would lie on each host's own disk" ;;
    *) die "--workdir $workdir does not lie below $mount, where the hosts' shared file system is (--mount)" ;;
    esac
}

default_runtime() {
    case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

# ---- gcloud ----

where=()

# Runs a command, or prints it such that a shell reads the same words again.
do_it() {
    if [ -z "$dry" ]; then
        "$@"
        return
    fi
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
}

on_workers() { # WHICH COMMAND: ssh to `all` or one number
    local flags=("--worker=$1" "--command=$2")
    [ -z "$iap" ] || flags+=(--tunnel-through-iap)
    do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${flags[@]}"
}

# The words of a command for scripts/tpu_worker.sh as one string. It passes gcloud, ssh and the remote bash, so every
# word is quoted for that bash.
for_worker() {
    printf 'bash ftjax/scripts/tpu_worker.sh'
    printf ' %q' "$@"
}

# READY, WAITING, GONE (taken away: make it anew), FAILED (the request), MISSING or UNKNOWN.
slice_state() {
    local said error
    error=$(mktemp)
    if [ -n "$queued" ]; then
        said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$error") || said=''
        case $said in
        ACTIVE) said='' ;; # then its node says more
        *) [ -n "$said" ] || said=$(why_not "$error") ;;
        esac
    fi
    if [ -z "${said:-}" ]; then
        said=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>"$error") || said=''
        [ -n "$said" ] || said=$(why_not "$error")
    fi
    rm -f "$error"
    case $said in
    READY | FAILED | MISSING | UNKNOWN) echo "$said" ;;
    PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED) echo GONE ;;
    *) echo WAITING ;;
    esac
}

why_not() { # no answer is not the same as the answer that there is none: a slice must not be made twice
    if grep -q NOT_FOUND "$1"; then
        echo MISSING
    else
        cat "$1" >&2
        echo UNKNOWN
    fi
}

create() {
    request
    if [ -z "$queued" ]; then
        return # tpu-vm create has waited
    elif [ -n "$dry" ]; then
        do_it gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
        return
    fi
    local state
    while state=$(slice_state) && [ "$state" != READY ]; do
        case $state in GONE | FAILED) die "the queued resource $name ended as $state; describe it, and delete it" 1 ;; esac
        say "$name: $state"
        sleep "$poll"
    done
}

request() {
    local flags=("--accelerator-type=$type")
    if [ -n "$queued" ]; then
        flags+=("--node-id=$name" "--runtime-version=${runtime:-$(default_runtime)}")
    else
        flags+=("--version=${runtime:-$(default_runtime)}")
    fi
    [ -z "$spot" ] || flags+=(--spot)
    [ -z "$reserved" ] || flags+=(--reserved)
    if [ -n "$queued" ]; then
        do_it gcloud compute tpus queued-resources create "$name" "${where[@]}" "${flags[@]}"
    else
        do_it gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${flags[@]}"
    fi
}

delete() {
    if [ -n "$queued" ]; then
        do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    else
        do_it gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
}

# ---- the checkout and the run ----

setup() {
    refuse_running
    install
}

install() {
    local unpack worker_setup=(setup)
    [ -z "$share" ] || worker_setup+=(--share "$share" --mount "$mount")
    if [ -n "$git_url" ]; then
        printf -v unpack 'mkdir -p ftjax && cd ftjax && git init -q && git fetch -q --depth 1 %q %q && git checkout -q --force FETCH_HEAD && cd' \
            "$git_url" "$git_ref"
    else
        local packed=${TMPDIR:-/tmp}/ftjax-$name.tar.gz flags=(--worker=all)
        [ -z "$iap" ] || flags+=(--tunnel-through-iap)
        do_it bash "$here/pack.sh" "$packed" &&
            do_it gcloud compute tpus tpu-vm scp "$packed" "$name:ftjax.tar.gz" "${where[@]}" "${flags[@]}" &&
            do_it rm "$packed" || return
        unpack='mkdir -p ftjax && tar -xzf ftjax.tar.gz -C ftjax'
    fi
    on_workers all "$unpack && $(for_worker "${worker_setup[@]}")"
}

# One word for all hosts: bare, idle, running, unknown, or the status that the run ended with ("75 asked": by stop).
run_state() {
    local said count states
    count=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(networkEndpoints.len())') || count=0
    said=$(on_workers all "$(status_command)") || true
    states=$(grep -o 'ftjax-worker .*' <<<"$said" | tr -d '\r' | cut -d' ' -f3-) || true
    if grep -q '^running' <<<"$states"; then
        echo running
    elif [ "$count" = 0 ] || [ "$(grep -c . <<<"$states")" != "$count" ]; then
        echo unknown
    elif grep -q '^bare' <<<"$states"; then
        echo bare
    elif ! grep -qv '^idle' <<<"$states"; then
        echo idle
    elif ! grep -qv '^ended 0' <<<"$states"; then
        echo 0
    else
        # Saved on one is saved on all; a mistake is worth more than what the others made of it.
        local code
        code=$(sed -n 's/^ended \([0-9]*\).*/\1/p' <<<"$states" | sort -n | awk '
            $1 == 75 || ($1 == 2 && best != 75) || (best == "" && $1 != 0) { best = $1 } END { print best }')
        echo "${code:-idle}${code:+$(grep -o -m 1 ' asked$' <<<"$states" || true)}"
    fi
}

# A host that nothing was copied to yet has no tpu_worker.sh to ask.
status_command() {
    # shellcheck disable=SC2016  # $(hostname) is the host's
    printf 'if [ -e ftjax/scripts/tpu_worker.sh ]; then %s; else echo "ftjax-worker $(hostname) bare"; fi' "$(for_worker status)"
}

refuse_running() {
    if [ -n "$dry" ]; then
        on_workers all "$(status_command)"
        return
    fi
    local state
    state=$(run_state)
    case $state in
    running) die "a run is going on on $name: stop it first, or see its logs" 3 ;;
    unknown) die "not every host of $name answers; see status" 1 ;;
    esac
}

start() {
    local what=(-m ftjax.train)
    [ -z "$program" ] || what=("$program")
    on_workers all "$(for_worker start "${settings[@]}" -- "${what[@]}" "${arguments[@]}")"
}

run() {
    refuse_running
    start
    [ -n "$dry" ] || say "started; follow it with: bash scripts/tpu_pod.sh logs -f"
}

status() {
    do_it gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state,acceleratorType)'
    on_workers all "$(status_command)"
}

logs() {
    local words=(logs)
    [ -z "$follow" ] || words+=(-f)
    on_workers "$worker" "$(for_worker "${words[@]}" "$lines")"
}

stop() {
    local words=(stop)
    [ -z "$now" ] || words+=(--now)
    on_workers all "$(for_worker "${words[@]}")"
}

watch() {
    if [ -n "$dry" ]; then
        create
        install
        start
        echo "# every $poll s, until the run is finished:"
        status
        echo "# after a preemption, and then from the top:"
        delete
        return
    fi
    local failures=0 made='' fresh=yes state # fresh: this command has not yet seen or started the run
    while true; do
        state=$(slice_state)
        case $state in
        MISSING)
            say "$name: creating it"
            if ! request; then
                # At first that is a mistake or no quota; after a preemption it is that there is no capacity now.
                [ -n "$made" ] || die "$name could not be created" 1
                sleep "$poll"
            fi
            continue
            ;;
        FAILED)
            [ -n "$made" ] || die "the queued resource $name has failed; describe it, and delete it" 1
            delete || sleep "$poll"
            continue
            ;;
        GONE)
            say "$name was taken away; making it anew"
            made=yes
            delete || sleep "$poll"
            continue
            ;;
        READY) made=yes ;;
        *)
            say "$name: $state"
            sleep "$poll"
            continue
            ;;
        esac
        state=$(run_state)
        case $state in
        running | unknown) ;;
        *) [ -z "$fresh" ] || state=bare ;; # what an earlier command left: this checkout and these arguments replace it
        esac
        case $state in
        bare)
            say "setting up, and starting"
            if install && start; then
                fresh=''
            else
                failures=$((failures + 1))
                [ "$failures" -le "$max_failures" ] || die "setting up failed" 1
                sleep "$poll"
            fi
            ;;
        running)
            fresh=''
            sleep "$poll"
            ;;
        unknown) sleep "$poll" ;;
        idle)
            say "starting"
            start || sleep "$poll"
            ;;
        0)
            say "the run is finished"
            return 0
            ;;
        2) die "the run ended with status 2, a mistake in what was asked: see logs" 2 ;;
        *asked)
            say "the run was stopped, and ended with status ${state% asked}"
            return "${state% asked}"
            ;;
        75)
            say "preempted, and saved; starting again"
            start || sleep "$poll"
            ;;
        *)
            failures=$((failures + 1))
            [ "$failures" -le "$max_failures" ] || die "the run ended with status $state, $failures times: see logs" 1
            say "the run ended with status $state; starting again ($failures of $max_failures)"
            start || sleep "$poll"
            ;;
        esac
    done
}

check_options
where=("--project=$project" "--zone=$zone")
"$command"
