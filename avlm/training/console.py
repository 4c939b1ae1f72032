"""What a run says at the terminal, as text: its lengths, steps, answers and end."""

from pathlib import Path

from torch import nn

from avlm.config.run import Config, StageConfig, shares
from avlm.config.values import counted
from avlm.data.sample import Sample
from avlm.models.avlm import AVLM
from avlm.models.moe import mixtures
from avlm.storage.run_folder import Progress, Record, folder_of
from avlm.training.epochs import Epoch
from avlm.training.optimizer import warmup_steps

MANY = 20  # epochs, above which a warning says so
SHOWN = 2  # answers of each validation set
WIDTH = 100  # characters of a question, an answer or a truth


def describe(model: AVLM) -> str:
    """The number of parameters of every module, and of those that a token meets if it does not meet all experts."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    parts = ", ".join(f"{name} {count(module):,}" for name, module in model.named_children())
    line = f"{count(model):,} parameters: {parts}"
    idle = 0
    for mixture in mixtures(model):
        idle += count(mixture.experts) // mixture.config.num * (mixture.config.num - mixture.config.per_token)
    return f"{line}; {count(model) - idle:,} for a token" if idle else line


def describe_length(stage: StageConfig, epoch: Epoch | None, rows_per_step: int) -> list[str]:
    """What a stage's steps amount to, and warnings if its samples are seen very often or if it ends warming up."""
    lines = []
    if epoch is not None:
        times = epoch.of_steps(stage.steps, rows_per_step)
        rows = f"{epoch.num_rows:,.0f}" if epoch.num_rows >= 10 else f"{epoch.num_rows:.1f}"
        lines.append(
            f"{counted(epoch.total, 'sample')}, about {rows} rows an epoch: "
            f"{counted(stage.steps, 'step')} of {counted(rows_per_step, 'row')} are {times:.1f} epochs"
        )
        passes = epoch.passes(times, shares(stage.data.train))
        if len(passes) > 1:
            each = (f"{source} {number:.1f} times" for source, number in passes.items())
            lines.append(f"so it draws each sample of {', of '.join(each)}")
        source, most = max(passes.items(), key=lambda item: item[1])
        if most > MANY + 0.5:
            key = "epochs" if stage.epochs else "steps"
            lines.append(
                f"warning: stage {stage.name} sees each sample of {source} about {most:.0f} times: lower its {key}"
            )
    warmup = warmup_steps(stage.optimizer, stage.steps)
    if 1 < stage.steps < 2 * warmup:
        lines.append(
            f"warning: the learning rate of stage {stage.name} rises for {warmup} steps, of {stage.steps}: lower "
            "optimizer.warmup_steps"
        )
    return lines


def step_line(record: Record, total_steps: int, elapsed: float, left: float) -> str:
    """``elapsed``, ``left``: seconds of the run."""
    place = f"step {record['step']}/{total_steps} {record['stage']}"
    losses = f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  lr {record['lr']:.2e}"
    line = f"{place}  {losses}  {record['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in record:
        line += f"  mfu {record['mfu']:.1%}"
    if "epoch" in record:
        line += f"  epoch {record['epoch']:.2f}"
    return f"{line}  {clock(elapsed)} elapsed, {clock(left)} left"


def answer_lines(samples: list[Sample], answers: list[str], truths: list[list[str]], path: Path) -> list[str]:
    """The first answers of a validation set next to the truth, and where all of them lie."""
    lines = []
    for sample, answer, truth in list(zip(samples, answers, truths, strict=True))[:SHOWN]:
        held = _short(", ".join([sample.key, *sample.files]))
        question = _short(sample.messages[-2]["content"])
        lines.append(f"  [{held}] {question} -> {_short(answer)!r}, truth {_short(' / '.join(truth))!r}")
    return [*lines, f"  all answers: {path}"]


def ending(config: Config, progress: Progress, trained: bool, seconds: float) -> list[str]:
    """The last lines of a run that ends at ``progress``. ``trained``: it did any step in these ``seconds``."""
    folder = config.output_dir
    if progress.step < config.total_steps and progress.step != config.train.stop_after:
        return []
    if not trained and progress.step == config.total_steps:
        last = config.stages[-1]
        return [
            f"{folder} is finished: all {progress.step} steps were done before. To train longer, give its last stage "
            f"more: stages.{last.name}.steps={2 * last.steps}"
        ]
    media = {"vision": " --image FILE", "audio": " --audio FILE"}
    asked = next((media[tower] for tower in media if tower in config.model.modules), "")
    end = "done"
    if progress.step < config.total_steps:
        end = f"ended by train.stop_after at step {progress.step} of {config.total_steps}"
    tried = f'python generate.py {folder}{asked} --prompt "..."    or without --prompt, to chat'
    if config.stages[-1].data.duplex:
        tried = f"python -m avlm.evaluation.duplex {folder} CLIP"
    lines = [f"{end} in {clock(seconds)}: saved to {folder_of(Path(folder), progress.step)}", f"try: {tried}"]
    is_contrastive = config.stages[min(progress.stage, len(config.stages) - 1)].objective == "contrastive"
    return lines[:1] if is_contrastive else lines  # it learned no answers


def clock(seconds: float) -> str:
    """As in 0:07, 12:34, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[:WIDTH]}..."
