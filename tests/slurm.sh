#!/bin/bash
# A SLURM of one node on this machine, for tests: bash tests/slurm.sh DIR
#
# Needs root and Debian's packages slurmctld, slurmd, munge and slurm-client. Everything it writes
# goes to DIR, a new folder. When DIR/ready is there, SLURM_CONF=DIR/slurm.conf makes sbatch and its
# kind talk to it. It stops when it is sent SIGTERM, or when the process that started it has gone.
set -eu
PATH=$PATH:/usr/sbin
mkdir "$1"
dir=$(realpath "$1")
name=$(hostname -s)
port=$((20000 + $$ % 6000 * 2))  # and the next one
mkdir "$dir/state" "$dir/spool"

head -c 128 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
KillWait=20
ReturnToService=2
NodeName=$name NodeAddr=127.0.0.1 CPUs=2 RealMemory=8192
PartitionName=test Nodes=$name Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf

pids=()
stop() {
    trap - EXIT TERM INT
    scancel --user=root 2> /dev/null || true
    for _ in $(seq 100); do [ -z "$(squeue --noheader 2> /dev/null)" ] && break; sleep 0.2; done
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[$i]}" 2> /dev/null || true; done
    wait
}
trap stop EXIT
trap 'exit 143' TERM INT

# In the foreground, so that they are this script's children and none outlives it.
munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munge.pid" --log-file="$dir/munge.log" --seed-file="$dir/munge.seed" &
pids+=($!)
until [ -S "$dir/munge.socket" ]; do kill -0 "${pids[0]}"; sleep 0.1; done
slurmctld -D -i > "$dir/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D -N "$name" > "$dir/slurmd.out" 2>&1 &
pids+=($!)
until sinfo --noheader --format=%T 2> /dev/null | grep -q idle; do
    for pid in "${pids[@]}"; do kill -0 "$pid"; done
    sleep 0.2
done
touch "$dir/ready"
parent=$PPID
while kill -0 "$parent"; do sleep 1 & wait $!; done
