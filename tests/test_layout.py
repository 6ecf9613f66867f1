"""The plan of the house: imports run one way, no script imports a script, and each README describes the modules of its folder."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each line may import from the lines above it and from its own
LAYERS = [
    {"files.console", "files.arguments", "files.reading", "files.writing", "files.docstrings", "files.page", "files"},
    {"prompts", "pooling_kernels"},
    {"encoder.contract"},
    {"encoder.names", "encoder.processes"},
    {"encoder.runtime"},
    {"encoder.base_models", "encoder.tokenization"},
    {"encoder.packing", "encoder.lora", "encoder.loading", "encoder.nearest", "encoder.embed_filter"},
    {"encoder.attention_masks"},
    {"encoder.states", "encoder.streaming", "encoder.mean_direction", "encoder.checks"},
    {"encoder.token_prepending", "encoder.token_attention"},
    {"encoder.encoder", "encoder"},
    {"tasks", "tasks.mteb_tasks", "tasks.draw", "tasks.unlabelled"},
    {"evaluation", "evaluation.mteb_model", "evaluation.evidence", "evaluation.failures"},
    {"evaluation.baselines", "evaluation.sentence_transformer", "evaluation.observing", "evaluation.differences", "evaluation.sweep"},
    {"evaluation.rows", "evaluation.finished"},
    {"evaluation.hub_data", "evaluation.stored", "evaluation.report_map", "evaluation.report_grid"},
    {"evaluation.task_choice"},
    {"evaluation.scores", "evaluation.without_labels", "evaluation.paper", "evaluation.facets"},
    {"evaluation.report"},
    {"training", "training.own_texts", "training.pair_data", "training.optimization"},
    {"training.losses"},
    {"training.gradients"},
    {"training.monitoring"},
    {"training.run_record"},
    {"training.checkpoint_files"},
    {"training.checkpoint", "training.validation"},
    {"training.plan"},
    {"attention_analysis", "attention_analysis.stored"},
    {"attention_analysis.fonts", "attention_analysis.words"},
    {"attention_analysis.drawing"},
    {"attention_analysis.looking"},
    {"attention_analysis.text_pictures", "attention_analysis.word_pictures", "attention_analysis.corpus_pictures"},
    {"attention_analysis.html"},
    {"attention_analysis.pictures"},
    {"attention_analysis.categories", "attention_analysis.sides", "attention_analysis.intervals", "attention_analysis.printed"},
    {"attention_analysis.received", "attention_analysis.effects", "attention_analysis.interventions"},
    {"attention_analysis.rollout", "attention_analysis.gradients"},
    {"attention_analysis.opinions", "attention_analysis.worth"},
    {"attention_analysis.shares", "attention_analysis.texts"},
    {"models.packed_text"},
    {"pair_engines", "pair_engines.inputs", "pair_engines.outputs"},
    {"pair_engines.durable"},
    {"pair_engines.templates"},
    {"pair_engines.docstring_pairs", "pair_engines.spans", "pair_engines.mining", "pair_engines.merging"},
    {"pair_engines.chat_model", "pair_engines.chat_server", "pair_engines.translation"},
    {"pair_engines.gate", "pair_engines.teacher"},
    {"pair_engines.report"},
    {"serving", "serving.folder", "serving.contract_pooling", "serving.vectors", "serving.hub"},
    {"serving.sentence_transformers_worker", "serving.onnx_worker", "serving.llama_cpp_worker"},
    {"serving.onnx_converter", "serving.gguf_converter"},
    {"serving.runtimes", "serving.verification", "serving.embedding", "serving.index"},
    {"serving.onnx_folder", "serving.gguf_folder", "serving.ray_engine"},
    {"serving.card", "serving.server"},
    {"make_pairs", "train", "evaluate", "attention", "search", "export", "embed", "models.pretrain"},
    {"pathology", "pathology.files"},
    {"pathology.blocks"},
    {"pathology.slides", "pathology.tissue", "pathology.stains", "pathology.timm_models"},
    {"pathology.models"},
    {"pathology.patches", "pathology.shifts", "pathology.scores", "pathology.crops", "pathology.checkpoint", "pathology.mil"},
    {"pathology.dino"},
    {"pathology.synthetic", "pathology.tile", "pathology.extract", "pathology.heatmap"},
    {"pathology.finetune", "pathology.evaluate_patches", "pathology.evaluate_slides"},
    {"bench.bench_encode", "bench.bench_train", "bench.bench_pooling", "bench.bench_options", "bench.encode_worker"},
    {
        "bench.bench_own_texts",
        "bench.bench_rewrite",
        "bench.bench_server",
        "bench.gpu",
        "bench.bench_index",
        "bench.bench_parity",
        "bench.bench_sweep",
        "bench.bench_intervals",
        "bench.bench_facets",
        "bench.bench_attention",
        "bench.bench_adaptation",
        "bench.bench_pathology",
    },
]
SCRIPTS = {"make_pairs", "train", "evaluate", "attention", "search", "export", "embed", "models.pretrain", "tasks.draw"} | {
    f"pathology.{name}" for name in ("synthetic", "tile", "extract", "heatmap", "finetune", "evaluate_patches", "evaluate_slides")
}
FOLDERS = (
    "files",
    "pair_engines",
    "encoder",
    "tasks",
    "evaluation",
    "training",
    "serving",
    "attention_analysis",
    "models",
    "pathology",
    "bench",
)
LAYER = {module: i for i, layer in enumerate(LAYERS) for module in layer}


def modules() -> dict[str, Path]:
    paths = [p for folder in (".", *FOLDERS) for p in (ROOT / folder).glob("*.py")]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    return {name: path for path, name in names.items()}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports when it runs, also inside functions; imports for type checkers do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & set(LAYER)) or {node.module}
    short = {name.split(".")[-1]: name for name in LAYER if name.startswith(("bench.", "models."))}  # imported by their file's name
    return {short.get(name, name) for name in names} & set(LAYER)


def test_every_module_has_its_place():
    assert set(modules()) == set(LAYER)


def test_imports_run_one_way():
    wrong = [f"{name} imports {other}" for name, path in modules().items() for other in imports(path) if LAYER[other] > LAYER[name]]
    assert not wrong


@pytest.mark.parametrize("script", sorted(SCRIPTS & {path.stem for path in ROOT.glob("*.py")}))
def test_a_script_starts_without_slow_imports(script):
    """Torch takes seconds: a wrong flag is answered before, and Ctrl-C is no traceback."""
    slow = "{'torch', 'transformers', 'peft', 'datasets', 'mteb', 'sklearn', 'matplotlib', 'plotly', 'datasketch', 'rapidfuzz'}"
    program = f"import sys, {script}; assert not {slow} & set(sys.modules), {slow} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_script_imports_a_script():
    wrong = [f"{name} imports {other}" for name, path in modules().items() if name in SCRIPTS for other in imports(path) & SCRIPTS - {name}]
    assert not wrong


READMES = sorted(path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("README.md"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_readme_lead_somewhere(readme):
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", readme.read_text(encoding="utf-8"))]
    missing = [target for target in targets if "://" not in target and not (readme.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f not in ("bench", "models") and (ROOT / f / "README.md").exists()])
def test_a_readme_describes_every_module(folder):
    """By name, or several at once as `*_worker.py`."""
    patterns = re.findall(r"`([\w*]+\.py)`", (ROOT / folder / "README.md").read_text(encoding="utf-8"))
    names = [path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
