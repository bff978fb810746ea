"""What our modules import: one way, no circles, public names of other libraries, nothing heavy before it is needed."""

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mamtra_ray.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamtra_ray"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FILES = [*MODULES.values(), *sorted((ROOT / "benchmarks").glob("*.py"))]
INTERNALS = (
    "transformers.models",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "transformers.modeling_rope_utils",
    "transformers.integrations",
    "ray._private",
    "ray._raylet",
    "torch._inductor",
    "torch._dynamo",
)
# A package may import what stands on a line before its own: the way that data flows.
LAYERS = """
    errors artifacts assets
    layouts
    config
    runtime
    speech
    losses
    models
    speech_lm
    efficiency
    teachers
    corpus
    run
    teacher_cache
    align surrogate
    probe distill tradeoff
    evaluate
    export listening_test speak compare
    report
    search
    demo_assets
    __main__
"""
LEVEL = {name: level for level, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
TORCH_ONLY = ("losses", "models", "layouts")
HEAVY = ("torch", "ray", "transformers", "optuna", "pyarrow", "matplotlib", "scipy")


def imported_names(path):
    """Full names of all that a file imports, and of attributes reached through a module (``ray._private.worker``)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def imported_modules(path):
    """Our modules that a file imports anywhere, also in a function or for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != "mamtra_ray":
                yield name


IMPORTS = {module: set(imported_modules(path)) - {module} for module, path in MODULES.items()}


def part_of(module):
    """``mamtra_ray.run.folder`` -> ``run``."""
    return module.split(".")[1] if "." in module else "mamtra_ray"


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


def test_no_circle_between_modules():
    # A package's own face hands names of its modules on; whoever imports one of these runs the face first.
    assert circle(IMPORTS) is None


def test_no_circle_between_packages():
    packages: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        packages.setdefault(part_of(module), set()).update(part_of(name) for name in imported)
    assert circle({name: others - {name} for name, others in packages.items() if name != "mamtra_ray"}) is None


def test_the_check_finds_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_imports_go_one_way():
    upward = [
        f"{module} imports {name}"
        for module, imported in IMPORTS.items()
        for name in imported
        if part_of(module) not in ("mamtra_ray", part_of(name)) and LEVEL[part_of(name)] >= LEVEL[part_of(module)]
        if not (LEVEL[part_of(name)] == LEVEL[part_of(module)] == 0)
    ]
    assert upward == []


def test_every_package_has_its_line_and_is_in_the_wheel():
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert found <= set(LEVEL)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {"mamtra_ray", "mamtra_ray.search_spaces", *(f"mamtra_ray.{name}" for name in found)}


def test_no_module_is_built_on_internals_of_another_library():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{internal}.") for internal in INTERNALS)
    }
    assert not found


def test_losses_models_and_layouts_do_not_know_ray():
    found = {
        f"{module}: {name}"
        for module, path in MODULES.items()
        if part_of(module) in TORCH_ONLY
        for name in imported_names(path)
        if name.split(".")[0] == "ray"
    }
    assert not found


def modules_after(code):
    """Top-level modules that have been imported when ``code`` ends, in a process of its own."""
    ending = "\nimport sys\nprint('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    found = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(found.stdout.splitlines()[-1].split())


def test_the_models_need_neither_transformers_nor_the_compiler():
    code = (
        "import importlib, pkgutil, sys\n"
        "import mamtra_ray.models as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "print(*sorted({n for n in sys.modules if n.split('.')[0] in ('transformers', 'ray') or n == 'torch._dynamo'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_nothing_heavy(verb):
    """What takes seconds to import is imported after the arguments have been understood."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{verb}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('mamtra_ray.{verb}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0"
    )
    assert modules_after(code) & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("arguments", "code", "allowed"),
    [
        (["--explain"], 0, set()),
        (["serch.trials=3"], 2, set()),
        (["distill.hidden_weight=1", "cache.format=topk"], 2, set()),
        (["--dry-run", "--run", "nowhere"], 0, {"pyarrow"}),
    ],
)
def test_an_answer_needs_no_more_than_it_says(arguments, code, allowed, tmp_path):
    script = (
        "import os\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from mamtra_ray.search.__main__ import main\n"
        f"assert main({arguments!r}) == {code}"
    )
    assert modules_after(script) & set(HEAVY) <= allowed
    assert list(tmp_path.iterdir()) == []


def test_no_function_of_the_models_swallows_keywords():
    """A keyword that another library renames must end in an error, not in a state that is never kept."""
    swallowing = [
        f"{path.name}:{node.lineno} {node.name}(**{node.args.kwarg.arg})"
        for path in sorted((PACKAGE / "models").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None
    ]
    assert [entry.split()[1] for entry in swallowing] == ["write_model(**content)"]  # what goes into a JSON file
