#!/bin/bash
# What SLURM is asked for, per run. Edit this, or a copy: python experiments.py --slurm my.sh
# The three words in braces are filled in. A line that begins with ## is off.

##SBATCH --partition=NAME
#SBATCH --job-name=experiments
#SBATCH --time=08:00:00
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
##SBATCH --gpus=1

# Append %8 for at most eight runs at a time.
#SBATCH --array={tasks}

# A preempted run goes back into the queue. Two minutes before its time is up a run saves and ends.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

# A run prints into its own log, seedS.log; here is what goes wrong before that.
#SBATCH --output={out}/slurm-%A.log
#SBATCH --open-mode=append

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
{commands}
