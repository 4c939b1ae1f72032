"""Scores of answers against values worked out by hand, and against jiwer and transformers' normaliser."""

import json
import math
from collections import Counter

import jiwer
import pytest
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from avlm.config.duplex import DuplexConfig
from avlm.config.run import DataConfig
from avlm.evaluation.cider import words
from avlm.evaluation.scores import (
    LOWER_IS_BETTER,
    METRICS,
    NAMES,
    check_names,
    english_normalizer,
    score_samples,
    scorer,
    total,
    value,
    vqa_form,
)
from avlm.evaluation.sets import read_set, references

SENTENCES = [
    "Hello, World!",
    "I'm sure they won't come; we've been there.",
    "He's gone, it's been a while.",
    "Mr. Smith met Dr. Jones on St. James street.",
    "twenty-one thousand and five people",
    "It cost $20 million, or about £3.50 each.",
    "one oh one dalmatians",
    "two thousand and ten",
    "the 1960s and the 32nd",
    "Um, I mean, uh, yes.",
    "[noise] what (laughs) is that?",
    "fifty percent, or 50%",
    "three and a half hours",
    "double seven five",
    "café naïve résumé",
    "minus four degrees",
    "gonna wanna gotta",
    "can't you? couldn't we? let's go",
    "1,000,000 dollars and 5 cents",
    "o'clock, y'all, ma'am",
    "seven three seven max",
    "the quick brown fox's tail",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_is_brought_to_whispers_normal_form(sentence):
    assert english_normalizer()(sentence) == EnglishTextNormalizer({})(sentence)


def test_british_and_american_spellings_are_one():
    assert METRICS["wer"]("The color of the center", ["the colour of the centre"]) == (0, 5)


def test_word_and_character_errors_are_counted_on_the_normal_form():
    assert METRICS["wer"]("The cat sit on mat.", ["the cat sat on the mat"]) == (2, 6)
    assert METRICS["cer"]("kitten", ["sitting"]) == (3, 7)
    assert METRICS["wer"]("", ["two words"]) == (2, 2)
    assert METRICS["wer"]("three five one", ["Three, five, two."]) == (1, 1), "351 and 352 are a word each"


@pytest.mark.parametrize(("metric", "theirs"), [("wer", jiwer.wer), ("cer", jiwer.cer)])
def test_error_rates_of_a_set_are_jiwers_of_all_its_texts(metric, theirs):
    answers = SENTENCES[1:] + SENTENCES[:1]
    normal = EnglishTextNormalizer({})
    expected = theirs([normal(s) for s in SENTENCES], [normal(s) for s in answers])
    found = total(METRICS[f"{metric}_english"](answer, [truth]) for answer, truth in zip(answers, SENTENCES))
    assert found == pytest.approx(expected, rel=1e-12) and expected > 0.5


@pytest.mark.parametrize(
    ("reference", "answer", "wer", "cer"),
    [
        ("schön", "schon", (1, 1), (1, 5)),
        ("schon", "schön", (1, 1), (1, 5)),
        ("scho\u0308n", "schön", (0, 1), (0, 5)),  # the same letter, written as two characters
        ("Das Haus, schön!", "das haus schön", (0, 3), (0, 14)),
        ("कि", "का", (1, 1), (1, 2)),
        ("மொழி", "மழி", (1, 1), (1, 4)),
        ("ไม่", "ไม้", (1, 1), (1, 3)),
        ("été à Noël", "ete a noel", (3, 3), (4, 10)),
        ("ой", "ои", (1, 1), (1, 2)),
        ("שָׁלוֹם", "שלום", (1, 1), (3, 7)),
        (
            "你好\uff0c世界\u3002",
            "你好世界",
            (2, 2),
            (0, 4),
        ),  # what stands between letters without blanks is no character
        ("今日は", "今日わ", (1, 1), (1, 3)),
        ("\uff21\uff22\uff23 def", "abc def", (0, 2), (0, 7)),
    ],
)
def test_letters_beyond_english_keep_their_marks(reference, answer, wer, cer):
    assert METRICS["wer"](answer, [reference]) == wer and METRICS["cer"](answer, [reference]) == cer


def test_the_normal_form_is_chosen_for_a_whole_set_or_by_name():
    german = [("schon", ["schön"]), ("zwanzig eins", ["zwanzig eins"]), ("three", ["3"])]
    assert [scorer("wer", german)(*pair)[0] for pair in german] == [1, 0, 1]
    english = [("the cafe", ["the café"]), ("three", ["3"]), *[("a word", ["a word"])] * 150]
    assert [scorer("wer", english)(*pair)[0] for pair in english[:2]] == [0, 0]
    assert scorer("wer", [("ünd", ["and"]), *english]) is METRICS["wer_english"], "by its references"
    assert METRICS["wer_english"]("schon", ["schön"]) == (0, 1) and METRICS["wer_basic"]("three", ["3"]) == (1, 1)
    assert {"wer_basic", "cer_english"} <= set(LOWER_IS_BETTER)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("351", "three five one")] * 19 + [("déjà", "three five one")], [0] * 19 + [1]),
        ([("351", "three five one")] * 99 + [("déjà", "three five one")], [0] * 99 + [1]),
        ([("351", "three five one")] * 20 + [("a café", "a café"), ("cafe", "café")], [0] * 21 + [1]),
        ([("the color", "the colour"), ("schön", "schon")], [0, 1]),
        ([("\uff33chon", "schon"), ("Scho\u0308n", "schön")], [0, 0]),
        ([("schon", "schön"), ("fruh", "früh"), ("three", "3")], [1, 1, 1]),  # two words are another language
        (
            [
                (
                    "er war am fruhen Morgen schon lange wieder zu Hause",
                    "er war am frühen Morgen schon lange wieder zu Hause",
                )
            ],
            [1],
        ),
        ([("", ""), ("schön", "")], [0, 1]),
    ],
)
def test_the_form_of_a_small_set_is_chosen_by_its_references_alone(pairs, expected):
    pairs = [(answer, [reference]) for answer, reference in pairs]
    assert [scorer("wer", pairs)(*pair)[0] for pair in pairs] == expected


def test_rouge_words_keep_their_vowel_signs():
    assert METRICS["rouge_l"]("कि", ["का"]) == (0, 1)
    assert METRICS["rouge_l"]("scho\u0308n", ["schön"]) == (1, 1)


def test_the_nearest_of_several_references_counts():
    assert METRICS["wer"]("a big dog", ["one cat", "a large dog"]) == (1, 3)
    assert METRICS["exact_match"]("dog", ["cat", "dog"]) == (1, 1)
    assert METRICS["exact_match"]("Dog", ["cat", "dog"]) == (0, 1)
    assert METRICS["rouge_l"]("the cat", ["no", "the cat"]) == (1, 1)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "the cat on mat": 4 of 4 words of the answer, 4 of 6 of the reference.
    assert METRICS["rouge_l"]("the cat on mat", ["The cat sat on the mat."])[0] == pytest.approx(
        2 * 1 * (4 / 6) / (10 / 6)
    )
    assert METRICS["rouge_l"]("mat the on", ["the cat sat on the mat"])[0] == pytest.approx(2 * (2 / 3) * (2 / 6) / 1)
    assert METRICS["rouge_l"]("", ["a cat"]) == (0, 1)


@pytest.mark.parametrize(
    ("sayers", "expected"),
    # Left out are those who said it, who see one fewer, and the others, who see all: (k min(1, (k-1)/3) + ...) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_averages_over_leaving_each_person_out(sayers, expected):
    people = ["yes"] * sayers + [f"no {i}" for i in range(10 - sayers)]
    assert METRICS["vqa_accuracy"]("Yes.", people)[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Dog", "dog"),
        ("a red, and an old; car!", "red and old car"),
        ("t-shirt", "t shirt"),
        ("blue / green", "blue green"),
        ("left -right", "left right"),
        ("1,000", "1000"),
        ("3.5 miles.", "3.5 miles"),
        ("U.S.A.", "usa"),
        ("None", "0"),
        ("ten or Two", "10 or 2"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("its", "its"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("man's\nhat", "man's hat"),
    ],
)
def test_vqa_answers_are_compared_in_one_form(text, form):
    assert vqa_form(text) == form


def test_vqa_accuracy_of_other_than_ten_people_is_refused():
    with pytest.raises(ValueError, match="needs 10 answers from different people, not 3"):
        METRICS["vqa_accuracy"]("yes", ["yes"] * 3)


def test_a_long_transcript_weighs_more_than_a_short_one():
    scores = [METRICS["wer"]("no", ["yes"]), METRICS["wer"]("a b c d e f g h i", ["a b c d e f g h i"])]
    assert total(scores) == pytest.approx(1 / 10) and [value(score) for score in scores] == [1.0, 0.0]


def test_references_without_words_have_no_error_rate():
    silent = METRICS["wer"]("hello", ["um"])
    assert silent == (1, 0) and value(silent) is None
    assert total([silent, (0, 1)]) == 1.0, "what was made up counts"
    assert math.isnan(total([silent]))


def test_an_unknown_metric_is_refused_with_the_nearest():
    check_names(NAMES, "--metrics")
    with pytest.raises(ValueError, match=r"--metrics names 'vqa', which is no metric \(did you mean vqa_accuracy\?\)"):
        check_names(["wer", "vqa"], "--metrics")
    with pytest.raises(ValueError, match=r"which is no metric \(known: exact_match, wer"):
        check_names(["zzz"], "--metrics")
    with pytest.raises(ValueError, match="--metrics names no metric"):
        check_names([], "--metrics")


def test_a_set_of_one_caption_has_no_cider(tmp_path):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog"}]
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=r"set\.jsonl: cider compares samples of a set with each other"):
        read_set(str(file), DataConfig(train="x"), ["cider"], None)


def test_an_answer_that_is_not_to_be_learned_is_no_reference(tmp_path):
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "nobody", "weight": 0}]
    file = tmp_path / "set.jsonl"
    read = lambda: read_set(str(file), DataConfig(train="x"), ["exact_match"], None)
    file.write_text(json.dumps({"messages": turns, "answers": ["a friend"]}))
    assert references(read()[0]) == ["a friend"]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=r"set\.jsonl:1: its last turn is marked as not to be learned"):
        read()


def test_duplex_models_answer_no_questions():
    duplex = DuplexConfig(pad_token="a", begin_token="b", end_token="c")
    with pytest.raises(ValueError, match=r"set train\.validate_answers=0, and let it listen"):
        read_set("set.jsonl", DataConfig(train="x", duplex=duplex), [], None)


CAPTIONS = [
    ["A man in black speaks while water runs.", "A man is speaking; water flows."],
    ["A dog barks, and a car passes by."],
    ["A girl sings and plays the guitar on the stage.", "A young girl is singing on a stage."],
    ["A man plays the guitar."],
]


def cider_d(answer: str, references: list[str], corpus: list[list[str]]) -> float:
    """The formula of Vedantam et al. 2015, section 4, for texts that are words already."""

    def grams(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for n in range(1, 5):
        in_how_many = Counter(gram for texts in corpus for gram in set().union(*(grams(text, n) for text in texts)))
        rarity = {gram: math.log(len(corpus) / count) for gram, count in in_how_many.items()}
        rare = math.log(len(corpus))
        ours, *others = (
            {gram: count * rarity.get(gram, rare) for gram, count in grams(text, n).items()}
            for text in (answer, *references)
        )
        norm = lambda vector: math.sqrt(sum(x * x for x in vector.values()))
        for reference, theirs in zip(references, others):
            dot = sum(min(x, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, x in ours.items())
            length = len(answer.split()) - len(reference.split())
            cosine = dot / (norm(ours) * norm(theirs)) if norm(ours) * norm(theirs) else 0.0
            scores.append(10 * cosine * math.exp(-(length**2) / (2 * 6**2)) / len(references))
    return sum(scores) / 4


def test_cider_is_that_of_its_paper():
    answers = [
        "A man speaks while water runs!",
        "a dog barks",
        "A girl plays the guitar on the stage, singing.",
        "a car",
    ]
    plain = lambda text: text.lower().translate(str.maketrans("", "", ".,;!"))
    corpus = [[plain(text) for text in texts] for texts in CAPTIONS]
    found = score_samples("cider", answers, CAPTIONS)
    expected = [cider_d(plain(answer), texts, corpus) for answer, texts in zip(answers, corpus)]
    assert [score for score, _ in found] == pytest.approx(expected) and min(expected[:3]) > 0.5
    assert total(found) == pytest.approx(sum(expected) / 4), "every sample weighs the same"
    some = score_samples("cider", [None, *answers[1:3], None], CAPTIONS)
    assert some == [None, *found[1:3], None], "the references of the whole set weigh the words"
    same = score_samples("cider", [texts[0] for texts in CAPTIONS], [texts[:1] for texts in CAPTIONS])
    assert same[1][0] == pytest.approx(10.0), "the reference itself"


def test_captions_are_cut_into_the_words_of_the_penn_treebank():
    assert words('He said: "don\'t stop (now)" -- T-shirts, $5...') == "he said do n't stop now t-shirts $ 5"


def test_a_metric_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cider needs the package pycocoevalcap .*: pip install pycocoevalcap==1\.2"):
        check_names(["wer", "cider"], "--metrics")
