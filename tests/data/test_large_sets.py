"""ImageNet in tar shards and in parquet files read in place, against what `datasets` reads; the order of large sets."""

import io
import tarfile

import fsspec
import numpy as np
import pytest
import torch

from entreg.data.imagenet import imagenet
from entreg.data.vision_sets import LabelledImages
from entreg.errors import AssetError
from entreg.training.batches import PositionedDataset, Positions, batch_loader
from tests.data.official_layouts import jpeg_bytes
from tests.data.test_imagenet import picture, write_parquet

LABELS = [2, 0, 1, 1, 2, 0, 2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))


def write_shards(root, part, labels, shards=2, **broken):
    """``imagenet1k-<part>-0000.tar`` with <name>.cls, <name>.jpg and <name>.json, as the hub's shards have them."""
    root.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"imagenet1k-{part}-{shard:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(shard * len(labels) // shards, (shard + 1) * len(labels) // shards):
                members = {"cls": str(labels[row]).encode(), "jpg": jpeg_bytes(picture(row)), "json": b"{}", **broken}
                for ending, content in members.items():
                    if content is not None:
                        info = tarfile.TarInfo(f"n{labels[row]:08d}_{row}.{ending}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))


def write_files(root, files, shard="train-0.tar"):
    """A shard with files as they are given: pictures and texts, by name."""
    root.mkdir(exist_ok=True)
    with tarfile.open(root / shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else jpeg_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read(root, part="train", num_classes=3, **options):
    return imagenet(str(root), part, num_classes=num_classes, **{"subset": False, **options})


def pixels(image):
    return np.asarray(image.convert("RGB"))


def test_shards_are_read_as_datasets_reads_them(tmp_path):
    import datasets

    write_shards(tmp_path / "set", "train", LABELS)
    write_shards(tmp_path / "set", "validation", [0, 1, 2])
    files = sorted(str(path) for path in (tmp_path / "set").glob("*train*.tar"))
    peer = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    for _ in range(2):
        # The second time from the index in the cache.
        source = read(tmp_path / "set")
        assert source.labels.tolist() == [row["cls"] for row in peer] == LABELS
        assert source.names == [row["__key__"] for row in peer]
        for index in (6, 0, 3, 2):
            assert np.array_equal(pixels(source.image(index)), pixels(peer[index]["jpg"]))
    assert read(tmp_path / "set", "val").labels.tolist() == [0, 1, 2]
    # An index that is damaged is made again.
    for index in (tmp_path / "cache" / "index").iterdir():
        index.write_bytes(index.read_bytes()[:40])
    assert read(tmp_path / "set").labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"cls": None}, "n00000000_1 has no cls"),
        ({"jpg": None}, "n00000000_1 has no image"),
        ({"cls": None, "jpg": None}, "there is no image"),
        ({"cls": b"cat"}, "is damaged or no tar of images"),
        ({"cls": b"7"}, r"\*train\*.tar holds labels outside \[0, 3\)"),
        ({"cls": b"1"}, r"holds 1 of 3 classes, 0 is missing"),
    ],
)
def test_wrong_shards_are_one_sentence_each(tmp_path, broken, message):
    write_shards(tmp_path / "set", "train", LABELS, **broken)
    with pytest.raises(AssetError, match=message):
        read(tmp_path / "set")


def test_samples_with_dots_and_capitals_in_their_names_are_read(tmp_path, capsys):
    files = {}
    for row, name in enumerate(["s0", "s1.5", "s1.7", "v2.0/s3", "s4"]):
        image, label = (".JPG", ".CLS") if name == "s4" else (".jpg", ".cls")
        files |= {name + image: picture(row), name + label: str(row % 3), f"{name}.json": "{}"}
    # WebDataset's own samples: an image under a name of its own, and a further image.
    files |= {"s5.input.jpg": picture(5), "s5.cls": "2", "s0.mask.png": picture(9), "s0.coarse.cls": "1"}
    write_files(tmp_path, files, "set-train-0.TAR")
    source = read(tmp_path)
    assert list(source.names) == ["s0", "s1.5", "s1.7", "v2.0/s3", "s4", "s5"]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for row in range(6):
        assert np.abs(pixels(source.image(row)).astype(int) - picture(row)).max() <= 2
    assert capsys.readouterr().err == ""
    # What belongs to no sample is counted, also where the index comes from the cache.
    write_files(tmp_path, {**files, "README": "", "._s0.jpg": "", "s7.json": "{}"}, "set-train-0.TAR")
    for _ in range(2):
        assert read(tmp_path).names == source.names
        said = (
            f"Files of the shards in {tmp_path} that are not read, as they belong to no sample: 3, the first is README."
        )
        assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"s1.5.jpg": picture(1)}, r"s1\.5 has no cls"),
        ({"s1.5.cls": "1"}, r"s1\.5 has no image"),
        ({"s1.a.jpg": picture(1), "s1.b.jpg": picture(1), "s1.cls": "1"}, r"s1 has 2 images for 1 cls"),
        ({"s1.png": picture(1), "s1.jpg": picture(1), "s1.cls": "1"}, r"s1 has two images, the second is s1\.jpg"),
    ],
)
def test_samples_that_are_not_one_image_and_one_label_are_refused(tmp_path, files, message):
    write_files(tmp_path, {"s0.jpg": picture(0), "s0.cls": "0", **files})
    with pytest.raises(AssetError, match=message):
        read(tmp_path)


def test_missing_and_truncated_shards_are_named(tmp_path):
    write_shards(tmp_path / "set", "train", LABELS, shards=3)
    path = tmp_path / "set" / "imagenet1k-train-0001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(AssetError, match=r"imagenet1k-train-0001.tar is damaged .*; fetch it again"):
        read(tmp_path / "set")
    path.unlink()
    with pytest.raises(AssetError, match=r"holds files like imagenet1k-train-0000.tar, but number 1 is missing"):
        read(tmp_path / "set")


@pytest.fixture(params=["folder", "url"])
def tables(request, tmp_path):
    """A folder with parquet files, and the same at a URL."""
    write_parquet(tmp_path, "train", LABELS)
    if request.param == "folder":
        yield str(tmp_path)
        return
    system = fsspec.filesystem("memory")
    for path in (tmp_path / "data").iterdir():
        system.pipe(f"/imagenet/data/{path.name}", path.read_bytes())
    yield "memory://imagenet"
    system.rm("/imagenet", recursive=True)


def test_tables_read_in_place_are_those_of_the_copy(tables, tmp_path):
    source, copy = read(tables, streaming=True), read(tmp_path)
    assert source.labels.tolist() == LABELS
    assert (source.names, source.revision) == (copy.names, copy.revision)
    # Groups of two, in files of three and four rows.
    assert source.blocks.tolist() == [2, 1, 2, 2]
    for index in (6, 0, 3, 1, 2, 5, 4):
        assert np.array_equal(pixels(source.image(index)), pixels(copy.image(index)))


def test_wrong_tables_in_place_are_one_sentence_each(tmp_path):
    with pytest.raises(AssetError, match=r"holds no train-\*\.parquet; get it from"):
        read(tmp_path, streaming=True)
    with pytest.raises(AssetError, match=r"nowhere://imagenet cannot be opened .*; get it from"):
        read("nowhere://imagenet", streaming=True)
    write_parquet(tmp_path, "train", LABELS, shards=3)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(AssetError, match=r"holds 2 files like train-00000-of-00003\.parquet; some are missing"):
        read(tmp_path, streaming=True)
    write_parquet(tmp_path / "column", "train", LABELS, column="img", metadata=False)
    with pytest.raises(AssetError, match="has the columns img, label where image, label are needed"):
        read(tmp_path / "column", streaming=True)


class Watched:
    """A set in blocks that notes which of them are read, and by whom."""

    def __init__(self, blocks):
        self.blocks = np.array(blocks)
        self.owner = np.repeat(np.arange(len(blocks)), blocks)

    def __len__(self):
        return len(self.owner)

    def __getitem__(self, index):
        return {"index": torch.tensor(index)}


@pytest.mark.parametrize("batch_size", [1, 6, 16, 32])
@pytest.mark.parametrize("blocks", [[3], [5, 0, 7, 1, 6], [9] * 40])
def test_every_item_is_seen_once_in_every_epoch_by_one_process(blocks, batch_size):
    data = PositionedDataset(Watched(blocks), seed=0)
    size, steps = len(data), range(-(-3 * len(data) // batch_size))

    def seen(chosen, parts=1, mine=(0,)):
        positions = Positions(size, batch_size, 0, chosen, parts, mine, data.blocks)
        return [batch["index"] for batch in batch_loader(data, positions, num_workers=0, pin=False)]

    whole = torch.cat(seen(steps))
    for epoch in range(3):
        assert sorted(whole[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    # A resumed run sees what is left, in the same order.
    middle = len(steps) // 2
    assert torch.equal(torch.cat(seen(steps[middle:])), whole[middle * batch_size :])
    if batch_size % 2 == 0:
        # Two processes see what one does, batch by batch.
        for one, two, both in zip(seen(steps, 2, [0]), seen(steps, 2, [1]), whole.split(batch_size), strict=True):
            assert sorted([*one.tolist(), *two.tolist()]) == sorted(both.tolist())


def test_few_blocks_are_read_at_a_time():
    data = Watched([10] * 400)
    size, batch_size = len(data), 32

    def orders(blocks):
        chosen = range(size // batch_size)
        return [list(Positions(size, batch_size, 0, chosen, 2, [part], blocks)) for part in range(2)]

    def blocks_read(batches):
        """How often a process that keeps four blocks has to read one."""
        kept, reads = [], 0
        for position in (position for batch in batches for position in batch):
            owner = data.owner[position % size]
            if owner not in kept:
                kept, reads = [*kept, owner][-4:], reads + 1
        return reads

    # Two processes with two queues each: every block is read once by one of them, a little more where queues end.
    assert sum(map(blocks_read, orders(data.blocks))) < 1.1 * len(data.blocks)
    assert sum(map(blocks_read, orders(None))) > 0.9 * size
    # And yet a batch is from many places.
    batch = Positions(size, batch_size, 0, range(1), blocks=data.blocks).batch(0)
    assert len(set(data.owner[batch])) == batch_size // 8
    assert (np.diff(batch) < 0).any()


def test_a_split_of_a_set_in_blocks_has_blocks_of_its_own(tmp_path):
    write_parquet(tmp_path, "train", LABELS)
    source = read(tmp_path, streaming=True)
    split = LabelledImages(source, np.array([1, 2, 5, 6]), transform=None)
    assert split.blocks.tolist() == [1, 1, 0, 2]
    assert LabelledImages(read(tmp_path), np.arange(7), transform=None).blocks is None
