"""Greedy answers of vLLM's Transformers backend next to those of transformers, token for token, of one exported folder:

    python tests/measurements/vllm_answers.py DIR [--tensor-parallel-size 2] [--new-tokens 12]

DIR is what `python -m avlm.weights export RUN DIR --format transformers` wrote. It runs where vLLM is installed, with
nothing of avlm, in fp32; with the CPU build a head of the decoder needs a width that its attention knows (32, 64, 80,
96, 112, 128, ...), and two ranks on one socket `VLLM_CPU_OMP_THREADS_BIND="0|1"`. Images of noise in several sizes and
noise of several lengths stand for media. Printed for each prompt: its tokens, whether both made the same ids of it, and
how many tokens of the answers are equal; the exit code is 1 where any differ.
"""

import argparse
import sys

import numpy
from packaging.version import Version
from PIL import Image

IMAGE_SIZES = (96, 96), (120, 180), (240, 130)  # height, width
AUDIO_SECONDS, SAMPLING_RATE = (1.0, 0.5, 1.7), 16000
VIDEO_FRAMES, VIDEO_SIZE = 8, (80, 120)
PROMPTS = {
    "text": {},
    "image": {"image": 1},
    "audio": {"audio": 1},
    "image and audio": {"image": 1, "audio": 1},
    "2 images": {"image": 2},
    "2 recordings": {"audio": 2},
    "3 images, 3 recordings": {"image": 3, "audio": 3},
    "video": {"video": 1},
}


def main() -> None:
    arguments = read_arguments()
    import torch
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(arguments.folder, trust_remote_code=True)
    media = noise()
    names = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}
    served = {kind for kind, name in names.items() if getattr(processor, name, None) is not None}
    if Version(transformers.__version__) < Version("5.18.0") or hasattr(processor, "features_per_frame"):
        served.discard("video")  # the backend has none with older versions, nor of bases that know none
    prompts = {name: counts for name, counts in PROMPTS.items() if served.issuperset(counts)}
    texts = {name: prompt_text(processor, counts) for name, counts in prompts.items()}

    served_ids = answers_of_vllm(arguments, prompts, texts, media)
    model = transformers.AutoModelForMultimodalLM.from_pretrained(
        arguments.folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    table = [f"{'prompt':24}{'tokens':>8}{'same prompt':>14}{'same answer':>14}"]
    different = 0
    for name, counts in prompts.items():
        given = {kind: media[kind][:count] for kind, count in counts.items()}
        rate = {"audio_kwargs": {"sampling_rate": SAMPLING_RATE}} if "audio" in given else {}
        inputs = processor(
            text=texts[name],
            images=given.get("image"),
            audio=given.get("audio"),
            videos=given.get("video"),
            return_tensors="pt",
            **rate,
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=arguments.new_tokens, do_sample=False, eos_token_id=None)
        length = inputs["input_ids"].shape[1]
        prompt, answer = ids[0, :length].tolist(), ids[0, length:].tolist()
        served_prompt, served_answer = served_ids[name]
        equal = next((n for n, pair in enumerate(zip(answer, served_answer)) if pair[0] != pair[1]), len(answer))
        same_prompt = served_prompt == prompt
        different += not same_prompt or equal < len(answer)
        table.append(f"{name:24}{length:8}{'yes' if same_prompt else 'no':>14}{f'{equal} of {len(answer)}':>14}")
    print("\n".join(table))
    sys.exit(1 if different else 0)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--max-model-len", type=int, default=None, help="of the folder where not given")
    return parser.parse_args()


def noise() -> dict[str, list]:
    """Media of each kind, as vLLM and the processor take them: Pillow images, waveforms, uint8 frames (N, H, W, 3)."""
    source = numpy.random.default_rng(0)
    images = [Image.fromarray(source.integers(0, 255, (*size, 3), dtype=numpy.uint8)) for size in IMAGE_SIZES]
    video = source.integers(0, 255, (VIDEO_FRAMES, *VIDEO_SIZE, 3), dtype=numpy.uint8)
    lengths = [round(seconds * SAMPLING_RATE) for seconds in AUDIO_SECONDS]
    audio = [source.normal(0, 0.1, length).astype(numpy.float32) for length in lengths]
    return {"image": images, "audio": audio, "video": [video]}


def prompt_text(processor, counts: dict[str, int]) -> str:
    """A question after media of these counts, in the folder's own template."""
    content = [{"type": kind} for kind, count in counts.items() for _ in range(count)]
    content.append({"type": "text", "text": "What is it?"})
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def answers_of_vllm(arguments, prompts, texts, media) -> dict[str, tuple[list[int], list[int]]]:
    """(ids of the prompt, ids of the answer) of each prompt, all in one batch."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=arguments.folder,
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=arguments.max_model_len,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": 3, "audio": 3, "video": 1},
    )
    requests = []
    for name, counts in prompts.items():
        given = {kind: media[kind][:count] for kind, count in counts.items()}
        if "audio" in given:
            given["audio"] = [(waveform, SAMPLING_RATE) for waveform in given["audio"]]
        requests.append({"prompt": texts[name], "multi_modal_data": given})
    sampling = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True)
    outputs = engine.generate(requests, sampling)
    return {
        name: (list(output.prompt_token_ids), list(output.outputs[0].token_ids))
        for name, output in zip(prompts, outputs)
    }


if __name__ == "__main__":
    main()
