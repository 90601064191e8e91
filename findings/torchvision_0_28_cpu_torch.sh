#!/usr/bin/env bash
# torchvision's default wheel for Linux is built for CUDA, but asks only for "torch==2.13.0", which the CPU build of torch
# satisfies. pip installs the pair and `pip check` is content; then `import torchvision`, and with it timm's, ends in
# "operator torchvision::nms does not exist". The cause, a missing CUDA library, is passed over at import.
# Needs a package index with torch's CPU builds (Linux, x86-64). "===" keeps torchvision's own CPU build out.
# Seen on Python 3.11, torch 2.13.0+cpu, torchvision 0.28.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0+cpu torchvision===0.28.0
"$folder/venv/bin/pip" check
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import importlib.util
from pathlib import Path

try:
    import torchvision
except RuntimeError as error:
    print(f"import torchvision: RuntimeError: {error}")
    if "torchvision::nms does not exist" not in str(error):
        raise SystemExit("changed: the error is another one") from error
else:
    raise SystemExit(f"changed: torchvision {torchvision.__version__} is imported")
[folder] = importlib.util.find_spec("torchvision").submodule_search_locations
for library in sorted(Path(folder).glob("_C*.so")):
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        print(f"its {library.name}: OSError: {error}")
PYTHON
