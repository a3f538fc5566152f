#!/usr/bin/env bash
# prepare.sh FOLDER: an arm64 Python of Debian 12 with ONNX Runtime and llama.cpp, for tests/arm64/test_arm64_real.py.
#
# Needs apt, dpkg, unzip and pip of an x86-64 Debian 12, cmake, ninja and g++-aarch64-linux-gnu, and qemu-user-static to run
# it. Nothing is installed: the packages are unpacked, and llama.cpp is compiled, in FOLDER.
set -euo pipefail
version_of() { python -c "from importlib.metadata import version; print(version('$1'))"; }
folder=$(realpath -m "$1")
mkdir -p "$folder"/{lists/partial,packages,wheels,root/proc}
cd "$folder/packages"

packages=(python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 libgomp1 libexpat1
    zlib1g libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1 libsqlite3-0 libcrypt1)
debian=(-q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$folder/lists"
    -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
apt-get "${debian[@]}" update
apt-get "${debian[@]}" download "${packages[@]}"
for package in *.deb; do dpkg -x "$package" "$folder/root"; done

pip download --quiet --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --dest "$folder/wheels" \
    "numpy==$(version_of numpy)" "onnxruntime==$(version_of onnxruntime)" diskcache jinja2 markupsafe typing_extensions
for wheel in "$folder"/wheels/*.whl; do unzip -q -o "$wheel" -d "$folder/site"; done

# ONNX Runtime reads it, and qemu shows that of the host.
for core in 0 1; do
    printf 'processor\t: %s\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp\n' $core
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done >"$folder/root/proc/cpuinfo"

# The package has no wheel for arm64. Its own sources, for processors with products of int8, as phones have had since 2018.
pip download --quiet --no-deps --no-binary :all: --dest "$folder/wheels" "llama-cpp-python==$(version_of llama-cpp-python)"
mkdir -p "$folder/llama"
tar -xf "$folder"/wheels/llama_cpp_python-*.tar.gz -C "$folder/llama" --strip-components 1
cmake -G Ninja -S "$folder/llama/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod -DGGML_OPENMP=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_CURL=OFF
cmake --build "$folder/build" --target llama
cp -r "$folder/llama/llama_cpp" "$folder/site"
mkdir -p "$folder/site/llama_cpp/lib"
cp -a "$folder"/build/bin/*.so* "$folder/site/llama_cpp/lib"
