"""Records in the forms of others: what they mean is read, or refused by name."""

import base64
import json

import pytest

from avlm.data.sample import Sample, parse

FILES = {"a.png": b"image", "b.png": b"other", "c.wav": b"sound", "d.mp4": b"video"}
USER, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "a friend"}
DATA = base64.b64encode(b"inside").decode()


def read(record) -> Sample:
    return parse(json.loads(json.dumps(record)), FILES.__getitem__, "k")


def spoken(sample: Sample) -> list[tuple[str, str]]:
    """(role, text) of each turn; the text of a turn that is not learned in brackets."""
    return [(m["role"], m["content"] if m.get("learn", True) else f"[{m['content']}]") for m in sample.messages]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("turns", [{"messages": [USER, ANSWER]}, {"context": ["who?"], "answers": ["a friend"]}])
def test_a_system_prompt_next_to_the_turns_is_their_first(key, turns):
    assert spoken(read({key: "be brief", **turns}))[0] == ("system", "be brief")
    assert len(read({key: "", **turns}).messages) == len(read({key: None, **turns}).messages) == 2
    system = {"role": "system", "content": "be brief"}
    assert spoken(read({key: "be brief", "messages": [system, USER, ANSWER]})) == spoken(
        read({"messages": [system, USER, ANSWER]})
    )
    with pytest.raises(ValueError, match="another one among them"):
        read({key: "be long", "messages": [system, USER, ANSWER]})


@pytest.mark.parametrize(
    ("flag", "learned"),
    [
        *(({key: 0}, False) for key in ("weight", "loss", "loss_scale", "train", "training")),
        *(({key: False}, False) for key in ("weight", "loss", "train")),
        *(({key: 1}, True) for key in ("weight", "loss", "loss_scale", "train")),
        *(
            ({key: value}, True)
            for key, value in {"loss_scale": 1.0, "loss": None, "mask": False, "train": True}.items()
        ),
        *[({"mask": True}, False), ({"weight": 0, "loss": False}, False), ({"weight": 1, "mask": 0}, True)],
    ],
)
def test_a_turn_that_other_trainers_do_not_learn_is_not_learned(flag, learned):
    expected = ("assistant", "a friend" if learned else "[a friend]")
    assert spoken(read({"messages": [USER, ANSWER | flag]}))[1] == expected
    assert (
        spoken(
            read({"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "a friend", **flag}]})
        )[1]
        == expected
    )


def test_weights_of_nemos_answers_are_read():
    record = {"context": ["who?", "and?"], "answers": ["a friend", "mine"], "answer_weights": [0, 1]}
    assert spoken(read(record))[1::2] == [("assistant", "[a friend]"), ("assistant", "mine")]


@pytest.mark.parametrize(
    ("content", "text", "images", "audios"),
    [
        ([{"type": "text", "text": "who?"}], "who?", [], []),
        (["who?", {"text": " you"}], "who? you", [], []),
        (
            [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, {"type": "text", "text": "who?"}],
            "<image>\nwho?",
            ["image"],
            [],
        ),
        ([{"type": "image_url", "image_url": f"data:image/png;base64,{DATA}"}], "<image>", ["inside"], []),
        ([{"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}], "<audio>", [], ["inside"]),
        (
            [{"type": "image", "image": "a.png"}, {"type": "audio", "audio": "c.wav"}, "x"],
            "<image><audio>\nx",
            ["image"],
            ["sound"],
        ),
        ([{"type": "image", "path": "a.png"}, {"image": "b.png"}], "<image><image>", ["image", "other"], []),
        (
            [{"type": "image"}, {"type": "image", "image": "a.png"}, {"type": "image", "image": None}],
            "<image><image><image>",
            ["other", "image", "image"],
            [],
        ),
    ],
    ids=["text", "texts", "openai", "data", "sound", "qwen", "names", "some from the record"],
)
def test_lists_of_parts_are_texts_and_media(content, text, images, audios):
    record = {"messages": [{"role": "user", "content": content}, ANSWER]}
    if "other" in images[:1]:
        record["images"] = ["b.png", "a.png"]  # of the parts that bring none
    sample = read(record)
    assert spoken(sample) == [("user", text), ("assistant", "a friend")]
    assert (sample.images, sample.audios) == ([x.encode() for x in images], [x.encode() for x in audios])


def test_turns_of_a_type_are_nemos():
    record = {
        "conversations": [
            {"from": "user", "value": "c.wav", "type": "audio", "duration": 1.0},
            {"from": "user", "value": "who?", "type": "text"},
            {"from": "assistant", "value": "a friend", "type": "text"},
        ]
    }
    sample = read(record)
    assert spoken(sample) == [("user", "<audio> who?"), ("assistant", "a friend")] and sample.audios == [b"sound"]


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "chatgpt"), ("User", "Assistant"), ("user", "model")])
def test_sharegpt_in_all_its_spellings(roles):
    names = [("from", "value"), ("role", "content")]
    for form in ("conversations", "messages"):
        for name, text in names:
            turns = [{name: role, text: said} for role, said in zip(roles, ("who?", "a friend"))]
            assert spoken(read({form: turns, "id": 1})) == [("user", "who?"), ("assistant", "a friend")]


def test_what_says_nothing_or_changes_nothing_is_taken():
    nothing = {"tools": "[]", "history": [], "rejected": None, "objects": {}, "reasoning_content": ""}
    about = {"id": "x", "model": "", "source": "coco", "width": 1, "height": 2, "metadata": {"tools": 1}, "task": "vqa"}
    turn = ANSWER | {"tool_calls": None, "refusal": None, "name": None, "annotations": [], "id": 3, "type": "text"}
    record = {**nothing, **about, "messages": [USER, turn], "image": "a.png", "images": ["a.png"], "mask": "User"}
    assert spoken(read(record))[1] == ("assistant", "a friend") and read(record).images == [b"image"]


@pytest.mark.parametrize(
    "about",
    [
        {"prompt": "who?", "prompt_id": "f00"},  # UltraChat and No Robots
        {"prompt": " who?\n", "image": "a.png", "messages": [USER | {"content": "<image>\nwho?"}, ANSWER]},
        {"toxic": False, "redacted": True, "openai_moderation": [{"flagged": True}], "turn": 1},  # WildChat, LMSYS
        {"messages": [USER | {"toxic": False, "hashed_ip": "0", "turn_identifier": 4}, ANSWER | {"state": "x"}]},
        {"ID": 1, "Id": 2, "question_ID": 3, "doc_id": 4, "qid": 5, "dialog_id": 6, "Label": "yes", "entities": ["x"]},
        {"tools": False, "stream": False, "is_truncated": True, "n_frames": 8, "num_clips": 2, "keywords": ["x"]},
        {"path": "x.mp3", "sentence": "hi", "segment": "s", "text": "HI", "chapter_id": 2},  # Common Voice, LibriSpeech
        {"skip_prompt_formatting": True, "views": 9, "title": "t", "avatarUrl": "u", "custom_instruction": "c"},
        {"choice_list": ["a"], "width_list": [1], "height_list": [2], "full_topic": "t", "channel": "math"},
        {"ground_truth": "x", "solution": "x", "questionId": 1, "docId": 2, "fig_caption": "x"},
        {"__key__": "x", "__index__": 3, "objects": {"ref": [], "bbox": [[], {"a": [None, ""]}]}},
        {"messages": [USER | {"name": "bob"}, ANSWER | {"markdown": "**x**"}]},
        {"offset": 0, "duration": None},
        {"offset": None, "duration": 5},
        {"answers": None, "image": "", "audio": [""], "videos": [None], "images": None},
        {"answers": [], "context": "", "conversations": None, "audio": "null"},
        {"messages": [USER | {"from": None, "value": None, "weight": None}, ANSWER | {"loss": ""}]},
        {"messages": [USER | {"content": [{"type": None, "text": "who?", "image": None}]}, ANSWER]},
    ],
)
def test_what_sets_say_besides_is_left_aside(about):
    sample = read({"messages": [USER, ANSWER], **about})
    assert [text.removeprefix("<image>\n") for _, text in spoken(sample)] == ["who?", "a friend"]
    assert (sample.answers, sample.audios, sample.videos) == ([], [], [])


@pytest.mark.parametrize("given", [{"path": "a.png", "bytes": None}, [{"bytes": None, "path": "a.png"}, None][:1]])
def test_a_file_may_be_an_object_with_its_path(given):
    for key in ("image", "images"):
        assert read({"messages": [USER | {"content": "<image>"}, ANSWER], key: given}).images == [b"image"]
    nothing = {"path": None, "bytes": None}
    assert read({"messages": [USER, ANSWER], "image": nothing, "videos": [nothing]}).images == []


def test_the_number_of_a_parts_file_must_be_the_one_that_it_gets():
    image = lambda index: {"type": "image", "index": index, "text": None}
    text = {"type": "text", "index": None, "text": "who?"}
    talk = lambda *indices: [
        USER | {"content": [image(index), text]} if index is not None else ANSWER for index in indices
    ]
    record = {"messages": talk(0, None, 1, None), "images": ["a.png", "b.png"]}
    assert read(record).images == [b"image", b"other"]
    for indices in ((1, None, 0, None), (0, None, 0, None), ("0", None, 1, None)):
        with pytest.raises(ValueError, match=r"index=. of a part of type image is not read: parts take the record's"):
            read(record | {"messages": talk(*indices)})
    with pytest.raises(ValueError, match="index=0 of a part of type image is not read"):
        read({"messages": [USER | {"content": [image(0) | {"image": "b.png"}]}, ANSWER]})


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"offset": 0}, None),
        ({"offset": 0.0, "duration": None}, None),
        ({"offset": 1.0}, "offset=1.0 asks for a part of a file"),
        ({"offset": 0.0, "duration": 2.0}, "offset=0.0 and duration=2.0 ask for a part of a file"),
        ({"offset": 0, "type": "text"}, "the key 'offset', which is not read"),
    ],
)
def test_a_turn_of_a_type_reads_a_whole_file(turn, message):
    record = {"conversations": [{"from": "user", "value": "c.wav", "type": "audio", **turn}, ANSWER]}
    if message is None:
        assert read(record).audios == [b"sound"]
    else:
        with pytest.raises(ValueError, match=message):
            read(record)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "image": {"url": "a.png", "data": None}}, "image"),
        ({"type": "image", "image": {"url": None, "data": DATA}}, "inside"),
        ({"type": "image", "image": "a.png", "data": None, "url": ""}, "image"),
        ({"type": "image", "image": "a.png", "data": "a.png"}, "image"),
        ({"type": "image", "image": None, "data": DATA}, "inside"),
    ],
)
def test_columns_that_arrow_fills_with_null_do_not_change_what_a_source_is(part, expected):
    assert read({"messages": [USER | {"content": [part]}, ANSWER]}).images == [expected.encode()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({key: [1]}, f"the record has the key '{key}', which is not read")
            for key in (
                "tools",
                "functions",
                "history",
                "rejected",
                "chosen",
                "objects",
                "loss_weight",
                "weight",
                "audio_filepath",
            )
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, "a turn of assistant has the key 'tool_calls'"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "the key 'reasoning_content', which is not read"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight=0.5 of a turn"),
        ({"messages": [USER, ANSWER | {"weight": "0"}]}, "weight=0 of a turn"),
        ({"messages": [USER, ANSWER | {"weight": 1, "loss": False}]}, "contradict each other"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "only assistant's turns are learned"),
        ({"messages": [USER | {"value": "x"}, ANSWER]}, "both 'content' and 'value', which differ"),
        ({"messages": [USER | {"type": "image_url"}, ANSWER]}, "a turn of type 'image_url' is not read"),
        ({"messages": [USER | {"content": [{"type": "tool_use"}]}, ANSWER]}, "a part of type 'tool_use' is not read"),
        (
            {"messages": [USER | {"content": [{"type": "image", "image": "a.png", "max_pixels": 9}]}]},
            "key 'max_pixels'",
        ),
        ({"messages": [USER | {"content": [{"type": "video", "video": ["a.png"]}]}]}, "must name one file"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "has no text"),
        ({"messages": [USER | {"content": [7]}]}, "must be a text or an object, not 7"),
        ({"images": ["https://x.org/a.png"]}, "is an address: media are read from files"),
        ({"images": ["data:image/png;base64,?"]}, "is not valid base64"),
        ({"images": ["data:image/png,abc"]}, "must be of the form data:TYPE;base64,DATA"),
        ({"images": ["a.png"], "image": "b.png"}, "image and images, which differ"),
        ({"conversations": [USER, ANSWER]}, "has its turns twice"),
        ({"system": ["x"]}, "system must be a text"),
        ({"system": "x", "system_prompt": "y"}, "system and system_prompt of the record differ"),
        ({"system": "see <image>"}, "a medium's tag in the record's system prompt"),
        ({"offset": 1.5}, "offset=1.5 asks for a part of a file"),
        ({"mask": "Assistant"}, "mask='Assistant' is not read"),
        ({"objects": {"ref": ["a"], "bbox": [[1, 2]]}}, "the key 'objects', which is not read"),
        ({"bbox": [1, 2]}, "the key 'bbox', which is not read"),
        ({"start": 1.5}, "the key 'start', which is not read"),
        ({"images": [{"path": "a.png", "bytes": "AA=="}]}, "an object under images has the key 'bytes'"),
        ({"offset": 0, "duration": 5}, "offset=0 and duration=5 ask for a part of a file"),
        ({"prompt": "why?"}, "the key 'prompt', which is not read and is not its first question: why"),
        ({"prompt": [USER]}, "the key 'prompt', which is not read"),
        ({"context": "A page."}, "the key 'context' next to its messages, which is not read"),
        ({"context": ["A page."]}, "the key 'context' next to its messages, which is not read"),
        ({"context": ["why?"], "answers": ["so"]}, "has its turns twice"),
        ({"Messages": [USER]}, "the key 'Messages', which is not read"),
        ({"label": False}, "label=false marks an answer that is not wanted"),
        ({"train": False}, "the record has the key 'train'"),
        ({"messages": [USER, ANSWER | {"compute_loss": False}]}, "the key 'compute_loss', which is not read"),
        ({"images": ["a.png", ""]}, "images must be file names"),
    ],
)
def test_what_others_act_on_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        read({"messages": [USER, ANSWER], **change})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_address_next_to_its_file_is_left_aside_and_refused_alone():
    record = {"messages": [USER, ANSWER], "image_url": "https://example.org/a.png"}
    with pytest.raises(ValueError, match="image_url is an address: download the file and name it under images"):
        read(record)
    question = {"role": "user", "content": "<image> who?"}
    assert len(read({**record, "messages": [question, ANSWER], "image": "a.png"}).images) == 1


@pytest.mark.parametrize(
    ("record", "turns", "media"),
    [
        ({"query": "who?", "response": "a friend", "system": "Be short."}, ["Be short.", "who?", "a friend"], {}),
        (
            {"query": "and?", "response": "mine", "history": [["<image>who?", "a friend"]], "images": ["a.png"]},
            ["<image>who?", "a friend", "and?", "mine"],
            {"images": [b"image"]},
        ),
        ({"instruction": "Say it.", "input": "a friend", "output": "it"}, ["Say it.\na friend", "it"], {}),
        ({"prompt": "who?", "completion": "a friend", "label": True}, ["who?", "a friend"], {}),
        (
            {"question": "who?", "answer": "a friend", "image": "a.png", "audio": "c.wav", "answers": ["a friend"]},
            ["<image><audio>\nwho?", "a friend"],
            {"images": [b"image"], "audios": [b"sound"], "answers": ["a friend"]},
        ),
        ({"image": "a.png", "text": "a friend", "id": 3}, ["<image>", "a friend"], {"images": [b"image"]}),
        ({"audio": "c.wav", "caption": "a friend", "text": ""}, ["<audio>", "a friend"], {"audios": [b"sound"]}),
        ({"file_name": "a.png", "text": "a friend"}, ["<image>", "a friend"], {"images": [b"image"]}),
        ({"audio_filepath": "c.wav", "duration": 2.5, "text": "hi"}, ["<audio>", "hi"], {"audios": [b"sound"]}),
        ({"query": "who?", "response": "a friend", "file_name": "set.csv"}, ["who?", "a friend"], {}),
    ],
)
def test_questions_with_answers_and_captions_are_turns(record, turns, media):
    sample = read(record)
    assert [text for _, text in spoken(sample)] == turns
    for name in ("images", "audios", "answers"):
        assert getattr(sample, name) == media.get(name, [])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"image": "a.png"},
            r"^the record has image, and neither messages, .* such as {\"messages\": \[{\"role\": \"user",
        ),
        ({"text": "alone"}, r"nor a medium and text\. Give it one of these forms"),
        ({}, "^the record has no key, and neither"),
        ({"query": "who?", "response": ["a"]}, r"^response must be a text, not \['a'\]: give turns under messages"),
        ({"query": "who?", "response": "a", "history": ["b"]}, "^history must be a list of"),
        ({"query": "who?", "response": "a", "rejected_response": "b"}, "the key 'rejected_response', which is not"),
        ({"question": "who?", "answer": "a", "context": "A page."}, "the key 'context' next to its question"),
        ({"image": "a.png", "text": "a", "caption": "b"}, "^text and caption of the record differ: give one"),
    ],
)
def test_a_record_of_no_form_is_told_the_forms_with_an_example(record, message):
    with pytest.raises(ValueError, match=message) as error:
        read(record)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
