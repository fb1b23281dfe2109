# docker build -f containers/rocm.Dockerfile -t recurrent-depth:rocm .
# docker run --device /dev/kfd --device /dev/dri --group-add video --ipc host --ulimit memlock=-1 -v $PWD:/workspace \
#   recurrent-depth:rocm --nproc_per_node 8 train.py --config ...
# Not built here: no container engine was at hand. Choose a tag of rocm/pytorch that holds torch 2.11 to 2.13.
ARG BASE=rocm/pytorch:latest
FROM ${BASE}
WORKDIR /opt/recurrent-depth
COPY . .
# torch and triton are the image's (ROCm builds): they must not be replaced by what the constraints name.
RUN python -c "import torch; assert torch.version.hip, 'this image has no ROCm build of torch'" \
    && grep -v -i -E "^torch==" constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[data,hf]" tensorboard
ENV PYTHONPATH=/opt/recurrent-depth/kernels OMP_NUM_THREADS=8
# What the field reports to help; docs/scaling.md says why. Nothing of it is measured here.
ENV HSA_NO_SCRATCH_RECLAIM=1 NCCL_MIN_NCHANNELS=112 TORCH_NCCL_HIGH_PRIORITY=1 GPU_MAX_HW_QUEUES=2
WORKDIR /workspace
ENTRYPOINT ["torchrun"]
