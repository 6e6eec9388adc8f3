#!/usr/bin/env bash
# A real Slurm on this machine alone: slurmctld, two slurmd and munge on loopback, in a folder of their own.
#
#   eval "$(bash tools/slurm_sandbox.sh up)"    start it, unless it runs; sbatch, srun and squeue then use it
#   bash tools/slurm_sandbox.sh down            end its jobs and daemons, and remove the folder
#
# LVTRAIN_SANDBOX=FOLDER   where it lives (default: lvtrain-slurm-USER under $TMPDIR or /tmp); several can run at once
# LVTRAIN_SANDBOX_NODES=2  how many nodes
# Needs Debian's slurm-wlm and munge (apt-get install slurm-wlm munge). Tried as root with Slurm 22.05.
# Messages go to stderr; stdout has only the export line.
set -euo pipefail
folder=${LVTRAIN_SANDBOX:-${TMPDIR:-/tmp}/lvtrain-slurm-$(id -un)}
nodes=${LVTRAIN_SANDBOX_NODES:-2}
export PATH="$PATH:/usr/sbin:/sbin"

say() { echo "slurm_sandbox: $*" >&2; }

alive() { # PIDFILE: is the process of this file running?
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

configure() {
    local ports
    ports=$(python3 -c "
import socket
held = [socket.create_server(('127.0.0.1', 0)) for _ in range($nodes + 1)]
print(*(each.getsockname()[1] for each in held))")
    read -r -a ports <<<"$ports"
    mkdir -p "$folder/state" "$folder/logs" "$folder/spool"
    # Eight CPUs per node on any machine (config_overrides), so that a few small chains run side by side.
    # cred_expire also is how long a requeued job waits before it may start again: 2 minutes by default.
    # job_time_limit is looked at twice a minute whatever is set here, so a job is ended up to 30 s after its limit.
    # Jobs choose ports by their ids, so ids of sandboxes side by side begin apart.
    # The long timeouts are for machines that are busy with other things.
    cat >"$folder/slurm.conf" <<END
ClusterName=sandbox
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=6
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/logs/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/logs/slurmd-%n.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/logs/jobs.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=300
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
KillWait=10
MinJobAge=7200
FirstJobId=$((1 + RANDOM % 12000))
DisableRootJobs=NO
END
    local i
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[$((i + 1))]}" \
            "CPUs=8 RealMemory=8000 State=UNKNOWN" >>"$folder/slurm.conf"
    done
    local all="n[0-$((nodes - 1))]"
    echo "PartitionName=main Nodes=$all Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20" >>"$folder/slurm.conf"
    echo "PartitionName=urgent Nodes=$all MaxTime=60 State=UP PriorityTier=10" >>"$folder/slurm.conf"
}

up() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null ||
            { say "$program is missing; on Debian: apt-get install slurm-wlm munge"; exit 2; }
    done
    export SLURM_CONF="$folder/slurm.conf"
    if alive "$folder/slurmctld.pid" && scontrol ping 2>/dev/null | grep -q UP; then
        echo "export SLURM_CONF=$SLURM_CONF"
        return
    fi
    [ ! -d "$folder" ] || down
    (umask 077 && mkdir -p "$folder" && head -c 1024 /dev/urandom >"$folder/munge.key")
    chmod 711 "$folder"
    configure
    # munge insists that its key and logs are private, its socket open; --force only turns its refusal of root into a warning
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/logs/start.log"
    slurmctld -c >>"$folder/logs/start.log" 2>&1
    local i
    for ((i = 0; i < nodes; i++)); do
        mkdir -p "$folder/spool/n$i"
        slurmd -c -N "n$i" >>"$folder/logs/start.log" 2>&1
    done
    for ((i = 0; i < 600; i++)); do
        [ "$(sinfo --noheader --Node --partition=main --states=idle --format=%N 2>/dev/null | wc -l)" = "$nodes" ] && break
        sleep 0.2
    done
    if [ "$i" = 600 ]; then
        say "the nodes did not come up; last words:"
        tail -n 5 "$folder"/logs/*.log "$folder/munged.log" >&2 || true
        down
        exit 1
    fi
    say "$nodes nodes up, logs in $folder/logs"
    echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    [ -d "$folder" ] || return 0
    export SLURM_CONF="$folder/slurm.conf"
    local file pids=()
    if alive "$folder/slurmctld.pid"; then
        scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
        scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 50); do
            [ -n "$(squeue --noheader --states=all --format=%T 2>/dev/null | grep -E 'RUNNING|COMPLETING|PENDING')" ] || break
            sleep 0.2
        done
    fi
    for file in "$folder"/slurmctld.pid "$folder"/slurmd-*.pid "$folder"/munged.pid; do
        if alive "$file"; then
            pids+=("$(cat "$file")")
            kill "${pids[-1]}" 2>/dev/null || true
        fi
    done
    for _ in $(seq 50); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.1
    done
    [ ${#pids[@]} = 0 ] || kill -KILL "${pids[@]}" 2>/dev/null || true
    # tasks of jobs that could not be cancelled any more
    for file in /proc/[0-9]*/environ; do
        if grep -qzx "SLURM_CONF=$folder/slurm.conf" "$file" 2>/dev/null && grep -qz '^SLURM_JOB_ID=' "$file" 2>/dev/null; then
            kill -KILL "$(basename "$(dirname "$file")")" 2>/dev/null || true
        fi
    done
    rm -rf "$folder"
    say "down"
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    *) echo "usage: bash tools/slurm_sandbox.sh up|down" >&2; exit 2 ;;
esac
