# docker build -f containers/cuda.Dockerfile -t recurrent-depth:cuda .
# docker run --gpus all --ipc host --ulimit memlock=-1 -v $PWD:/workspace recurrent-depth:cuda \
#   --nproc_per_node 8 train.py --config ...
# Not built here: no container engine was at hand.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
WORKDIR /opt/recurrent-depth
COPY . .
# torch is the image's (and pins its triton): it must not be replaced by what the constraints name.
RUN grep -v -i -E "^torch==" constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[data,hf]" tensorboard
ENV PYTHONPATH=/opt/recurrent-depth/kernels OMP_NUM_THREADS=8
WORKDIR /workspace
ENTRYPOINT ["torchrun"]
