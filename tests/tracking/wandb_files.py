"""A reader of wandb's files that shares nothing with wandb's own: LevelDB's log format (with zlib's checksum) around
protocol buffers."""

import json
import struct
import zlib
from pathlib import Path

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path):
    """Every record of a .wandb file; what a killed process has not finished is left out."""
    from wandb.proto import wandb_internal_pb2

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    place, parts, records = 7, [], []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        content = data[place + 7 : place + 7 + length]
        if kind == 0 or len(content) < length:
            break
        assert checksum == zlib.crc32(bytes([kind]) + content)
        place += 7 + length
        parts = [content] if kind in (FULL, FIRST) else [*parts, content]
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
    return records


def parts(folder, run_id="*"):
    """The .wandb files of a run's parts, oldest first."""
    return sorted(Path(folder).glob(f"wandb/*run-*/run-{run_id}.wandb"), key=lambda path: path.parent.name)


def history(folder, run_id="*"):
    """Rows of all parts as (step, {name: value}), in the order in which they were written."""
    rows = []
    for path in parts(folder, run_id):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
                step = record.history.step.num
                rows.append((step, {key: value for key, value in items.items() if not key.startswith("_")}))
    return rows


def only(path, kind):
    """The records of one kind in a file."""
    return [getattr(record, kind) for record in read_records(path) if record.WhichOneof("record_type") == kind]
