# syntax=docker/dockerfile:1
# An image with the package and its commands.
#   docker build -t bae .                                   # for CPUs; needs a CPU wheel of torch in wheels/
#   docker build -t bae:cuda --build-arg TORCH=torch .      # with the CUDA build of torch, as published
# TORCH names the lock file of torch: torch-cpu or torch. requirements/torch-cpu.sha256 lists the wheels that are accepted.
FROM python:3.11-slim-bookworm

ARG TORCH=torch-cpu
# g++ compiles kernels at the first step of model.compile=true and of some optimisers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bae
COPY requirements/ requirements/
# wheels/ may be absent: the pattern also matches a file that is always there.
COPY LICENSE wheel[s]/ wheels/
RUN python -m pip install --no-cache-dir --require-hashes -r requirements/uv.txt \
    && uv pip install --system --no-cache --no-deps --require-hashes --find-links wheels \
        --build-constraints requirements/base.txt -r requirements/base.txt -r "requirements/${TORCH}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY bae/ bae/
COPY conf/ conf/
RUN uv pip install --system --no-cache --no-deps --no-build-isolation .

RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENV MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
CMD ["bae-train", "--help"]
