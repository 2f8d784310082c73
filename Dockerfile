# Two images: `prep` turns text into token shards (no torch), `train` trains. Both run on linux/amd64 and linux/arm64.
#
#   docker build --target prep  -t pretrain-launcher:prep .
#   docker build --target train -t pretrain-launcher:train .
#   docker build --target train --build-arg TORCH=cpu --build-arg PIP_FIND_LINKS=DIRECTORY_OR_URL ...   (no GPU)
#
# torch's wheels bring CUDA 13.0 with them, so a slim base is enough; the host needs NVIDIA's container toolkit and a
# driver R580 or newer, or on data-centre GPUs R535 or newer, for which the image holds NVIDIA's compatibility package
# (docs/launch.md, Drivers). --build-arg CUDA_COMPAT=no leaves that out, where NVIDIA's apt repository is out of reach.
# A mirror of the package index or a private CA reaches the build by the PIP_ build arguments.
# Written for the BuildKit of Docker 20.10 and for buildah 1.28, which lack heredocs and linked copies.

# Debian 12 (bookworm-20260406-slim), the index of all its platforms.
ARG BASE_IMAGE=debian:bookworm-slim@sha256:4724b8cc51e33e398f0e2e15e18d5ec2851ff0c2280647e1310bc1642182655d

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Debian's own Python 3.11, the oldest that the project supports. The versions of apt packages follow the base's release:
# Debian 12 removes old ones from its mirrors, so that exact pins would break every build after a security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
 && python3 -m venv /opt/venv \
 && groupadd --gid 10001 app \
 && useradd --uid 10001 --gid app --create-home app \
 && install -d -o app -g app /cache
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DATA_CACHE_DIR=/cache
WORKDIR /app

FROM base AS prep
ARG PIP_CERT
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
COPY requirements/prep.txt requirements/
RUN --mount=type=cache,id=pip,target=/root/.cache/pip pip install --require-hashes -r requirements/prep.txt
COPY core core
COPY clouds clouds
COPY costs costs
COPY launch launch
COPY data_prep data_prep
COPY cost_report.py ./
ARG GIT_REVISION
ENV GIT_REVISION=${GIT_REVISION} IMAGE_TARGET=prep
LABEL org.opencontainers.image.title="pretrain-launcher prep" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_REVISION}"
USER 10001:10001
HEALTHCHECK --interval=5m --timeout=60s CMD ["python", "-m", "launch.node.selftest", "--health"]
CMD ["python", "-m", "launch.node.selftest"]

FROM base AS train
# Triton compiles a small C program with Python's headers for each kernel it launches; Inductor needs g++ and openssl
# for what stays on the CPU.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ openssl python3-dev \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
ARG TORCH=cuda
ARG PIP_CERT
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
COPY requirements/train-cuda.txt requirements/train-cpu.txt requirements/torch.constraint requirements/
# hadolint ignore=DL3013
RUN --mount=type=cache,id=pip,target=/root/.cache/pip \
    if [ "$TORCH" = cuda ]; then \
      pip install --require-hashes -r requirements/train-cuda.txt; \
    else \
      pip install --require-hashes -r requirements/train-cpu.txt \
   && pip install --no-deps "$(cat requirements/torch.constraint)+cpu"; \
    fi
# yes or no: what train.trackers sends metrics to (TensorBoard, W&B, MLflow), 61 MB compressed.
ARG TRACKERS=yes
COPY requirements/track.txt requirements/
RUN --mount=type=cache,id=pip,target=/root/.cache/pip \
    case "$TRACKERS" in \
      yes) pip install --require-hashes -r requirements/track.txt ;; \
      no) ;; \
      *) echo "error: TRACKERS is '$TRACKERS', must be yes or no" >&2; exit 1 ;; \
    esac
# yes or no; empty: as torch needs it. The key is that of NVIDIA's repository, cudatools@nvidia.com.
ARG CUDA_COMPAT
ARG CUDA_REPOSITORY=https://developer.download.nvidia.com/compute/cuda/repos
ARG CUDA_KEY=EB693B3035CD5710E231E123A4B469963BF863CC
COPY requirements/cuda-compat.sh requirements/
RUN case "${CUDA_COMPAT:-$TORCH}" in \
      yes | cuda) bash requirements/cuda-compat.sh ;; \
      no | cpu) ;; \
      *) echo "error: CUDA_COMPAT is '$CUDA_COMPAT', must be yes or no" >&2; exit 1 ;; \
    esac
# What NVIDIA's container runtime gives to the container: the devices and the driver's libraries.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY core core
COPY clouds clouds
COPY costs costs
COPY launch launch
COPY trainer trainer
COPY cost_report.py ./
ARG GIT_REVISION
ENV GIT_REVISION=${GIT_REVISION} IMAGE_TARGET=train
LABEL org.opencontainers.image.title="pretrain-launcher train" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_REVISION}"
USER 10001:10001
HEALTHCHECK --interval=5m --timeout=60s CMD ["python", "-m", "launch.node.selftest", "--health"]
CMD ["python", "-m", "launch.node.selftest"]
