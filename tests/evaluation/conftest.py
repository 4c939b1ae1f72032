"""A tokenizer and an exported model, made on the spot."""

import dataclasses
import json

import pytest
import tokenizers

from avlm.config.run import DataConfig
from avlm.weights.export import export
from tests.models.handmade import build
from tests.models.test_avlm import DECODER, WHOLE

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer with chatml control tokens: every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    keys["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture(scope="module")
def exported(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, vocab_size=260))
    data = DataConfig(train="", tokenizer=str(tokenizer_folder), template="chatml")
    export(config, build(config).state_dict(), folder, data=data)
    return folder
