"""A trainer for audio-vision language models; in Python: ``from avlm import load`` (docs/python.md)."""


def load(name, device="auto", dtype="auto", raw=False):
    """A trained model to ask: ``load("runs/demo").answer("What is this?", image="a.png")``.

    ``name`` and the rest are those of ``avlm.evaluation.answering.load``, which returns its ``Model``.
    """
    from avlm.evaluation.answering import load as load_model  # torch takes seconds, and every module imports this file

    return load_model(name, device, dtype, raw)
