"""ImageNet in both layouts: miniature copies against torchvision's and pyarrow's reading, and every wrong copy."""

import builtins
import json
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder

from entreg.data.imagenet import imagenet
from entreg.errors import AssetError, ConfigError
from tests.data.official_layouts import jpeg_bytes, write_image_folder

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
THREE = ["n02123045", "n01440764", "n07753592"]


@pytest.fixture
def folders(tmp_path):
    for part in ("train", "val"):
        write_image_folder(tmp_path, part, THREE)
    return tmp_path


def read(root, part="val", num_classes=3, subset=False):
    return imagenet(str(root), part, num_classes=num_classes, subset=subset)


@pytest.mark.parametrize("part", ["train", "val"])
def test_folders_are_read_as_torchvision_reads_them(folders, part):
    source, peer = read(folders, part), ImageFolder(folders / part)
    assert source.labels.tolist() == peer.targets == [0, 0, 1, 1, 2, 2]
    for index, (image, _) in enumerate(peer):
        assert np.array_equal(np.asarray(source.image(index)), np.asarray(image))
        assert peer.samples[index][0].endswith(f"{source.names[index]}.JPEG")


def test_all_thousand_synsets_have_their_official_numbers(tmp_path):
    write_image_folder(tmp_path, "val", SYNSETS, per_class=1, size=(4, 4))
    source = read(tmp_path, num_classes=1000)
    assert source.labels.tolist() == list(range(1000))
    assert [name.split("/")[0] for name in source.names] == SYNSETS
    # Two numbers that everybody knows: tench is 0, tabby 281.
    assert source.names[0].startswith("n01440764/")
    assert source.names[281].startswith("n02123045/")


def test_part_of_the_thousand_is_refused_unless_meant_and_keeps_its_numbers(folders):
    with pytest.raises(
        AssetError, match=r"val holds 3 of ImageNet's 1,000 classes, n01443537 is missing; .*subset=true"
    ):
        read(folders, num_classes=1000)
    source = read(folders, num_classes=1000, subset=True)
    assert source.labels.tolist() == [0, 0, 281, 281, SYNSETS.index("n07753592"), SYNSETS.index("n07753592")]


def test_wrong_folders_are_one_sentence_each(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root is not set: .*image-net\.org"):
        imagenet(None, "val", num_classes=3, subset=False)
    with pytest.raises(AssetError, match=r"there is no folder .*nowhere with ImageNet; get it from"):
        read(tmp_path / "nowhere")
    with pytest.raises(AssetError, match=r"holds neither val/ nor .* nor \*val\*\.tar \(it holds n01440764"):
        read(folders / "val")
    with pytest.raises(AssetError, match=r"val holds 3 class folders where data\.num_classes is 4"):
        read(folders, num_classes=4)
    with pytest.raises(AssetError, match=r"val holds 3 class folders where data\.num_classes is 2"):
        read(folders, num_classes=2, subset=True)
    (folders / "val" / "cats").mkdir()
    with pytest.raises(AssetError, match=r"val holds cats, which is none of ImageNet's 1,000 classes"):
        read(folders, num_classes=1000, subset=True)
    with pytest.raises(AssetError, match=r"hold different classes, for example cats is in one only"):
        read(folders, num_classes=4)
    (folders / "train" / "cats").mkdir()
    with pytest.raises(AssetError, match=r"val holds class folders without images: .*cats"):
        read(folders, num_classes=4)


def test_files_that_are_not_read_are_counted(folders, capsys):
    names = list(read(folders).names)
    assert capsys.readouterr().err == ""
    first = folders / "val" / names[0]
    content = first.with_suffix(".JPEG").read_bytes()
    for name in ("capital.PNG", "moved.avif", "no_ending"):
        (first.parent / name).write_bytes(content)
    (folders / "val" / "beside.JPEG").write_bytes(content)
    assert sorted(read(folders).names) == sorted([*names, f"{first.parent.name}/capital"])
    said = r"Files of .*val that are not read, as .* \.jpg, .*: 3, the first is beside\.JPEG\.\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_unsorted_validation_images_are_recognised(tmp_path):
    write_image_folder(tmp_path, "train", THREE)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(AssetError, match="val holds no class folders; sort its images into one folder per class"):
        read(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda c: b"text"]
)
def test_truncated_image_is_named(folders, damage):
    source = read(folders)
    path = folders / "val" / f"{source.names[3]}.JPEG"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AssetError, match=rf"{path} (cannot be read|is not an image).* fetch it again"):
        source.image(3)
    source.image(2)
    path.unlink()
    with pytest.raises(AssetError, match=rf"{path} is not there any more"):
        source.image(3)


def picture(number):
    return np.full((20, 24, 3), (number * 20, 100, 255 - number * 20), dtype=np.uint8)


def write_parquet(root, part, labels, *, shards=2, metadata=True, column="image", cut=None):
    """``data/<part>-00000-of-0000n.parquet`` with the columns, types and metadata that the hub's copy has."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    contents = [jpeg_bytes(picture(number)) for number in range(len(labels))]
    if cut is not None:
        contents[cut] = contents[cut][: len(contents[cut]) // 2]
    paths = [f"n{label:08d}_{row}_n{label:08d}.JPEG" for row, label in enumerate(labels)]
    images = [{"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for shard in range(shards):
        rows = range(shard * len(labels) // shards, (shard + 1) * len(labels) // shards)
        columns = {
            column: pyarrow.array([images[row] for row in rows], type=kind),
            "label": pyarrow.array([labels[row] for row in rows], type=pyarrow.int64()),
        }
        table = pyarrow.table(columns)
        if metadata:
            features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, root / "data" / f"{part}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("metadata", [True, False])
def test_parquet_files_are_read_in_order(tmp_path, metadata):
    labels = [2, 0, 1, 1, 2]
    write_parquet(tmp_path, "validation", labels, metadata=metadata)
    write_parquet(tmp_path, "train", [0, 1, 2])
    source = read(tmp_path)
    assert source.labels.tolist() == labels
    assert source.names[1] == "n00000000_1_n00000000"
    for index in (4, 0, 2):
        # JPEG keeps a single colour to within rounding.
        assert np.abs(np.asarray(source.image(index)).astype(int) - picture(index)).max() <= 2
    # The folder with the files themselves will do as well.
    assert read(tmp_path / "data").revision == source.revision
    assert len(read(tmp_path, "train")) == 3


def test_wrong_parquet_files_are_one_sentence_each(tmp_path):
    write_parquet(tmp_path / "range", "validation", [0, 1, 3])
    with pytest.raises(AssetError, match=r"validation-\*\.parquet holds labels outside \[0, 3\)"):
        read(tmp_path / "range")
    write_parquet(tmp_path / "hidden", "validation", [0, -1, 1])
    with pytest.raises(AssetError, match=r"holds labels outside \[0, 3\)"):
        read(tmp_path / "hidden")
    write_parquet(tmp_path / "missing", "validation", [0, 2, 2])
    with pytest.raises(AssetError, match=r"holds 2 of 3 classes, 1 is missing; .*data\.subset=true"):
        read(tmp_path / "missing")
    assert len(read(tmp_path / "missing", subset=True)) == 3
    write_parquet(tmp_path / "shard", "validation", [0, 1, 2], shards=3)
    (tmp_path / "shard" / "data" / "validation-00001-of-00003.parquet").unlink()
    with pytest.raises(AssetError, match=r"holds 2 files like validation-00000-of-00003\.parquet; some are missing"):
        read(tmp_path / "shard")
    write_parquet(tmp_path / "column", "validation", [0, 1, 2], column="img", metadata=False)
    with pytest.raises(AssetError, match=r"validation-\*\.parquet has the columns img, label where image, label are"):
        read(tmp_path / "column")
    write_parquet(tmp_path / "damaged", "validation", [0, 1, 2])
    path = tmp_path / "damaged" / "data" / "validation-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AssetError, match=r"validation-\*\.parquet cannot be read as a table of images and labels"):
        read(tmp_path / "damaged")


def test_truncated_image_in_a_table_is_named(tmp_path):
    write_parquet(tmp_path, "validation", [0, 1, 2], cut=1)
    source = read(tmp_path)
    source.image(0)
    with pytest.raises(AssetError, match=r"row 1 \(n00000001_1_n00000001\) of .*validation-\*\.parquet cannot be read"):
        source.image(1)


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path, "validation", [0, 1, 2])
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="needs the package datasets: pip install datasets"):
        read(tmp_path)
