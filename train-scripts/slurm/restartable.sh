# Sourced by the batch scripts: `run SCRIPT ARGUMENTS...` runs a script once for each task, and before a limit of time is
# reached SLURM's signal puts the job into the queue again.
requeue() {
    echo "queued again: the same command resumes"
    scontrol requeue "$SLURM_JOB_ID"  # which an array's task has too
}
trap requeue USR1

run() {
    srun "${PYTHON:-.venv/bin/python}" "$@" &
    wait $!
}
