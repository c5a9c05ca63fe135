# docker build --build-arg DEVICE=cpu -t raysd-cpu:0.1.0 .      heads, drivers of jobs, encoding, what runs by the clock
# docker build --build-arg DEVICE=gpu -t raysd-gpu:0.1.0 .      training and drawing
#
# TORCH_INDEX, where given, is the package index that torch alone is taken from: one with CPU builds keeps CUDA out of the CPU image.
ARG DEVICE=gpu

FROM python:3.11.13-slim-bookworm AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*

# DeepSpeed and torch.compile look for CUDA's compiler. It comes from NVIDIA's image and not from another Python's:
# the nodes of one Ray cluster must run the same Python.
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS toolkit
FROM cpu AS gpu
COPY --from=toolkit /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda

FROM ${DEVICE}
ARG TORCH_INDEX=
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/raysd
COPY constraints.txt ./
RUN python -m venv /opt/venv && pip install --no-cache-dir -c constraints.txt --upgrade pip && \
    pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY raysd ./raysd
RUN pip install --no-cache-dir -c constraints.txt '.[serve,optimizers,postgres]' && rm -rf raysd

# What manifests name: /opt/raysd/tune/lora.toml, /opt/raysd/serve/production.yaml.
COPY tune ./tune
COPY serve ./serve

# The user that manifests name. No entry point: the operator starts Ray, manifests start raysd.
RUN useradd --uid 1000 --create-home raysd && mkdir -p /home/raysd/.cache && chown raysd:raysd /home/raysd/.cache
USER 1000:1000
WORKDIR /home/raysd
CMD ["raysd", "--help"]
