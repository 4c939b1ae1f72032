"""The arrows and sizes of docs/architecture.md: who may import whom, and that a file is read in one sitting."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("avlm/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py", ROOT / "generate.py"])

# room -> the rooms that it may import. A room lists only rooms above it here, so there is no circle.
ARROWS = {
    "kernels": (),
    "avlm.config": (),
    "avlm.process": (),
    "avlm.models": ("avlm.config", "kernels"),
    "avlm.families": ("avlm.config",),
    "avlm.parallel": ("avlm.config", "avlm.process", "avlm.models", "kernels"),
    "avlm.storage": ("avlm.config", "avlm.process", "avlm.parallel"),
    "avlm.data": ("avlm.config", "avlm.process", "avlm.models", "avlm.storage", "kernels"),
    "avlm.weights": ("avlm.config", "avlm.process", "avlm.models", "avlm.families", "avlm.data", "avlm.parallel")
    + ("avlm.storage",),
    "avlm.training": ("avlm.config", "avlm.process", "avlm.models", "avlm.data", "avlm.parallel", "avlm.storage")
    + ("kernels",),
    "avlm.evaluation": ("avlm.config", "avlm.process", "avlm.models", "avlm.data", "avlm.parallel", "avlm.storage")
    + ("avlm.weights", "avlm.training", "kernels"),
    "avlm.preflight": (
        "avlm.config",
        "avlm.process",
        "avlm.models",
        "avlm.data",
        "avlm.parallel",
        "avlm.storage",
        "avlm.weights",
    )
    + ("avlm.training", "avlm.evaluation", "kernels"),
    "avlm.demo": ("avlm",),
    "train": ("avlm",),
    "generate": ("avlm",),
    "avlm": ("avlm.evaluation",),  # the door: avlm/__init__.py
}
# What a room may import of another that it may not import whole, and why.
NARROW = {
    ("avlm.data", "kernels"): ("kernels.segments",),  # how a row is cut into sequences, and nothing that computes
    ("avlm.data", "avlm.storage"): ("avlm.storage.hub",),  # where a tokenizer or a set lies
}
# A command that nothing imports opens a run's config as train.py does.
COMMANDS = {"avlm.data.inspect": "avlm.weights.model_from"}
NO_PROCESSES = ("avlm/models", "avlm/data", "avlm/families", "kernels")  # no torch.distributed, DTensor, environment
MAX_LINES, MAX_FUNCTION = 400, 60
# file or file:function -> why it may be longer
LONGER = {
    "train.py:run_stage": "the training loop, in numbered sections",
    "train.py:main": "the parts in order, in numbered sections",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "avlm" else parts[0]


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported at the top of the file) of everything of ours that a file imports."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, id(node) in at_top) for name in names]
    return [(name, top) for name, top in found if name.split(".")[0] in ("avlm", "kernels", "train", "generate")]


def module_file(name: str) -> Path | None:
    """The file that an imported name is, or is defined in."""
    for module in (name, name.rpartition(".")[0]):
        path = ROOT.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@functools.cache
def names_of(path: Path) -> set[str]:
    """What can be imported from a file: what it defines, assigns or imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_name(path)
    own = room_of(module)
    for name, _ in imports(path):
        other = room_of(name)
        if other == own or name.startswith(COMMANDS.get(module, "?")):
            continue
        assert other in ARROWS[own] or "avlm" in ARROWS[own], f"{module} imports {name}"
        narrow = NARROW.get((own, other))
        assert narrow is None or name.startswith(narrow), f"{module} imports {name}, and may import {narrow} only"


def test_every_name_that_is_imported_is_there():
    """Scripts that no fast test runs, such as measurements, are broken by a move without anyone noticing."""
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("docs/*.py")]:
        for name, _ in imports(path):
            file = module_file(name)
            assert file is not None, f"{path.relative_to(ROOT)} imports {name}"
            _, _, last = name.rpartition(".")
            assert file.stem == last or file.parent.name == last or last in names_of(file), (
                f"{path.relative_to(ROOT)} imports {name}, and {file.relative_to(ROOT)} has no {last}"
            )


def test_no_room_is_imported_by_one_that_it_imports():
    rooms = list(ARROWS)
    for i, room in enumerate(rooms):
        for other in ARROWS[room]:
            assert other == "avlm" or other in rooms[:i], f"{room} -> {other} points down"
    on_disk = {room_of(module_name(path)) for path in SOURCES}
    assert on_disk == set(rooms)


def test_files_import_each_other_in_no_circle():
    door = ROOT / "avlm" / "__init__.py"  # every module of the package imports it, by Python's rules
    edges = {path: {module_file(name) for name, _ in imports(path)} - {None, path} for path in SOURCES if path != door}
    left = dict(edges)
    while left:
        free = [path for path, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle among {sorted(str(path.relative_to(ROOT)) for path in left)}"
        for path in free:
            del left[path]


def test_only_energon_datasets_and_what_a_command_runs_are_imported_inside_functions():
    """Energon and datasets take seconds to import, and most runs do without; so does torch, which --help and
    `import avlm` do without."""
    inside = {
        module_name(path)
        for path in SOURCES
        for name, top in imports(path)
        if not top and ".energon." not in name and ".hf." not in name
    }
    commands = {module_name(path) for path in SOURCES if "run_command(main)" in path.read_text()}
    assert inside <= commands | {"avlm"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=str)
def test_no_code_stands_in_an_init_but_the_door_of_the_package(path):
    code = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
    if path == ROOT / "avlm" / "__init__.py":
        [load] = code
        assert isinstance(load, ast.FunctionDef) and load.name == "load"
    else:
        assert code == []


def test_no_module_lies_flat_in_the_package():
    assert [path.name for path in (ROOT / "avlm").glob("*.py")] == ["__init__.py"]


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
    assert name in LONGER or text.count("\n") <= MAX_LINES, f"{name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and f"{name}:{node.name}" not in LONGER:
            docstring = ast.get_docstring(node, clean=False) or ""
            # A kernel's signature is a list of pointers and sizes; what has to be understood is its body.
            kernel = any("triton.jit" in ast.unparse(x) or "gluon.jit" in ast.unparse(x) for x in node.decorator_list)
            start = node.body[0].lineno if kernel else node.lineno
            length = node.end_lineno - start + 1 - len(docstring.splitlines())
            assert length <= MAX_FUNCTION, f"{name}: {node.name} has {length} lines"


def test_train_and_generate_stay_short():
    assert (ROOT / "train.py").read_text().count("\n") <= 260
    assert (ROOT / "generate.py").read_text().count("\n") <= 150


def test_tests_mirror_the_rooms():
    rooms = {path.relative_to(ROOT / "avlm") for path in (ROOT / "avlm").rglob("*") if list(path.glob("*.py"))}
    tested = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strange = {str(folder) for folder in tested - rooms} - {".", "kernels", "measurements"}
    assert not strange, f"no room has the name of tests/{sorted(strange)}"


def test_the_pages_name_every_room_and_every_file():
    readme = (ROOT / "README.md").read_text()
    for room in ARROWS:
        name = room.replace(".", "/")
        assert f"{name}/" in readme or f"{name}.py" in readme, f"README.md does not name {name}"
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = "".join(re.findall(r"```text\n(.*?)```", page, re.S))
    named = set(re.findall(r"\b[a-z0-9_]+\.py\b", tree))
    on_disk = {path.name for path in SOURCES} - {"__init__.py"}
    assert named == on_disk, f"only in the page: {sorted(named - on_disk)}; only on disk: {sorted(on_disk - named)}"
