#!/usr/bin/env bash
# Pretraining under Slurm: one torchrun a node, restarts after faults, a checkpoint before the time limit.
#   sbatch --nodes 16 docs/launch/slurm.sh configs/pretrain/huginn-3.5b-h100.yaml --data.packed.path data/huginn
#SBATCH --job-name=recurrent-depth
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

config=$1
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
# torchrun would keep one store over all restarts, with the addresses of dead workers in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The trainer reads the job's end from SLURM_JOB_END_TIME and saves slurm_margin_minutes before it. Slurm versions that
# do not set it get it here.
export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "$(scontrol show job "$SLURM_JOB_ID" | grep -o 'EndTime=[^ ]*' | cut -d= -f2)" +%s)}

srun --kill-on-bad-exit=0 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 --max-restarts 20 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  train.py --config "$config" --resume true "$@"
