#!/bin/bash
# One job on two machines of eight GPUs each:  sbatch examples/scaling/slurm.sh /shared/job     Not run: needs a cluster.
# Submit it again to go on: two minutes before the time is up Slurm asks the trainer to save its state.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32 --time=08:00:00 --signal=TERM@120
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) JOB_DIR=$1
srun bash -c 'accelerate launch --config_file examples/scaling/fsdp.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((8 * SLURM_NNODES)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST" --main_process_port 29500 -m local_api.train_distributed "$JOB_DIR"'
