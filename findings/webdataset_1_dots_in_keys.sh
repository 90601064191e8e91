#!/usr/bin/env bash
# WebDataset writes a sample whose key has a dot and reads something else: a key ends at the first dot of the file's
# name, so samples written as s1.5 and s1.7 come back as one sample, s1, with the fields 5.jpg and 7.jpg and no jpg. The
# writer does not refuse such keys, the reader does not warn.
# Seen on Python 3.11, webdataset 1.0.2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet webdataset==1.0.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import tarfile

import webdataset
from webdataset.tariterators import base_plus_ext

with webdataset.TarWriter("shard.tar") as writer:
    for key in ("s1.5", "s1.7"):
        print(f"written: {key} with jpg")
        writer.write({"__key__": key, "jpg": key.encode()})
with tarfile.open("shard.tar") as shard:
    print(f"the shard: {shard.getnames()}; base_plus_ext('s1.5.jpg') is {base_plus_ext('s1.5.jpg')}")
samples = []
for sample in webdataset.WebDataset("shard.tar", shardshuffle=False):
    fields = {name: content for name, content in sample.items() if not name.startswith("__")}
    print(f"read: {sample['__key__']} with {fields}")
    samples.append((sample["__key__"], fields))
if samples != [("s1", {"5.jpg": b"s1.5", "7.jpg": b"s1.7"})]:
    raise SystemExit("changed: samples with a dot in their key are read in another way")
PYTHON
