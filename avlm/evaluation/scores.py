"""How a generated answer is scored against its references.

    exact_match    1 if the answer equals a reference
    wer, cer       edited words or characters, per word or character of the reference, after normalisation
    rouge_l        F1 of the longest common subsequence of words (Lin 2004), without stemming
    cider          consensus with the references, weighted by how rare n-grams are (avlm.evaluation.cider); 1 is 100 in
                   papers, and it may be larger
    vqa_accuracy   min(1, people who gave this answer / 3), averaged over leaving each of ten people out
                   (Antol et al. 2015; visualqa.org/evaluation)

With several references the best-scoring one counts, except for vqa_accuracy and cider. A score is a fraction (part,
whole). The score of a set is the sum of the parts over the sum of the wholes, so that long transcripts weigh more.

Normalisation: ``english`` is Whisper's (Radford et al. 2022, appendix C). It writes numbers as joined digits ("three
five one" is the one word "351"), and drops accents and the vowel signs of other scripts. ``basic`` is Whisper's for
other languages, except that letters keep their marks: lower case, and spaces for punctuation. wer and cer choose one
form for a whole set by its references: basic if at least one word in a hundred has a letter beyond a to z, unless all
of those are one loanword. wer_english, wer_basic, cer_english and cer_basic fix the form. Scripts without spaces
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) call for cer, which ignores spaces between their letters.
"""

import difflib
import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from avlm.evaluation import cider

Score = tuple[float, float]
MANY_WORDS = 100  # one foreign word in this many words of references makes a set foreign
# Scripts that write no space between words: Thai, Lao, Burmese, Khmer, kana, Han and their marks.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
UNSPACED += "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
UNSPACED_BLANK = re.compile(f"(?<=[{UNSPACED}])\\s+(?=[{UNSPACED}])|^\\s+|\\s+$")
VQA_ANSWERS = 10  # people who answered each question
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VQA_NUMBERS = "zero one two three four five six seven eight nine ten"
VQA_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(VQA_NUMBERS.split())}
VQA_ARTICLES = ("a", "an", "the")
# A contraction written without one of its apostrophes counts as the contraction. The list is that of vqaEval.py
# (github.com/GT-Vision-Lab/VQA).
VQA_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""
VQA_WHOLE = {
    word[: found.start()] + word[found.end() :]: word
    for word in VQA_CONTRACTIONS.split()
    for found in re.finditer("'", word)
}


def exact_match(answer: str, references: list[str]) -> Score:
    return float(answer in references), 1.0


def wer(answer: str, references: list[str]) -> Score:
    return scorer("wer", [(answer, references)])(answer, references)


def cer(answer: str, references: list[str]) -> Score:
    return scorer("cer", [(answer, references)])(answer, references)


def wer_english(answer: str, references: list[str]) -> Score:
    return _nearest(jiwer.process_words, english_normalizer(), answer, references)


def wer_basic(answer: str, references: list[str]) -> Score:
    return _nearest(jiwer.process_words, basic_form, answer, references)


def cer_english(answer: str, references: list[str]) -> Score:
    return _nearest(jiwer.process_characters, english_normalizer(), answer, references)


def cer_basic(answer: str, references: list[str]) -> Score:
    def without_spaces(text: str) -> str:
        return UNSPACED_BLANK.sub("", basic_form(text))

    return _nearest(jiwer.process_characters, without_spaces, answer, references)


def rouge_l(answer: str, references: list[str]) -> Score:
    return _rouge_scorer().score_multi(references, answer)["rougeL"].fmeasure, 1.0


def vqa_accuracy(answer: str, references: list[str]) -> Score:
    """ValueError unless there are exactly ten references."""
    if len(references) != VQA_ANSWERS:
        raise ValueError(f"vqa_accuracy needs {VQA_ANSWERS} answers from different people, not {len(references)}")
    answer = vqa_form(answer)
    given = [vqa_form(reference) for reference in references]
    others = [given.count(answer) - (reference == answer) for reference in given]
    return sum(min(1.0, count / 3) for count in others) / len(others), 1.0


FIXED_FORMS = (wer_english, wer_basic, cer_english, cer_basic)
# name -> function of (answer, references), for the metrics that look at one sample at a time
METRICS = {function.__name__: function for function in (exact_match, wer, cer, rouge_l, vqa_accuracy, *FIXED_FORMS)}
NAMES = [*METRICS, "cider"]  # cider is a function of a whole set
LOWER_IS_BETTER = ["loss", "wer", "cer"] + [function.__name__ for function in FIXED_FORMS]


def scorer(metric: str, pairs: list[tuple[str, list[str]]]) -> Callable[[str, list[str]], Score]:
    """The function of a metric for a set of (answer, references). wer and cer use one form for the whole set; only the
    references choose it, so that a model's mistakes cannot change it.

    A single loanword among ten or more words does not prove another language, and fewer than MANY_WORDS words without
    a foreign letter do not prove English. Such sets use the English form but keep the marks of letters: "schön" differs
    from "schon", while numbers and spellings are compared as in English.
    """
    if metric not in ("wer", "cer"):
        return METRICS[metric]
    words = [word for _, references in pairs for text in references for word in text.split()]
    foreign = [word for word in words if _foreign_letters(word)]
    is_lone = len(set(map(str.lower, foreign))) == 1 and 10 * len(foreign) < len(words)
    if foreign and not is_lone and MANY_WORDS * len(foreign) >= len(words):
        return METRICS[f"{metric}_basic"]
    if len(words) >= MANY_WORDS and MANY_WORDS * len(foreign) < len(words):
        return METRICS[f"{metric}_english"]
    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    return functools.partial(_with_marks, process)


def score_samples(metric: str, answers: list[str | None], references: list[list[str]]) -> list[Score | None]:
    """The score of each sample of a set, None for one without an answer. The references of all of them choose the form
    of wer and cer, and weigh the n-grams of cider."""
    if metric == "cider":
        return [None if score is None else (score, 1.0) for score in cider.scores(answers, references)]
    function = scorer(metric, [("", truths) for truths in references])
    return [None if answer is None else function(answer, truths) for answer, truths in zip(answers, references)]


def value(score: Score) -> float | None:
    """The value of one sample; None if its references are empty after normalisation."""
    part, whole = score
    return part / whole if whole else None


def total(scores: Iterable[Score]) -> float:
    """The value of a set; NaN if its references are empty after normalisation."""
    parts, wholes = zip(*scores)
    part, whole = sum(parts), sum(wholes)
    return part / whole if whole else math.nan


def check_names(names: list[str], origin: str) -> None:
    """Raise ValueError for an empty list, for a name that is no metric, with the nearest one, and for a metric whose
    package is not installed."""
    if not names:
        raise ValueError(f"{origin} names no metric: give some of {', '.join(NAMES)}")
    for name in names:
        if name == "cider":
            cider.check_installed()
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NAMES)}"
            raise ValueError(f"{origin} names {name!r}, which is no metric ({hint})")


def vqa_form(text: str) -> str:
    """The form in which vqa_accuracy compares answers: no punctuation or articles, numbers up to ten as digits,
    contractions with their apostrophes.

    It is that of vqaEval.py (2017), but applied always: vqaEval.py compares raw texts if all ten people agree.
    """
    text = " ".join(text.split())
    has_number = re.search(r"\d,\d", text)  # as in 1,000: punctuation is dropped without a space
    cleaned = text
    for mark in VQA_PUNCTUATION:
        joins = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joins else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [VQA_DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(VQA_WHOLE.get(word, word) for word in words if word not in VQA_ARTICLES)


@functools.cache
def english_normalizer() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


@functools.cache
def _basic_normalizer() -> BasicTextNormalizer:
    return BasicTextNormalizer(preserve_marks=True)


def basic_form(text: str) -> str:
    """Lower case, letters with their marks, one space for punctuation and symbols, without [...] and (...)."""
    return _basic_normalizer()(unicodedata.normalize("NFKC", text)).strip()


def _foreign_letters(text: str) -> set[str]:
    """Letters and marks beyond a to z. Variants of a to z, such as full-width letters, do not count."""
    letters = {character for character in text if unicodedata.category(character)[0] in "LM"}
    return {letter for letter in letters if not unicodedata.normalize("NFKC", letter).isascii()}


def _with_marks(process: Callable, answer: str, references: list[str]) -> Score:
    """Score in the English form, but keep letters beyond a to z distinct: ideographs replace them, because Whisper's
    form leaves ideographs alone."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text.lower())

    letters = set()
    for text in [answer, *references]:
        letters |= _foreign_letters(plain(text))
    stand_ins = {ord(letter): chr(0x20000 + i) for i, letter in enumerate(sorted(letters))}

    def normal(text: str) -> str:
        return english_normalizer()(plain(text).translate(stand_ins))

    return _nearest(process, normal, answer, references)


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer  # takes half a second, and only this needs it

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=_words))


def _words(text: str) -> list[str]:
    """The words of any script. rouge_score's own tokenizer knows only a to z, and a regex's \\w lacks vowel signs."""
    text = unicodedata.normalize("NFC", text.lower())
    return "".join(character if _is_part_of_word(character) else " " for character in text).split()


def _is_part_of_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def _nearest(process: Callable, normal: Callable[[str], str], answer: str, references: list[str]) -> Score:
    """(edits, length) of the reference with the fewest edits for its length."""
    scores = []
    for reference in references:
        found = process(normal(reference), normal(answer))
        edits = found.substitutions + found.deletions + found.insertions
        length = found.hits + found.substitutions + found.deletions
        scores.append((edits, length))
    return min(scores, key=lambda score: score[0] / max(score[1], 1))
