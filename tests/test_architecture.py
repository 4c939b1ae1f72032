"""The arrows and sizes of docs/architecture.md: who may import whom, and that a file is read in one sitting."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("avlm/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py", ROOT / "generate.py"])

# What a part may import of ours (prefixes). The longest matching row counts.
ALLOWED = {
    "kernels": ("kernels",),
    "avlm.model_config": (),
    "avlm.config": ("avlm.model_config",),
    "avlm.config_file": ("avlm.config", "avlm.model_config"),
    "avlm.data.batch": ("kernels.segments",),
    "avlm.locks": (),
    "avlm.data": (
        "avlm.model_config",
        "avlm.config",
        "avlm.config_file",
        "avlm.locks",
        "avlm.data",
        "kernels.segments",
    ),
    # Commands.
    "avlm.data.inspect": ("avlm.model_config", "avlm.config", "avlm.config_file", "avlm.data", "avlm.parallel.exit"),
    "avlm.data.demo_pretrained": ("avlm.data", "avlm.parallel.exit"),
    "avlm.models": ("avlm.model_config", "avlm.data.batch", "avlm.data.log_mel", "avlm.models", "kernels"),
    "avlm.parallel": (
        *("avlm.model_config", "avlm.config", "avlm.data.batch", "avlm.data.packing", "avlm.data.worker"),
        *("avlm.models", "avlm.parallel", "kernels"),
    ),
    "avlm": ("avlm", "kernels"),
    "train": ("avlm",),
    "generate": ("avlm",),
}
NO_PROCESSES = ("avlm/models", "avlm/data", "kernels")  # no torch.distributed, DTensor, environment
MAX_LINES, MAX_FUNCTION, MAX_KERNEL = 400, 60, 60
# file or file:function -> why it may be longer
LONGER = {
    "train.py:run_stage": "the training loop, in numbered sections",
    "train.py:main": "the parts in order, in numbered sections",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("avlm", "kernels", "train", "generate")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_name(path)
    row = max((key for key in ALLOWED if module == key or module.startswith(key + ".")), key=len)
    for name in imports(path):
        assert any(name == part or name.startswith(part + ".") for part in ALLOWED[row]), f"{module} imports {name}"


@pytest.mark.parametrize("folder", NO_PROCESSES)
def test_models_data_and_kernels_know_nothing_of_processes(folder):
    for path in (ROOT / folder).rglob("*.py"):
        code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body)
        for word in ("torch.distributed", "DTensor", "os.environ"):
            assert word not in code, f"{path.relative_to(ROOT)} mentions {word}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    if name not in LONGER:
        assert text.count("\n") <= MAX_LINES, f"{name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and f"{name}:{node.name}" not in LONGER:
            docstring = ast.get_docstring(node, clean=False) or ""
            # A kernel's signature is a list of pointers and sizes; what has to be understood is its body.
            kernel = any("triton.jit" in ast.unparse(x) or "gluon.jit" in ast.unparse(x) for x in node.decorator_list)
            start, most = (node.body[0].lineno, MAX_KERNEL) if kernel else (node.lineno, MAX_FUNCTION)
            length = node.end_lineno - start + 1 - len(docstring.splitlines())
            assert length <= most, f"{name}: {node.name} has {length} lines"


def test_train_and_generate_stay_short():
    assert (ROOT / "train.py").read_text().count("\n") <= 300
    assert (ROOT / "generate.py").read_text().count("\n") <= 150


def test_the_readme_names_every_file():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    named = set(re.findall(r"\b[a-z_]+\.py\b", tree))
    on_disk = {path.name for path in SOURCES if path.name != "__init__.py"}
    assert named == on_disk, f"only in README: {sorted(named - on_disk)}; only on disk: {sorted(on_disk - named)}"
