"""Did self-supervised training on one's own patches help? Several seeds, each with its own division of the patients, on a CPU.

    OMP_NUM_THREADS=1 python bench/bench_adaptation.py idc_patches_subset.zip --pattern '(?P<patient>[0-9]+)_idx.*class(?P<label>[01])' \\
        --seeds 0 1 2 3 4 --out results/adaptation

For every seed a small vision transformer (6 layers of 192, patches of 10 pixels) with random weights is trained on the patches of
training patients (pathology/finetune.py). The step that validation patients chose and the last one are scored on test patients, beside
the colour histogram, another random model, and the weights it began with (pathology/evaluate_patches.py). The last tables pool the
seeds. A finished seed is a file in --out: the next call goes on.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.arguments import count, positive_int
from files.console import run_script, say
from files.writing import write_text
from pathology import evaluate_patches, finetune
from training.run_record import CHECKPOINT


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, help="a folder or zip of pictures, or tiles with pixels")
    add("--pattern", required=True, help="regular expression with groups label and patient that fits the names of pictures")
    add("--seeds", type=count, nargs="+", default=[0, 1, 2, 3, 4], help="of weights, training and splits (default 0 to 4)")
    add("--steps", type=positive_int, default=120, help="of training (default 120)")
    add("--batch", type=positive_int, default=128, help="patches of a step (default 128)")
    add("--out", type=Path, default=Path("results/adaptation"), help="folder of runs and results (default results/adaptation)")
    return parser


def write_base(folder: Path) -> str:
    """A folder with the config alone of a vision transformer for pictures of 50 pixels -> its name as random weights."""
    from transformers import Dinov2Config

    config = Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=50, patch_size=10)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config.to_json_string())
    return f"random:{folder}"


def run_seed(args: argparse.Namespace, base: str, seed: int) -> Path:
    """Train and evaluate -> the file of results."""
    folder = args.out / f"seed-{seed}"
    run, last, result = folder / "run", folder / "last", folder / "result.json"
    if result.is_file():
        return result
    data = [str(args.source), "--pattern", args.pattern, "--split-seed", str(seed)]
    views = ["--global-crop", "50", "--local-crop", "30", "--local-crops", "4", "--prototypes", "1024"]
    # a short run of random weights: a higher rate, all layers alike, a teacher that follows soon; chosen by validation patients of seed 0
    rates = ["--lr", "3e-3", "--layer-decay", "1", "--momentum", "0.95"]
    length = ["--steps", str(args.steps), "--batch", str(args.batch), "--validate-every", "40", "--checkpoint-every", "40"]
    resume = ["--resume"] if run.is_dir() else []
    flags = [*data, "--init", base, "--seed", str(seed), *views, *rates, *length, "--out", str(run), *resume]
    finetune.main(finetune.parse(flags))
    write_last(run, last)
    evaluate = [*data, "--model", str(run), str(last), "--out", str(result)]
    evaluate_patches.main(evaluate_patches.build_parser().parse_args(evaluate))
    return result


def write_last(run: Path, last: Path) -> None:
    """The teacher of the last step as a model folder, beside the step that validation chose."""
    from safetensors.torch import load_file, save_file

    prefix, tensors = "teacher/backbone.", load_file(run / CHECKPOINT)
    last.mkdir(exist_ok=True)
    for name in ("config.json", "embedding.json", "arguments.json"):
        shutil.copy(run / name, last / name)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    save_file(weights, last / "model.safetensors", {"format": "pt"})


def main(args: argparse.Namespace) -> None:
    base = write_base(args.out / "base")
    results = [evaluate_patches.read_result(run_seed(args, base, seed)) for seed in args.seeds]
    rows = []
    for seed, result in zip(args.seeds, results, strict=True):
        summary = json.loads((args.out / f"seed-{seed}" / "run" / "summary.json").read_text())
        rows.append(json.dumps({"seed": seed, "training": summary, "scores": result["scores"]}))
        kept, last = summary["kept_step"], summary["validations"][str(summary["steps"])]
        say(f"seed {seed}: validation {summary['before_training']:.3f} before training, {last:.3f} at the end, kept step {kept}")
    write_text(args.out / "seeds.jsonl", "".join(row + "\n" for row in rows))
    say(f"\npooled over {len(results)} seeds; run: the step that validation chose, last: the last one")
    evaluate_patches.print_tables(results)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
