# syntax=docker/dockerfile:1
# docker build -t train-t2i .
# docker run --rm --gpus all --ipc host -v "$PWD/runs:/app/runs" train-t2i bash scripts/quickstart.sh
# The image needs no CUDA of its own: torch's wheels bring theirs; the host brings the driver.
FROM python:3.11-slim

# gcc: triton compiles its launchers with it.  openssh-client: runs on several machines.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "uv>=0.5" \
    && useradd --create-home --uid 1000 dmdr \
    && install -d -o dmdr -g dmdr /app /app/runs

USER dmdr
WORKDIR /app
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    PYTHONUNBUFFERED=1

# The packages first: this layer is made anew only when the lock changes.
COPY --chown=dmdr:dmdr pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/home/dmdr/.cache/uv,uid=1000,gid=1000 \
    uv sync --frozen --no-install-project

COPY --chown=dmdr:dmdr . .
RUN --mount=type=cache,target=/home/dmdr/.cache/uv,uid=1000,gid=1000 \
    uv sync --frozen && bash scripts/setup.sh

ENV PATH="/app/.venv/bin:$PATH"
CMD ["python", "-m", "train_t2i", "--help"]
