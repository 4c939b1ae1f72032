"""Images of several views in a sample: placeholders, markers and text, for any model, counted before decoding."""

import dataclasses

import pytest

from avlm.config.media import ImageLayout, VideoConfig, VideoText
from avlm.config.model import ProjectorConfig
from avlm.config.run import DataConfig
from avlm.data.inspect_samples import grids_of
from avlm.data.media_reader import MediaReader
from avlm.data.packing import pack
from avlm.data.sample import Sample, SampleEncoder
from avlm.data.stream import Stream
from avlm.data.synthetic import SyntheticLoader
from avlm.data.text.numbers import in_words
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE, NEWLINE
from avlm.models.initial import init
from tests.data.small_files import (
    ANY_GRID,
    CONTROL,
    CORPUS,
    data,
    image_file,
    model,
    photo,
    video_file,
    write_tokenizer,
)

VIEW, TILE, BREAK = "<view>", "<tile>", "<break>"
MODEL = model()  # views of 4 x 4 features
JOINED = dataclasses.replace(MODEL, vision_projector=ProjectorConfig(newline=True))
PINPOINTS = ImageLayout(tiles="pinpoints", grids=[[1, 2], [2, 1], [2, 2]])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    corpus = [*CORPUS, "frame 1: frame 2: one two three of 0:00:02\n\n"]
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), [*CONTROL, VIEW, TILE, BREAK], corpus)


def encode(folder, layout=None, config=MODEL, images=(), videos=(), **keys):
    encoder = SampleEncoder(config, data(folder, image_layout=layout or ImageLayout(), **keys), Tokenizer(folder))
    tags = "<image>" * len(images) + "<video>" * len(videos)
    messages = [{"role": "user", "content": f"{tags} what?"}, {"role": "assistant", "content": "a cat"}]
    files = [image_file(photo(*size)) for size in images]
    return encoder.encode(Sample("a", messages, files, videos=list(videos)))


def written(encoded, folder):
    """Of the user's turn, before its text: text, and how many placeholders of each kind follow each other."""
    tokens = encoded.token_T.tolist()
    found, ids = [], []
    for token in tokens:
        name = {IMAGE: "image", NEWLINE: "newline"}.get(token)
        if name is None:
            ids.append(token)
            continue
        if ids:
            found.append(Tokenizer(folder).decode(ids))
            ids = []
        if found and isinstance(found[-1], tuple) and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + 1)
        else:
            found.append((name, 1))
    first = found[0].removeprefix("<|im_start|>user\n")
    return [*([first] if first else []), *found[1:], Tokenizer(folder).decode(ids).partition(" what?")[0]]


def test_tiles_stand_between_their_markers_with_text_after_each_line(tokenizer_folder):
    layout = ImageLayout(
        tiles="long_edge",
        longest_edge=56,
        tile_markers=[TILE + "frame {line} {column}", ""],
        line_end="\n",
        tiles_end="\n",
        whole_markers=[VIEW, TILE],
    )
    found = written(encode(tokenizer_folder, layout, images=[(80, 40)]), tokenizer_folder)
    assert found == [
        *(TILE + "frame 1 1", ("image", 16), TILE + "frame 1 2", ("image", 16), "\n\n" + VIEW, ("image", 16), TILE)
    ]
    small = written(
        encode(tokenizer_folder, dataclasses.replace(layout, longest_edge=28), images=[(9, 9)]), tokenizer_folder
    )
    assert small == [VIEW, ("image", 16), TILE]


def test_joined_tiles_have_a_learned_row_after_each_line(tokenizer_folder):
    found = written(encode(tokenizer_folder, PINPOINTS, JOINED, images=[(50, 28)]), tokenizer_folder)
    line = [("image", 8), ("newline", 1)]
    assert found == [("image", 24), ("newline", 1), *(line * 3), ""]  # 16 of the whole image, and the first line


def test_tiles_of_pinpoints_follow_each_other_as_in_nemo_if_they_are_not_joined(tokenizer_folder):
    """Whole views after the whole image, the features of their padding included."""
    layout = dataclasses.replace(PINPOINTS, join=False)
    encoded = encode(tokenizer_folder, layout, images=[(50, 20)])
    assert written(encoded, tokenizer_folder) == [("image", 3 * 16), ""] and not encoded.groups
    marked = dataclasses.replace(layout, tile_markers=[TILE, ""], tiles_end="\n\n")
    found = written(encode(tokenizer_folder, marked, images=[(50, 20)]), tokenizer_folder)
    assert found == [("image", 16), TILE, ("image", 16), TILE, ("image", 16), "\n\n"]


def test_only_an_image_that_is_alone_is_cut_if_so_told(tokenizer_folder):
    layout = dataclasses.replace(PINPOINTS, only_alone=True)
    two = encode(tokenizer_folder, layout, JOINED, images=[(50, 28), (28, 28)])
    assert written(two, tokenizer_folder) == [*([("image", 16), ("newline", 1)] * 2), ""]
    one = encode(tokenizer_folder, layout, JOINED, images=[(50, 28)])
    assert (one.token_T == IMAGE).sum() == 16 + 32


def test_aspect_tiles_of_a_model_of_ones_own_are_seen_line_by_line_and_then_as_a_whole(tokenizer_folder):
    layout = ImageLayout(tiles="aspect", max_tiles=4)
    encoded = encode(tokenizer_folder, layout, images=[(90, 30)], markers={"image": [VIEW, TILE]})
    assert written(encoded, tokenizer_folder) == [VIEW, ("image", 4 * 16), TILE]
    assert len(encoded.media["image"]) == 4 and not encoded.groups
    batch = pack([encoded], 128, MODEL)
    network = AVLM(MODEL)
    init(network)
    loss, _ = network(batch)
    loss.backward()
    assert network.vision_projector.up.weight.grad.any()


def test_lines_of_features_are_broken_by_a_token(tokenizer_folder):
    config = model(dataclasses.replace(ANY_GRID, resize="longest"), downsample=1)
    side = config.vision.patch_size
    layout = ImageLayout(longest_edge=4 * side, line_break=BREAK)
    markers = {"image": ["", VIEW]}
    found = encode(tokenizer_folder, layout, config, images=[(80 * side, 40 * side), (2 * side, side)], markers=markers)
    assert written(found, tokenizer_folder) == [
        *[("image", 4), BREAK, ("image", 4), VIEW, ("image", 2), VIEW],
    ]


@pytest.mark.parametrize(("how", "features"), [("none", 16), ("mean", 4), ("bilinear", 4)])
def test_frames_of_a_video_are_halved_and_end_with_a_learned_row(tokenizer_folder, how, features):
    config = dataclasses.replace(JOINED, vision_projector=ProjectorConfig(newline=True, halve_frames=how))
    video = VideoConfig(num_frames=3, newline=True)
    found = encode(tokenizer_folder, None, config, videos=[video_file(2.0)], images=[(28, 28)], video=video)
    counts = [("image", 16), ("newline", 1), ("image", 3 * features), ("newline", 1), ""]
    assert written(found, tokenizer_folder) == counts
    media = pack([found], 256, config).image
    assert len(media.rows) == 16 + 3 * features and len(media.newlines) == 2
    network = AVLM(config)
    init(network)
    x_TD, *_ = network.embed(pack([found], 256, config))
    assert x_TD[media.newlines].equal(network.vision_projector.newline.expand(2, -1))


def test_text_around_the_frames_of_a_video_tells_their_number_and_time(tokenizer_folder):
    text = VideoText(before="{count_in_words} of {duration}\n", frame="frame {n} {clock} ", between="\n", after="\n\n")
    video = VideoConfig(num_frames=2, text=text)
    found = encode(tokenizer_folder, videos=[video_file(2.0)], video=video, markers={"video": [VIEW, ""]})
    expected = [
        *("two of 0:00:02\nframe 1 00:00 " + VIEW, ("image", 16)),
        *("\nframe 2 00:01 " + VIEW, ("image", 16), "\n\n"),
    ]
    assert written(found, tokenizer_folder) == expected


def test_control_tokens_are_read_in_every_text_around_views_and_frames(tokenizer_folder):
    text = VideoText(before=TILE, frame=f"one {VIEW}", between=BREAK, after=TILE)
    found = encode(tokenizer_folder, videos=[video_file(2.0)], video=VideoConfig(num_frames=3, text=text))
    control = {token: Tokenizer(tokenizer_folder).id_of(token) for token in (TILE, VIEW, BREAK)}
    counts = {token: (found.token_T == number).sum().item() for token, number in control.items()}
    assert counts == {TILE: 2, VIEW: 3, BREAK: 2}
    layout = ImageLayout(tiles="aspect", max_tiles=3, line_end=BREAK, tiles_end=VIEW)
    found = encode(tokenizer_folder, layout, images=[(20, 90)])
    counts = {token: (found.token_T == number).sum().item() for token, number in control.items()}
    assert counts == {TILE: 0, VIEW: 1, BREAK: 3}


def test_numbers_are_spelled():
    spelled = {0: "zero", 13: "thirteen", 20: "twenty", 64: "sixty-four", 100: "one hundred", 999: "999"}
    spelled |= {999: "nine hundred and ninety-nine", 1000: "1000"}
    assert {number: in_words(number) for number in spelled} == spelled


def test_an_image_with_too_many_tiles_is_refused_before_it_is_decoded(tokenizer_folder):
    layout = ImageLayout(tiles="aspect", max_tiles=12)
    with pytest.raises(ValueError) as error:
        encode(tokenizer_folder, layout, images=[(900, 90)], seq_length=100)
    assert str(error.value) == (
        "image of 900 x 90 pixels takes 176 tokens, more than data.seq_length=100: lower data.image_layout.max_tiles=12"
    )
    refused = "image of 100 x 90 pixels takes 80 tokens, more than data.seq_length=60: "
    with pytest.raises(ValueError) as error:
        encode(tokenizer_folder, PINPOINTS, images=[(100, 90)], seq_length=60)
    fix = "leave out the largest grids of data.image_layout.grids=[[1, 2], [2, 1], [2, 2]]"
    assert str(error.value) == refused + fix
    with pytest.raises(ValueError) as error:  # of one grid none can be left out
        encode(tokenizer_folder, dataclasses.replace(PINPOINTS, grids=[[2, 2]]), images=[(100, 90)], seq_length=60)
    assert str(error.value) == refused + "raise it"


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (model(ANY_GRID, downsample=2), {"image_layout": ImageLayout(tiles="aspect")}, "resize=area gives it any grid"),
        (model(dataclasses.replace(ANY_GRID, resize="longest")), {}, "needs data.image_layout.longest_edge"),
        (MODEL, {"video": VideoConfig(newline=True)}, "needs model.vision_projector.newline=true"),
        (MODEL, {"image_layout": ImageLayout(line_break="\n")}, "has no control token"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused(tokenizer_folder, config, keys, message):
    with pytest.raises(ValueError, match=message):
        SampleEncoder(config, data(tokenizer_folder, **keys), Tokenizer(tokenizer_folder))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tiles": "pinpoints"}, "grids are given with tiles=pinpoints"),
        ({"tiles": "long_edge"}, "needs longest_edge"),
        ({"tiles": "aspect", "min_tiles": 5, "max_tiles": 4}, "min_tiles=5 is above max_tiles=4"),
        ({"line_end": "\n"}, "needs tiles that are not joined"),
        ({"tiles": "aspect", "join": False}, "join=false needs tiles=pinpoints"),
        ({"only_alone": True}, "only_alone needs tiles"),
        (
            {"tiles": "aspect", "tile_markers": ["<row_{row}>", ""]},
            r"tile_markers='<row_\{row\}>': \{row\} stands for nothing here, only \{line\} and \{column\}",
        ),
        ({"tiles": "aspect", "line_end": "{line}"}, r"line_end='\{line\}': \{line\} stands for nothing here"),
    ],
)
def test_keys_of_a_layout_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ImageLayout(**keys)


def test_a_text_around_media_with_an_unknown_word_in_braces_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"between='\{n\}': in braces stand only count, count_in_words, duration"):
        VideoText(between="{n}")
    with pytest.raises(ValueError, match=r"markers.image='<\{i\}>': \{i\} stands for nothing here, only \{n\}"):
        DataConfig(train="x", markers={"image": ["<{i}>", ""]})


def test_inspect_tells_tiles(tokenizer_folder):
    sample = Sample("a", [], [image_file(photo(50, 28))], files=["a.png"])
    reader = MediaReader(JOINED, data(tokenizer_folder, image_layout=PINPOINTS))
    [line] = grids_of(sample, reader).values()
    assert line == "50 x 28 pixels, 2 x 1 tiles and the whole image, 3 x 4 x 4 patches, 48 features"


def test_synthetic_rows_have_tiles(tokenizer_folder):
    run = data(tokenizer_folder, image_layout=PINPOINTS, seq_length=400)
    stream = Stream("synthetic:documents=1,images=2,clips=0", run, JOINED, rank=0, world=1, seed=0, train=True)
    image = next(iter(SyntheticLoader(stream))).image
    assert len(image.sizes) == 2 * 5 and len(image.newlines) == 6 + 8  # of 8 lines, 640 x 480 shows 6
