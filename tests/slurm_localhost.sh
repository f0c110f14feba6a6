#!/usr/bin/env bash
# A person's test, not CI's: the batch scripts on a one-node SLURM on this machine, as root on Debian.
#   apt-get install slurm-wlm munge && bash tests/slurm_localhost.sh
# Starts the daemons on their default ports, erases three styles as a job array of two tasks and generates images in a job of two
# processes, stops a task in its middle and queues it again, and compares every file with that of a single process.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHON="$repo/.venv/bin/python" REPO="$repo" SLURM_CONF="$work/slurm.conf"
cat > "$SLURM_CONF" <<CONF
ClusterName=localhost
SlurmctldHost=$(hostname -s)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
NodeName=$(hostname -s) CPUs=$(nproc --all) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$work/state" "$work/spool" /run/munge && chown munge: /run/munge
pgrep munged > /dev/null || runuser -u munge -- munged
slurmctld && sleep 2 && slurmd && sleep 2
trap 'pkill -F "$work/slurmd.pid"; pkill -F "$work/slurmctld.pid"' EXIT
sinfo

export INDEXES=0,1,2 PROMPTS="$work/list.csv" SHIFTS=0,1,2
"$PYTHON" "$repo/eval-scripts/make-prompts.py" --seeds_per_prompt 4 --save_path "$PROMPTS"
once() { # what a single process makes
    common=(--erased_index "$INDEXES" --artifacts_dir "$work/one/shifts")
    "$PYTHON" "$repo/train-scripts/SRSME_Solution.py" "${common[@]}" --em_indexes "$INDEXES"
    "$PYTHON" "$repo/train-scripts/SRS_ME.py" "${common[@]}"
    "$PYTHON" "$repo/eval-scripts/generate-images-merge.py" --shifts "$SHIFTS" --artifacts_dir "$work/one/shifts" --prompts_path "$PROMPTS" \
        --save_path "$work/one" --num_inference_steps 10 --sample_batch_size 6
}
once
export ARTIFACTS="$work/many/shifts" SAVE="$work/many"
cd "$repo"
sbatch --wait --array=0-1 --output="$work/erase-%a.log" train-scripts/slurm/erase.sbatch
job=$(sbatch --parsable --ntasks-per-node=2 --output="$work/generate.log" train-scripts/slurm/generate.sbatch --num_inference_steps 10 --sample_batch_size 6)
state() { scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p'; }
until [ "$(state)" != PENDING ]; do sleep 1; done
until compgen -G "$SAVE/*/*.png" > /dev/null || [ "$(state)" != RUNNING ]; do sleep 0.2; done # in the middle of generating
scontrol requeue "$job"
until [ "$(state)" = COMPLETED ]; do
    case "$(state)" in FAILED | CANCELLED) cat "$work/generate.log"; exit 1 ;; esac
    scontrol update "JobId=$job" StartTime=now 2> /dev/null || true # a job that was queued again waits two minutes otherwise
    sleep 2
done
grep -c "images generated" "$work/generate.log"
diff -r "$work/one" "$work/many"
echo "the same files: $(find "$work/many" -type f | wc -l)"
