#!/usr/bin/env bash
# slurm.sh FOLDER COMMAND...: runs COMMAND beside a SLURM of one node, made of Debian's packages (munge, slurmctld,
# slurmd, slurm-client), as root. All of it lies in FOLDER, and its daemons end with COMMAND.
set -euo pipefail
mkdir -p "$1"
folder="$(cd "$1" && pwd)"
shift
export SLURM_CONF="$folder/slurm.conf"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Four tasks fit, on however few cores: the test is of processes, not of speed.
cat > "$SLURM_CONF" <<EOF
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
KillWait=30
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname=$(hostname) CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
mkdir -p "$folder/spool" "$folder/state"
(umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")

daemons=()
stop() {
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
    kill "${daemons[i]}" 2> /dev/null || true
    wait "${daemons[i]}" 2> /dev/null || true
  done
}
trap stop EXIT

munged --foreground --force --num-threads 1 --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
  --pid-file "$folder/munged.pid" --seed-file "$folder/munged.seed" --log-file "$folder/munged.log" \
  2> "$folder/munged.err" &
daemons+=($!)
for _ in $(seq 100); do [ -S "$folder/munge.socket" ] && break || sleep 0.1; done
slurmctld -D -i > "$folder/slurmctld.out" 2>&1 &
daemons+=($!)
slurmd -D -N localhost > "$folder/slurmd.out" 2>&1 &
daemons+=($!)
for _ in $(seq 300); do [ "$(sinfo --noheader --format %T 2> /dev/null)" = idle ] && break || sleep 0.1; done
if [ "$(sinfo --noheader --format %T 2>&1)" != idle ]; then
  tail -n 20 "$folder"/munged.err "$folder"/slurmctld.log "$folder"/slurmd.log >&2 || true
  echo "SLURM did not start" >&2
  exit 1
fi
"$@"
