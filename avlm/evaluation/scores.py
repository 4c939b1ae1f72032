"""How a generated answer is scored against its references.

    exact_match    1 if it equals a reference
    wer, cer       words or characters to edit, per word or character of the reference, in a normal form
    rouge_l        F1 of the longest common subsequence of words (Lin 2004), words not stemmed
    vqa_accuracy   ten people answered: min(1, others who say it / 3), averaged over leaving each of them out
                   (Antol et al. 2015; visualqa.org/evaluation)

Of several references the one that is best for the answer counts, but for vqa_accuracy. A score is a fraction (part,
whole); that of a set is the sum of the parts over the sum of the wholes, so that long transcripts weigh more.

Normal forms: ``english`` is Whisper's (Radford et al. 2022, appendix C). It writes numbers as digits and joins them,
"three five one" is the one word "351"; and it drops accents and the vowel signs of other scripts. ``basic`` is
Whisper's for other languages but keeps letters with their marks: small letters, and blanks for punctuation. wer and cer
choose one for a set by its references: basic where one word in a hundred or more has a letter beyond a to z, unless it
is a lone loanword. wer_english, wer_basic, cer_english and cer_basic say which. Scripts that put no blanks between
words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) want cer; there blanks between their letters do not count.
"""

import difflib
import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from avlm.config.run import DataConfig
from avlm.data.loader import open_samples
from avlm.data.sample import Sample

Score = tuple[float, float]
MANY_WORDS = 100  # of references; one foreign word in so many makes a set foreign
# A blank between letters of scripts that write none: Thai, Lao, Burmese, Khmer, kana, Han and what marks them.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
UNSPACED += "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
UNSPACED_BLANK = re.compile(f"(?<=[{UNSPACED}])\\s+(?=[{UNSPACED}])|^\\s+|\\s+$")
VQA_ANSWERS = 10  # of different people to a question
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VQA_NUMBERS = "zero one two three four five six seven eight nine ten"
VQA_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(VQA_NUMBERS.split())}
VQA_ARTICLES = ("a", "an", "the")
# Of these a form that lacks one apostrophe counts as the whole: what vqaEval.py (github.com/GT-Vision-Lab/VQA) lists.
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
    form = lambda text: UNSPACED_BLANK.sub("", basic_form(text))
    return _nearest(jiwer.process_characters, form, answer, references)


def rouge_l(answer: str, references: list[str]) -> Score:
    return _rouge_scorer().score_multi(references, answer)["rougeL"].fmeasure, 1.0


def vqa_accuracy(answer: str, references: list[str]) -> Score:
    """ValueError without just ten references."""
    if len(references) != VQA_ANSWERS:
        raise ValueError(f"vqa_accuracy wants {VQA_ANSWERS} answers of different people, not {len(references)}")
    answer, said = vqa_form(answer), [vqa_form(reference) for reference in references]
    others = [said.count(answer) - (reference == answer) for reference in said]
    return sum(min(1.0, count / 3) for count in others) / len(others), 1.0


FORMS = (wer_english, wer_basic, cer_english, cer_basic)
METRICS = {
    function.__name__: function for function in (exact_match, wer, cer, rouge_l, vqa_accuracy, *FORMS)
}  # name -> Score of (answer, references)
LOWER_IS_BETTER = ("loss", "wer", "cer", *(function.__name__ for function in FORMS))


def scorer(metric: str, pairs: list[tuple[str, list[str]]]) -> Callable[[str, list[str]], Score]:
    """The function of a metric for a set of (answer, references): wer and cer in one form for all of it, which the
    references choose alone, so that a model's mistakes change no form.

    One foreign word among ten or more is no proof of another language, and fewer than MANY_WORDS words without one are
    no proof of English. In such sets the form is English, with letters that keep their marks: "schön" is no "schon",
    and numbers and spellings are compared as in English all the same.
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
    return functools.partial(_with_marks, jiwer.process_words if metric == "wer" else jiwer.process_characters)


def value(score: Score) -> float | None:
    """Of one sample; None where its references hold nothing to compare with."""
    part, whole = score
    return part / whole if whole else None


def total(scores: Iterable[Score]) -> float:
    """The score of a set; NaN where its references hold nothing to compare with."""
    part, whole = (sum(column) for column in zip(*scores))
    return part / whole if whole else math.nan


def check_names(names: list[str], origin: str) -> None:
    """Raise ValueError for a name that is no metric, with the nearest one, and for none at all."""
    if not names:
        raise ValueError(f"{origin} names no metric: give some of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
            raise ValueError(f"{origin} names {name!r}, which is no metric ({hint})")


def read_set(source: str, data: DataConfig, metrics: list[str], limit: int | None) -> list[Sample]:
    """The first samples of a set, each with a question, its answer and the references that the metrics want.
    ValueError with the sample's key where one has not, and for an empty set."""
    samples = list(itertools.islice(open_samples(source, data), limit))
    if not samples:
        raise ValueError(f"{source} holds no samples to evaluate")
    for sample in samples:
        last = sample.messages[-2:]
        if [turn["role"] for turn in last] != ["user", "assistant"] or not isinstance(last[-1]["content"], str):
            raise ValueError(f"{source}, {sample.key}: its last two turns must be a user's and an assistant's text")
        if not sample.answers and not last[-1].get("learn", True):
            raise ValueError(
                f"{source}, {sample.key}: its last turn is marked as one not to be learned: it is no reference"
            )
        if "vqa_accuracy" in metrics and len(sample.answers) != VQA_ANSWERS:
            raise ValueError(
                f'{source}, {sample.key}: vqa_accuracy wants {VQA_ANSWERS} texts under "answers", '
                f"one of each person asked, and there are {len(sample.answers) or 'none'}"
            )
    return samples


def references(sample: Sample) -> list[str]:
    return sample.answers or [sample.messages[-1]["content"].strip()]


def vqa_form(text: str) -> str:
    """The form in which answers are compared: no punctuation and articles, numbers to ten as digits, contractions with
    their apostrophes.

    The same as vqaEval.py's (of 2017, which compares texts as they are where all ten agree; here none are).
    """
    text = " ".join(text.split())
    has_number = re.search(r"\d,\d", text)  # 1,000: nothing takes the place of punctuation
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
    """Small letters with their marks, one blank for punctuation and symbols, without [...] and (...)."""
    return _basic_normalizer()(unicodedata.normalize("NFKC", text)).strip()


def _foreign_letters(text: str) -> set[str]:
    """Letters and marks beyond a to z, but for other shapes of these, such as the wide ones of East Asia."""
    found = {c for c in text if ord(c) > 127 and unicodedata.category(c)[0] in "LM"}
    return {c for c in found if not unicodedata.normalize("NFKC", c).isascii()}


def _with_marks(process: Callable, answer: str, references: list[str]) -> Score:
    """In the English form, but for letters beyond a to z, which stay different from all others. In their place stand
    ideographs, which Whisper's form leaves as they are."""
    plain = lambda text: unicodedata.normalize("NFC", text.lower())
    letters = sorted(set().union(*(_foreign_letters(plain(text)) for text in (answer, *references))))
    stand_ins = {ord(letter): chr(0x20000 + i) for i, letter in enumerate(letters)}
    return _nearest(process, lambda text: english_normalizer()(plain(text).translate(stand_ins)), answer, references)


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer  # half a second, and only for this

    # Its own knows a to z alone, and \w no vowel signs.
    is_part = lambda c: c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M"
    spaced = lambda text: "".join(c if is_part(c) else " " for c in unicodedata.normalize("NFC", text.lower()))
    words = SimpleNamespace(tokenize=lambda text: spaced(text).split())
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=words)


def _nearest(process: Callable, normal: Callable[[str], str], answer: str, references: list[str]) -> Score:
    """(edits, length) of the reference with the fewest edits for its length."""
    counts = [process(normal(reference), normal(answer)) for reference in references]
    scores = [(c.substitutions + c.deletions + c.insertions, c.hits + c.substitutions + c.deletions) for c in counts]
    return min(scores, key=lambda score: score[0] / max(score[1], 1))
