"""llama.cpp as an engine: answers of the GGUF files of an exported folder, one sample after the other.

From the template's text on a prompt is llama.cpp's own: its tokenizer, its reading and cutting of media, its encoders
and its decoding, through the bindings of llama-cpp-python to libmtmd. Control tokens are read where the template and
the markers have them, and in no text of a sample.
"""

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.sample import Sample
from avlm.data.text.chat import Chat
from avlm.data.text.pieces import MEDIA
from avlm.data.text.tokenizer import Tokenizer
from avlm.weights.folder import stop_ids
from avlm.weights.gguf import spelled_markers
from avlm.weights.gguf_files import MODEL, PROJECTORS

BATCH = 512  # tokens that llama.cpp runs at a time

Part = tuple[str, bool] | bytes  # a text and whether control tokens are read in it, or the file of a medium


def library() -> tuple[Any, Any]:
    """The functions of llama.cpp and those of libmtmd, silenced."""
    try:
        import llama_cpp  # optional: built from source, and only this engine needs it
        from llama_cpp import mtmd_cpp
    except ImportError as error:
        raise ValueError(
            f"the engine llama_cpp needs llama-cpp-python: pip install llama-cpp-python==0.3.36 ({error})"
        ) from None
    for set_log in (llama_cpp.llama_log_set, mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        set_log(_quiet(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp, mtmd_cpp


@functools.cache  # llama.cpp calls it as long as the process lives
def _quiet(llama_cpp: Any) -> Any:
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class Engine:
    """ValueError or FileNotFoundError, with one line, for files that llama.cpp cannot load and media that it cannot
    read.

    ``tolerance``: nats by which our log probabilities of the two tokens may differ where answers part. llama.cpp reads
    GELU from a table of float16, in the tanh form in its vision projector, and rounds what it convolves and keeps in
    its cache to float16.
    """

    tolerance: float = 0.1

    def __init__(self, folder: Path, data: DataConfig, model: ModelConfig) -> None:
        self.llama, self.mtmd = library()
        if not (folder / MODEL).is_file():
            raise FileNotFoundError(f"no {MODEL} in {folder}: export with --format gguf")
        self.chat = Chat(Tokenizer(folder), data.template, data.system, published=True)
        self.stop_ids = stop_ids(folder)
        self.markers = spelled_markers(model, data)
        self.model = self.llama.llama_model_load_from_file(
            str(folder / MODEL).encode(), self.llama.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {folder / MODEL}")
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.projectors = None
        if len(model.modules) > 1:
            options = self.mtmd.mtmd_context_params_default()
            options.warmup = False
            self.projectors = self.mtmd.mtmd_init_from_file(str(folder / PROJECTORS).encode(), self.model, options)
            if not self.projectors:
                raise ValueError(f"llama.cpp cannot load {folder / PROJECTORS}")

    def answer(self, samples: list[Sample], max_new_tokens: int) -> list[list[int]]:
        """Greedy ids of the answer to each sample's conversation up to its last turn, without the id that ends it."""
        found = []
        for sample in samples:
            try:
                found.append(self._answer(list(self._parts(sample)), max_new_tokens))
            except ValueError as error:
                raise ValueError(f"{sample.key}: {error}") from None
        return found

    def _parts(self, sample: Sample) -> Iterator[Part]:
        """What stands in the prompt, in its order."""
        files = {"image": iter(sample.images), "audio": iter(sample.audios)}
        if sample.videos:
            raise ValueError("the engine llama_cpp answers no questions about videos")
        numbers = dict.fromkeys(MEDIA, 0)
        for piece in self.chat.pieces(sample.messages[:-1], prompt=True):
            if piece.kind not in MEDIA:
                yield piece.text, piece.kind != "text"
                continue
            numbers[piece.kind] += 1
            before, after = (
                marker.replace("{n}", str(numbers[piece.kind])) for marker in self.markers.get(piece.kind, ["", ""])
            )
            yield before, True
            yield next(files[piece.kind])
            yield after, True

    def _answer(self, parts: list[Part], max_new_tokens: int) -> list[int]:
        if self.projectors is None:
            tokens = [token for text, control in parts for token in self.tokens(text, control)]
            context = self._open_context(len(tokens) + max_new_tokens)
            try:
                for start in range(0, len(tokens), BATCH):
                    self._run(context, tokens[start : start + BATCH])
                return self._continued(context, max_new_tokens)
            finally:
                self.llama.llama_free(context)
        chunks = self.mtmd.mtmd_input_chunks_init()
        try:
            self.cut(parts, chunks)
            context = self._open_context(self.mtmd.mtmd_helper_get_n_tokens(chunks) + max_new_tokens)
            try:
                end = self.llama.llama_pos(0)
                failed = self.mtmd.mtmd_helper_eval_chunks(
                    self.projectors, context, chunks, 0, 0, BATCH, True, ctypes.byref(end)
                )
                if failed:
                    raise ValueError("llama.cpp cannot run the prompt")
                return self._continued(context, max_new_tokens)
            finally:
                self.llama.llama_free(context)
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)

    def tokens(self, text: str, control: bool) -> list[int]:
        """llama.cpp's ids of a text. ``control``: control tokens are read."""
        encoded = text.encode()
        room = len(encoded) + 8
        ids = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(self.vocabulary, encoded, len(encoded), ids, room, False, control)
        return list(ids[:count])

    def cut(self, parts: list[Part], chunks: Any) -> None:
        """Put what llama.cpp makes of texts and files into its ``chunks``: tokens, pixels and windows."""
        mtmd = self.mtmd
        bitmaps, inputs = [], []
        try:
            for part in parts:
                if isinstance(part, bytes):
                    content = (ctypes.c_uint8 * len(part)).from_buffer_copy(part)
                    bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(self.projectors, content, len(part), False)
                    if not bitmap:
                        raise ValueError(
                            "llama.cpp cannot read a file: it takes JPEG, PNG, BMP and GIF, WAV, MP3 and FLAC"
                        )
                    bitmaps.append(bitmap)
                    inputs.append(mtmd.mtmd_input_part(None, bitmap))
                elif part[0]:
                    text, control = part
                    content = text.encode()
                    told = mtmd.mtmd_input_text(content, len(content), False, control)
                    inputs.append(mtmd.mtmd_input_part(ctypes.pointer(told), None))
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(inputs))(*map(ctypes.pointer, inputs))
            if mtmd.mtmd_tokenize_from_parts(self.projectors, chunks, pointers, len(inputs), False):
                raise ValueError("llama.cpp cannot make a prompt of the media")
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)

    def _open_context(self, tokens: int) -> Any:
        options = self.llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = tokens, BATCH, BATCH
        context = self.llama.llama_init_from_model(self.model, options)
        if not context:
            raise ValueError(f"llama.cpp cannot open a context of {tokens:,} tokens")
        return context

    def _run(self, context: Any, tokens: list[int]) -> None:
        ids = (self.llama.llama_token * len(tokens))(*tokens)
        if self.llama.llama_decode(context, self.llama.llama_batch_get_one(ids, len(tokens))):
            raise ValueError("llama.cpp cannot run the prompt")

    def _continued(self, context: Any, max_new_tokens: int) -> list[int]:
        size = self.llama.llama_vocab_n_tokens(self.vocabulary)
        found: list[int] = []
        while len(found) < max_new_tokens:
            logits = np.ctypeslib.as_array(self.llama.llama_get_logits_ith(context, -1), (size,))
            token = int(logits.argmax())
            if token in self.stop_ids:  # llama.cpp itself also ends at others that it knows by their names
                break
            found.append(token)
            self._run(context, [token])
        return found
