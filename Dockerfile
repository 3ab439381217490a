# finetune in a container. The CUDA libraries come with torch; the driver is the host's, handed in by the NVIDIA
# Container Toolkit. docs/containers.md says how to build and run it.
FROM python:3.13-slim-bookworm

# Triton compiles its kernels' launchers when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md CHANGELOG.md LICENSE ./
COPY conf conf
COPY finetune finetune
RUN python -m pip install --no-cache-dir -c constraints.txt ".[gguf,serve,video,workstation]"

# Any user id works: it needs no entry in /etc/passwd, and writes to the folders that are mounted and to /tmp.
ENV HOME=/tmp \
    USER=finetune \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/workspace/outputs/.cache/triton \
    XDG_STATE_HOME=/workspace/outputs/.state
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["finetune"]
CMD ["doctor"]
