"""CIDEr-D of captions (Vedantam et al. 2015), as those of COCO are scored.

For n-grams of n = 1 to 4, an answer and each reference are vectors of counts times
ln(samples / samples whose references have the n-gram). The score is 10 times their clipped cosine, damped by the
difference in length, averaged over n and the references. pycocoevalcap computes it. Java, which that package needs for
the tokenizer of COCO, is not: NLTK's version of the same Penn Treebank tokenizer cuts captions into words, in lower
case and without punctuation.
"""

import importlib.util

# What pycocoevalcap leaves out of captions, and the quotes and brackets as NLTK writes them.
PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;(){}[]", "--", "..."}


def check_installed() -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError("the metric cider needs the package pycocoevalcap (100 MB): pip install pycocoevalcap==1.2")


def scores(answers: list[str | None], references: list[list[str]]) -> list[float | None]:
    """Of each sample of a set, None for one without an answer. All are 0 for a single sample, none of whose n-grams is
    rarer than another."""
    check_installed()
    from pycocoevalcap.cider.cider import Cider  # an optional package

    truths = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    given = {i: [words(answer or "")] for i, answer in enumerate(answers)}
    _, found = Cider().compute_score(truths, given)
    return [None if answer is None else float(score) for answer, score in zip(answers, found)]


def words(caption: str) -> str:
    from nltk.tokenize.treebank import TreebankWordTokenizer  # half a second to import

    cut = TreebankWordTokenizer().tokenize(" ".join(caption.split()).lower())
    return " ".join(word for word in cut if word not in PUNCTUATION)
