"""Answers token by token."""

import dataclasses
import functools
import math

import pytest
import torch
import transformers
from torch.fx.experimental.proxy_tensor import make_fx

from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import InitFrom
from avlm.data.media.patches import cut_into_patches
from avlm.data.positions import Placed, of_grid, positions
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.decoding import Decoding, choose
from avlm.evaluation.generation import Ranks, draws, generate, prompt_phase, steps
from avlm.evaluation.kept_cache import KeptCache, labels_of
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, IMAGE
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.models.handmade import build, save
from tests.models.sharded_load import text_prompt
from tests.models.test_avlm import DECODER, WHOLE, llava
from tests.parallel import small

TEXT = ModelConfig(decoder=DECODER)


def prompt(
    token_ids: list[int], images: list[torch.Tensor] = (), position_T: torch.Tensor | None = None
) -> EncodedSample:
    token_T = torch.tensor(token_ids, dtype=torch.int64)
    media = {"image": list(images)}
    return EncodedSample("prompt", "text", token_T, torch.full_like(token_T, IGNORE), media, position_T)


def load_folder(folder, entry: str) -> AVLM:
    config = read_config(folder)
    model = AVLM(config if isinstance(config, ModelConfig) else ModelConfig(decoder=config))
    load_weights(model, InitFrom(**{entry: str(folder)}))
    return model


SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"vocab_size": 97, "num_key_value_heads": 2}
MODELS = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen2 with a window in the last layer": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "mistral with a window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=8)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_equal_those_of_transformers_token_for_token(name, tmp_path):
    theirs = MODELS[name]()
    save(theirs, tmp_path)
    ours = load_folder(tmp_path, "decoder")
    prompts = [torch.randint(97, (length,)).tolist() for length in (3, 17, 9)]
    answers = generate(ours, [prompt(ids) for ids in prompts], stop_ids=[], max_new_tokens=24)
    for ids, answer in zip(prompts, answers):
        out = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert answer.token_ids == out.sequences[0, len(ids) :].tolist()
        logprobs = torch.stack(out.logits, 1).log_softmax(-1)[0].gather(-1, out.sequences[0, len(ids) :, None])[:, 0]
        assert (torch.tensor(answer.logprobs) - logprobs).abs().max() < 1e-4


def test_greedy_answers_of_llava_equal_those_of_transformers(tmp_path):
    theirs = llava()
    save(theirs, tmp_path)
    ours = load_folder(tmp_path, "all")
    pixels = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    vision = ours.config.vision
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.mean, vision.std))
    ids = [1, *[IMAGE] * 9, 5, 6, *[IMAGE] * 9, 7]
    images = [cut_into_patches(image[None], vision) for image in pixels]
    [answer] = generate(ours, [prompt(ids, images)], stop_ids=[], max_new_tokens=16)
    out = theirs.generate(
        input_ids=torch.tensor([[60 if i == IMAGE else i for i in ids]]),
        pixel_values=(pixels / 255 - mean) / std,
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer.token_ids == out[0, -16:].tolist()


def test_an_answer_equals_one_made_without_a_cache():
    model = build(TEXT)
    ids = torch.randint(61, (9,)).tolist()
    [answer] = generate(model, [prompt(ids)], stop_ids=[], max_new_tokens=12)
    for i, token in enumerate(answer.token_ids):
        [fresh] = generate(model, [prompt(ids + answer.token_ids[:i])], stop_ids=[], max_new_tokens=1)
        assert fresh.token_ids == [token] and math.isclose(fresh.logprobs[0], answer.logprobs[i], abs_tol=1e-4)


DEEP = small.make_config(model=small.MODELS["deep"]).model  # images of any grid, M-RoPE, DeepStack
IMAGES = [torch.randint(256, (*grid, DEEP.vision.patch_numbers), dtype=torch.uint8) for grid in ((4, 6), (8, 2))]


def with_images(*parts: int | torch.Tensor) -> EncodedSample:
    """A prompt of tokens and images."""
    ids, images, placed = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        lines, columns = part.shape[0] // 2, part.shape[1] // 2
        placed.append(Placed(len(ids), of_grid([0], lines, columns)))
        ids += [IMAGE] * (lines * columns)
        images.append(part)
    return prompt(ids, images, positions(len(ids), placed))


def test_new_tokens_continue_the_positions_of_images():
    model = build(DEEP)
    asked = [(1, *IMAGES, 2, 3), (4, 5, IMAGES[1], 6), (7, 8, 9)]
    answers = generate(model, [with_images(*parts) for parts in asked], stop_ids=[], max_new_tokens=12)
    for i in range(12):
        fresh = [with_images(*parts, *answer.token_ids[:i]) for parts, answer in zip(asked, answers)]
        for found, answer in zip(generate(model, fresh, stop_ids=[], max_new_tokens=1), answers):
            assert found.token_ids == answer.token_ids[i : i + 1]
            assert math.isclose(found.logprobs[0], answer.logprobs[i], abs_tol=1e-4)


def test_a_conversation_whose_cache_is_kept_continues_the_positions_of_images():
    model = build(DEEP)
    kept = KeptCache(model)
    said = []
    for new in ((1, IMAGES[0], 2), (7, 8, 9), (3, IMAGES[1], 4)):
        said += new
        asked = with_images(*said)
        [whole] = generate(model, [asked], stop_ids=[], max_new_tokens=6)
        found = [token for [[token]] in steps(model, [asked], max_new_tokens=6, kept=kept)]
        assert [token for token, _ in found] == whole.token_ids
        assert [logprob for _, logprob in found] == pytest.approx(whole.logprobs, abs=1e-5)
        said += whole.token_ids


def test_media_of_equal_bytes_in_another_grid_or_at_another_time_are_not_taken_for_the_same():
    vision = VisionConfig(
        **{"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "feature_layer": -1},
        **{"patch_size": 2, "resize": "area", "class_token": False, "pre_norm": False},
    )
    decoder = dataclasses.replace(DECODER, mrope_sections=[1, 1, 2])
    config = ModelConfig(decoder=decoder, vision=vision, vision_projector=ProjectorConfig())
    patches, at = torch.zeros(2, 3, 12, dtype=torch.uint8), torch.arange(8).repeat(3, 1)
    first = prompt([1, *[IMAGE] * 6, 2], [patches], at)
    turned = prompt([1, *[IMAGE] * 6, 2], [patches.view(3, 2, 12)], at)
    later = prompt([1, *[IMAGE] * 6, 2], [patches], at + torch.tensor([[3], [0], [0]]))
    labels, *others = (labels_of(asked, config) for asked in (first, turned, later))
    assert labels == labels_of(prompt([1, *[IMAGE] * 6, 2], [patches.clone()], at), config)
    for other in others:
        assert other[1] != labels[1] and (other[0], other[7]) == (labels[0], labels[7]) == (1, 2)


WINDOWED = dataclasses.replace(DECODER, sliding_window=8)


@pytest.mark.parametrize("config", [WHOLE, ModelConfig(decoder=WINDOWED)], ids=["with images", "with a window"])
def test_a_conversation_whose_cache_is_kept_answers_as_one_that_is_run_at_once(config):
    """Turns that continue, one whose earlier turn has changed, and one that says the last again: only what is new is
    run, and its tokens are those of the whole."""
    model = build(config)
    kept = KeptCache(model)
    lengths = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    images = list(torch.randint(256, (2, 4, 4, 3 * 4 * 4), dtype=torch.uint8))
    picture = placeholders("image", images[:1], config) if config.vision else []
    ids = [1, *picture, 5, 6]
    for turn, expected in enumerate((len(ids), 1 + 4 + len(picture), 1 + 4, 4 + 1, 1)):
        asked = prompt(ids, images[: ids.count(IMAGE) // max(1, len(picture))])
        [whole] = generate(model, [asked], stop_ids=[], max_new_tokens=6)
        lengths.clear()
        found = [token for [[token]] in steps(model, [asked], max_new_tokens=6, kept=kept)]
        assert [token for token, _ in found] == whole.token_ids
        assert [logprob for _, logprob in found] == pytest.approx(whole.logprobs, abs=1e-5)
        assert lengths == [expected, *[1] * 5]
        answer = whole.token_ids
        if turn == 0:
            ids = [*ids, *answer, *picture, 7, 8, 9, 10]
        if turn == 1:
            ids = [*ids, *answer, 7, 8, 9, 10]
        if turn == 2:
            ids = [*ids[:-4], *ids[-4:][::-1], 3]  # another end


def test_an_answer_ends_with_its_stop_token_and_the_others_go_on():
    model = build(TEXT)
    prompts = [prompt(torch.randint(61, (length,)).tolist()) for length in (4, 11)]
    free = generate(model, prompts, stop_ids=[], max_new_tokens=10)
    stop = next(token for token in free[0].token_ids if token not in free[1].token_ids)
    stopped = generate(model, prompts, stop_ids=[stop], max_new_tokens=10)
    end = free[0].token_ids.index(stop) + 1
    assert stopped[0].token_ids == free[0].token_ids[:end] and stopped[1].token_ids == free[1].token_ids


@pytest.mark.parametrize("read_every", [3, 8, 100])
def test_completions_do_not_depend_on_how_often_tokens_are_read(read_every):
    model = build(TEXT)
    prompts = [prompt(torch.randint(61, (length,)).tolist()) for length in (4, 11, 2)]
    settings = {"max_new_tokens": 14, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}
    free = generate(model, prompts, stop_ids=[], **settings)
    stops = [free[0].token_ids[4], free[1].token_ids[8]]
    for every in (1, read_every):
        answers = generate(model, prompts, stop_ids=stops, read_every=every, **settings)
        for whole, answer in zip(free, answers):
            end = next((i + 1 for i, token in enumerate(whole.token_ids) if token in stops), len(whole.token_ids))
            assert answer.token_ids == whole.token_ids[:end] and answer.logprobs == whole.logprobs[:end]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_that_is_recorded_once_and_repeated_gives_the_same_tokens(temperature):
    """What a CUDA graph does, with a graph of operators: numbers of the host and addresses of tensors are fixed."""
    model = build(DEEP)
    prompts = [with_images(1, IMAGES[0], 3), text_prompt([4, 5])]
    expected = generate(model, prompts, stop_ids=[], max_new_tokens=12, temperature=temperature, seed=2)

    batch, slots = prompt_phase(prompts, model, 12, Ranks(torch.device("cpu")))
    chosen = functools.partial(choose, temperature=temperature, top_k=0, top_p=1.0)
    decoding = Decoding(model, slots, draws(2, 12, seed=2), chosen)
    with torch.no_grad():
        decoding.prompt(batch)
        decoding.step()
        changed = (decoding.token_NB, decoding.logprob_NB, decoding.count_1, slots.length_B)
        before = [tensor.clone() for tensor in changed]
        steps = make_fx(lambda: decoding.step())()  # recording runs the step, which a CUDA graph does not
        for tensor, value in zip(changed, before):
            tensor.copy_(value)
        for _ in range(10):
            steps()
    of_steps = decoding.read(0, 12)
    for i, answer in enumerate(expected):
        assert [step[i][0] for step in of_steps] == answer.token_ids
        assert [step[i][1] for step in of_steps] == answer.logprobs


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cuda_graph_of_the_step_gives_the_tokens_of_steps_that_are_launched(temperature):
    model = build(WHOLE).to("cuda", torch.bfloat16)
    prompts = [text_prompt([1, 2, 3]), text_prompt([4, 5])]
    settings = {"stop_ids": [], "max_new_tokens": 40, "temperature": temperature, "top_k": 30, "top_p": 0.9}
    launched = generate(model, prompts, ranks=Ranks(torch.device("cuda")), **settings)
    assert generate(model, prompts, **settings) == launched


def test_a_sequence_draws_the_numbers_of_its_own_seed():
    for i in range(2):
        generator = torch.Generator().manual_seed(7 + i)
        one_by_one = [torch.rand((), generator=generator).item() for _ in range(40)]
        assert draws(2, 40, seed=7)[:, i].tolist() == one_by_one


def test_ranks_stop_together_and_one_without_prompts_keeps_step():
    model = build(WHOLE)
    asked = []

    def everyone_done(mine: bool) -> bool:
        asked.append(mine)
        return len(asked) == 3

    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert generate(model, [], stop_ids=[], max_new_tokens=10, ranks=Ranks(torch.device("cpu"), everyone_done)) == []
    assert asked == [True] * 3 and len(forwards) == 3


def test_seeds_repeat_and_batch_mates_do_not_matter():
    model = build(TEXT)
    ids = [torch.randint(61, (length,)).tolist() for length in (5, 8)]
    settings = {"stop_ids": [], "max_new_tokens": 12, "temperature": 1.0}
    first = generate(model, [prompt(i) for i in ids], seed=3, **settings)
    again = generate(model, [prompt(i) for i in ids], seed=3, **settings)
    alone = generate(model, [prompt(ids[1])], seed=4, **settings)
    other = generate(model, [prompt(i) for i in ids], seed=5, **settings)
    assert first == again and first != other
    assert alone[0].token_ids == first[1].token_ids


def test_sampling_follows_temperature_top_k_and_top_p():
    probability = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probability.log().expand(4000, -1)
    draw = torch.linspace(0, 1, 4001)[:-1]
    share = lambda **settings: torch.bincount(choose(logits, draw_B=draw, **settings)[0], minlength=4).double() / 4000
    close = lambda a, b: torch.allclose(a, torch.tensor(b, dtype=torch.float64), atol=1e-3)
    assert close(share(temperature=1.0, top_k=0, top_p=1.0), [0.1, 0.4, 0.2, 0.3])
    assert close(share(temperature=1.0, top_k=2, top_p=1.0), [0, 4 / 7, 0, 3 / 7])
    assert close(share(temperature=1.0, top_k=0, top_p=0.6), [0, 4 / 7, 0, 3 / 7])
    assert close(share(temperature=1.0, top_k=0, top_p=0.01), [0, 1, 0, 0])
    sharp = probability**2 / (probability**2).sum()
    assert close(share(temperature=0.5, top_k=0, top_p=1.0), sharp.tolist())
    token, logprob = choose(logits, draw, temperature=0.5, top_k=0, top_p=1.0)
    assert torch.allclose(logprob, probability.log()[token])  # before temperature


def test_towers_run_for_the_prompt_only():
    model = build(WHOLE)
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append(1))
    generate(model, [text_prompt([1, 2])], stop_ids=[], max_new_tokens=5)
    assert len(calls) == 1


def test_bad_settings_are_refused():
    model = build(TEXT)
    with pytest.raises(ValueError, match="max_position"):
        generate(model, [prompt([1] * 250)], stop_ids=[], max_new_tokens=10)
    with pytest.raises(ValueError, match="top_p=0"):
        generate(model, [prompt([1])], stop_ids=[], max_new_tokens=10, top_p=0)
