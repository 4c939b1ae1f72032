"""Shards and blends under msc:// paths, read by Multi-Storage Client: here from a profile of the type file."""

import json
from itertools import islice

import pytest
import yaml

from avlm.data.loader import open_loader, open_samples
from avlm.data.stream import Stream
from tests.data.energon.test_loader import content, write_set
from tests.data.small_files import data, model

HEADER = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder that msc://avlm-bucket stands for."""
    folder = tmp_path_factory.mktemp("remote")
    provider = {"type": "file", "options": {"base_path": str(folder / "bucket")}}
    (folder / "msc.yaml").write_text(yaml.safe_dump({"profiles": {"avlm-bucket": {"storage_provider": provider}}}))
    write_set(folder / "bucket/set", "train", 30, bad=(3,))
    write_set(folder / "bucket/held_out", "val", 9, first=100)
    (folder / "bucket/blend.yaml").write_text(yaml.safe_dump(HEADER | {"splits": {"train": {"path": "set"}}}))
    blend = {"train": {"blend": [{"weight": 1, "path": "msc://avlm-bucket/set"}]}}
    (folder / "blend.yaml").write_text(yaml.safe_dump(HEADER | {"splits": blend}))
    code = HEADER | {"splits": {"train": {"path": "set", "__function__": "os.system"}}}
    (folder / "bucket/code.yaml").write_text(yaml.safe_dump(code))
    return folder


@pytest.fixture
def loader(bucket, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("MSC_CONFIG", str(bucket / "msc.yaml"))

    def make(source, state=None, **changes):
        settings = data(tokenizer_folder, train=source, **changes)
        return open_loader(Stream(settings.train, settings, model(), 0, 1, 1, True), state)

    return make


@pytest.mark.parametrize(
    "source, workers",
    [("msc://avlm-bucket/set", 2), ("msc://avlm-bucket/blend.yaml", 0), ("blend.yaml", 0), ("blended", 2)],
)
def test_a_bucket_is_read_and_resumed_like_the_same_folder_here(bucket, loader, source, workers):
    here = str(bucket / "bucket/set")
    source = {"blend.yaml": str(bucket / "blend.yaml"), "blended": {"msc://avlm-bucket/set": 1.0}}.get(source, source)
    first = loader(source, num_workers=workers)
    rows = iter(first)
    before = [content(next(rows)) for _ in range(4)]
    state = json.loads(json.dumps(first.state()))
    expected = [content(batch) for batch in islice(rows, 5)]
    assert [content(batch) for batch in islice(loader(source, state, num_workers=workers), 5)] == expected
    same = {here: 1.0} if isinstance(source, dict) else here
    assert [content(batch) for batch in islice(loader(same, num_workers=workers), 9)] == before + expected


@pytest.mark.usefixtures("loader")
def test_a_set_in_a_bucket_can_be_evaluated_on(bucket, tokenizer_folder):
    remote, here = (
        list(open_samples(source, data(tokenizer_folder)))
        for source in ("msc://avlm-bucket/held_out", str(bucket / "bucket/held_out"))
    )
    assert len(remote) == 9 and remote[0].images and remote == here


@pytest.mark.parametrize(
    "source, message",
    [
        ("msc://nowhere/set", 'cannot open msc://nowhere/set: Profile "nowhere" not found'),
        ("s3://bucket/set", "s3://bucket/set is no path here: Energon reads a bucket as msc://PROFILE/path"),
        ("msc://avlm-bucket/gone", "no Energon dataset msc://avlm-bucket/gone"),
        ("msc://avlm-bucket/set/.nv-meta", "prepare it before it is copied there"),
        ("msc://avlm-bucket/code.yaml", "'__function__' is not supported: it could name code to run"),
    ],
)
def test_what_is_not_read_of_a_bucket_is_one_line(loader, source, message):
    for given in (source, {source: 1.0}):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            loader(given)
        assert "\n" not in str(error.value)
