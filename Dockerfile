# syntax=docker/dockerfile:1.7
#
# Targets: `base` is ComfyUI and the worker without models, `final` (the default) adds the models of MODEL_SET.
# Layers are ordered by how seldom they change: system, ComfyUI, the worker's requirements, the worker; the models
# come from a stage of their own, so that a change of the worker neither fetches nor copies them again.

# ---- system: what ComfyUI and the worker need from Ubuntu ------------------------------------------------------------
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS system

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

ENV LANG=C.UTF-8 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_INPUT=1 \
    PYTHONUNBUFFERED=1

# ffmpeg, libgl1 and libglib2.0-0t64 are for custom nodes. Ubuntu keeps only the newest version of a package, so that
# pinned versions would soon stop the build; the base image's tag says which Ubuntu it is.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates \
        curl \
        ffmpeg \
        git \
        libgl1 \
        libglib2.0-0t64 \
        libtcmalloc-minimal4t64 \
        python3 \
        python3-venv \
        tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# ---- models: the checkpoints of one MODEL_SET, under /models ---------------------------------------------------------
FROM system AS models

COPY --chmod=755 <<'FETCH_MODELS' /usr/local/bin/fetch-models
#!/usr/bin/env bash
# fetch-models SET FOLDER: downloads a set of models into the folders that ComfyUI looks for them in.
set -euo pipefail

readonly model_set=$1 models=$2 token_file=${HF_TOKEN_FILE:-/run/secrets/hf_token}
readonly hub=https://huggingface.co

authorization() { # what curl reads on its standard input, so that no list of processes shows the token
  [[ ! -s $token_file ]] || printf 'header = "Authorization: Bearer %s"\n' "$(<"$token_file")"
}

fetch() { # FOLDER URL; the file has its name only once it is whole
  local target=$models/$1/${2##*/}
  mkdir -p "$models/$1"
  authorization | curl --config - --fail --location --silent --show-error --retry 5 --output "$target.part" "$2"
  mv "$target.part" "$target"
}

mkdir -p "$models"
case $model_set in
  none) ;;
  sd15)
    fetch checkpoints "$hub/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors"
    ;;
  sdxl)
    fetch checkpoints "$hub/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"
    fetch vae "$hub/madebyollin/sdxl-vae-fp16-fix/resolve/main/sdxl_vae.safetensors"
    ;;
  sd3)
    if [[ ! -s $token_file ]]; then
      echo "sd3 needs a Hugging Face token that has accepted its licence: --secret id=hf_token,env=HF_TOKEN" >&2
      exit 2
    fi
    fetch checkpoints \
      "$hub/stabilityai/stable-diffusion-3-medium/resolve/main/sd3_medium_incl_clips_t5xxlfp8.safetensors"
    ;;
  flux1-schnell)
    fetch checkpoints "$hub/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell-fp8.safetensors"
    ;;
  flux1-dev)
    fetch checkpoints "$hub/Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors"
    ;;
  *)
    echo "MODEL_SET must be none, sd15, sdxl, sd3, flux1-schnell or flux1-dev, not '$model_set'" >&2
    exit 2
    ;;
esac
FETCH_MODELS

ARG MODEL_SET=none
RUN --mount=type=secret,id=hf_token fetch-models "${MODEL_SET}" /models

# ---- comfyui: ComfyUI in /opt/comfyui, in a virtual environment of its own ---------------------------------------
FROM system AS comfyui

ARG COMFY_CLI_VERSION=1.23.0
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/comfy-cli \
    && /opt/comfy-cli/bin/pip install "comfy-cli==${COMFY_CLI_VERSION}"

ARG COMFYUI_VERSION=0.8.0
ARG CUDA_VERSION_OF_TORCH=12.8
ARG TORCH_VERSION=2.9.1
ARG TORCHVISION_VERSION=0.24.1
ARG TORCHAUDIO_VERSION=2.9.1

# ComfyUI names no versions for these; without them a later build would get others than the one before.
COPY <<CONSTRAINTS /opt/comfyui/constraints.txt
torch==${TORCH_VERSION}
torchvision==${TORCHVISION_VERSION}
torchaudio==${TORCHAUDIO_VERSION}
transformers<5
CONSTRAINTS

LABEL comfyui.version="${COMFYUI_VERSION}"

# comfy-cli installs into the environment that VIRTUAL_ENV names. Compiled now, so that no cold start compiles it.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/comfyui/venv \
    && DO_NOT_TRACK=1 VIRTUAL_ENV=/opt/comfyui/venv PIP_CONSTRAINT=/opt/comfyui/constraints.txt \
        /opt/comfy-cli/bin/comfy --skip-prompt --workspace /opt/comfyui/ComfyUI install \
        --version "${COMFYUI_VERSION}" --nvidia --cuda-version "${CUDA_VERSION_OF_TORCH}" --skip-manager \
    && /opt/comfyui/venv/bin/python -m compileall -q /opt/comfyui/ComfyUI

# Models on a network volume: RunPod mounts it at /runpod-volume for an endpoint and at /workspace for a pod.
COPY <<'MODEL_PATHS' /opt/comfyui/ComfyUI/extra_model_paths.yaml
endpoint_volume: &folders
  base_path: /runpod-volume
  audio_encoders: models/audio_encoders
  checkpoints: models/checkpoints
  clip_vision: models/clip_vision
  configs: models/configs
  controlnet: models/controlnet
  diffusion_models: |
    models/diffusion_models
    models/unet
  embeddings: models/embeddings
  gligen: models/gligen
  hypernetworks: models/hypernetworks
  latent_upscale_models: models/latent_upscale_models
  loras: models/loras
  model_patches: models/model_patches
  photomaker: models/photomaker
  style_models: models/style_models
  text_encoders: |
    models/text_encoders
    models/clip
  upscale_models: models/upscale_models
  vae: models/vae
  vae_approx: models/vae_approx
pod_volume:
  <<: *folders
  base_path: /workspace
MODEL_PATHS

# ---- base: the worker beside it, in /app, its virtual environment in /opt/worker ---------------------------------
FROM comfyui AS base

WORKDIR /app

# The locks name a version of each package for the system's Python, and its hashes.
COPY locks/worker.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/worker \
    && /opt/worker/bin/pip install --require-hashes --requirement locks/worker.txt

# `fleet` runs the jobs of gateways with ENGINE=celery; `emulator` lets the image be tried without a GPU, see
# docs/how-to/deploy.md.
ARG WORKER_EXTRAS=
COPY locks/emulator.txt locks/fleet.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    IFS=,; for extra in ${WORKER_EXTRAS}; do \
        /opt/worker/bin/pip install --require-hashes --requirement "locks/${extra}.txt"; \
    done

# setuptools, which builds the package, is in the lock too.
COPY pyproject.toml requirements.txt README.md ./
COPY src src
RUN /opt/worker/bin/pip install --no-deps --no-build-isolation .

COPY --chmod=755 start.sh ./
COPY handler.py main.py test_input.json ./
COPY modifiers modifiers
COPY workflows workflows

LABEL org.opencontainers.image.title="comfy-worker" \
      org.opencontainers.image.description="A serverless worker that turns a ComfyUI workflow into an API"

# 8000 is the gateway (SERVE_API_LOCALLY=true), 8188 ComfyUI, which listens on loopback unless COMFYUI_LISTEN says else.
EXPOSE 8000 8188

COPY --chmod=755 <<'HEALTH' /usr/local/bin/health
#!/usr/bin/env bash
# health: ends with 0 if ComfyUI answers, and the gateway too where it is to be served.
set -euo pipefail

serves=${SERVE_API_LOCALLY:-false} engine=${ENGINE:-local}
if [[ ${serves,,} =~ ^(1|true|yes|on)$ ]]; then
  curl -fsS -o /dev/null "http://${API_HOST:-127.0.0.1}:${API_PORT:-${PORT:-8000}}/live"
  # Its ComfyUIs are at other machines.
  [[ ! ${engine,,} =~ ^(celery|runpod)$ ]] || exit 0
fi
# The queue is the cheapest question that ComfyUI answers.
curl -fsS -o /dev/null "${COMFYUI_URL:-http://127.0.0.1:${COMFYUI_PORT:-8188}}/queue"
HEALTH

# RunPod does not look at it; docker and compose do.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 CMD ["health"]

# tini takes in what custom nodes leave behind; start.sh passes signals and arguments on to the worker.
ENTRYPOINT ["/usr/bin/tini", "--", "/app/start.sh"]

# ---- final: base and the models --------------------------------------------------------------------------------------
FROM base AS final

COPY --link --from=models /models/ /opt/comfyui/ComfyUI/models/
