"""What an installation offers: names, entry points, import rings, and the Triton stub.

Imports are observed in fresh processes that run outside the repository, as a user's would.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import vllm_refusion
from vllm_refusion import triton_kernels
from vllm_refusion.triton_cpu_stub import real_cpu_backend, vllm_is_cpu_build


def find_modules() -> dict[str, Path]:
    """Files of this project by the names they are imported under."""
    found = {}
    for package in (vllm_refusion, triton_kernels):
        folder = Path(package.__file__).parent
        for path in folder.rglob("*.py"):
            parts = [package.__name__, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = find_modules()
# What may import what: of other parts, only those with a lower number.
RINGS = {
    "backbones": 0,
    "triton_cpu_stub": 0,
    "decoding": 0,
    "files": 0,
    "adapters": 1,
    "rows": 1,
    "stock": 1,
    "triton_kernels": 1,
    "engine": 2,
    "vllm_refusion": 3,  # registers the engine
    "bench": 4,
    "training": 4,
    "viewer": 4,
    "triton_kernels.benchmark": 4,  # a program; times vLLM's attention, too
    "doctor": 5,
    "cli": 5,
    "__main__": 6,
}


def part_of(module: str) -> str:
    """The key of ``RINGS`` that a module of ours falls under."""
    name = module.removeprefix("vllm_refusion.")
    return name if name in RINGS else name.split(".")[0]


def imports_of(module: str) -> set[str]:
    """What a module of ours imports anywhere, in functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else node.module for name in inner}
    return names


IMPORTS = {module: imports_of(module) for module in MODULES}


def run_python(code: str, folder: Path, **environment: str | None) -> object:
    """The JSON value that ``code`` prints, run in ``folder``; None removes a variable."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for name, value in environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_version_is_the_installed_one():
    assert importlib.metadata.version("vllm-refusion") == vllm_refusion.__version__


def test_vllm_finds_the_plugin():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="refusion")
    assert entry.value == "vllm_refusion:register"
    assert callable(entry.load())


def test_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="vllm-refusion")
    assert entry.value == "vllm_refusion.cli:main"


def test_kernels_do_not_shadow_the_package_vllm_imports(tmp_path):
    code = """
import importlib.util, json, vllm_refusion.triton_kernels as kernels
print(json.dumps([importlib.util.find_spec("triton_kernels") is None, kernels.__name__]))
"""
    assert run_python(code, tmp_path) == [True, "vllm_refusion.triton_kernels"]
    assert not (Path(__file__).parent / "__init__.py").exists()


def test_nothing_is_unpickled():
    """Nor is remote code trusted: neither module nor argument is named anywhere."""
    names = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
            elif isinstance(node, ast.Attribute):
                names.add(f"{getattr(node.value, 'id', '')}.{node.attr}")
            elif isinstance(node, ast.keyword):
                names.add(node.arg)
    assert "torch" in names and "np.load" in names
    bad = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not names & (bad | {"torch.load", "allow_pickle", "trust_remote_code"})


def test_rings():
    upward = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names & set(MODULES)
        if part_of(module) != part_of(name) and RINGS[part_of(module)] <= RINGS[part_of(name)]
    ]
    assert not upward
    assert {part_of(module) for module in MODULES} == set(RINGS)


@pytest.mark.parametrize(
    ("part", "foreign"),
    [
        ("backbones", {"torch", "triton"}),
        ("decoding", {"triton", "vllm"}),
        ("triton_kernels", {"vllm"}),
        ("training", {"triton", "vllm"}),
    ],
)
def test_what_a_ring_leaves_alone(part, foreign):
    for module, names in IMPORTS.items():
        if part_of(module) == part:
            assert not {name.split(".")[0] for name in names} & foreign, module


def test_no_import_circles():
    graph = {module: names & set(MODULES) for module, names in IMPORTS.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names one


def test_the_private_side_of_vllm_imports_nothing_of_ours():
    assert not IMPORTS["vllm_refusion.engine.compat"] & set(MODULES)


# What a process must not load. Triton imports the package itself in every process that uses
# Triton, so that import has to stay light.
FORBIDDEN_IMPORTS = {
    "vllm_refusion": ["torch", "triton", "vllm"],
    "vllm_refusion.cli, vllm_refusion.bench.command": ["torch", "triton", "vllm"],
    "vllm_refusion.bench.contributions, vllm_refusion.bench.simulate": ["triton", "vllm"],
    "vllm_refusion.triton_cpu_stub": ["torch", "triton", "vllm"],
    "vllm_refusion.cli": ["torch", "triton", "vllm"],
    "vllm_refusion.viewer.page": ["torch", "triton", "vllm"],
    "vllm_refusion.engine.plugin": ["triton", "vllm"],
}


@pytest.mark.parametrize("module", FORBIDDEN_IMPORTS)
def test_what_is_not_loaded(module, tmp_path):
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    assert not set(FORBIDDEN_IMPORTS[module]) & set(run_python(code, tmp_path))


# Prints what a process sees of the stub once Triton is imported.
LOOK_AT_TRITON = """
import json, os, triton.language
from triton.backends import backends
from vllm_refusion.triton_cpu_stub import interpreter_is_on
print(json.dumps({
    "variable": os.environ.get("TRITON_INTERPRET"),
    "functions": type(triton.language.zeros).__name__,
    "switched_on_here": interpreter_is_on(),
    "driver": backends["cpu"].driver.__name__ if "cpu" in backends else None,
    "driver_active": "cpu" in backends and backends["cpu"].driver.is_active(),
}))
"""
INTERPRETER_ON = {
    "variable": "1",
    "functions": "InterpretedFunction",
    "switched_on_here": True,
    "driver": "StubDriver",
    "driver_active": False,
}
STUB_IDLE = {
    "variable": None,
    "functions": "JITFunction",
    "switched_on_here": False,
    "driver": "StubDriver",
    "driver_active": False,
}

on_vllm_without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not vllm_is_cpu_build() or bool(real_cpu_backend()),
    reason="the stub acts on the CPU build of vLLM, without a GPU and a CPU backend of Triton",
)


def add_distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """Make ``folder`` look like a place where that distribution is installed."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@on_vllm_without_gpu
@pytest.mark.parametrize("first", ["triton", "torch", "torch._inductor.lowering"])
def test_interpreter_is_on_before_the_first_kernel(first, tmp_path):
    assert run_python(f"import {first}\n{LOOK_AT_TRITON}", tmp_path) == INTERPRETER_ON


@on_vllm_without_gpu
def test_child_processes_inherit_the_interpreter_without_another_notice(tmp_path):
    seen = run_python(LOOK_AT_TRITON, tmp_path, TRITON_INTERPRET="1")
    assert seen == {**INTERPRETER_ON, "switched_on_here": False}


@on_vllm_without_gpu
def test_a_variable_set_by_the_user_stays(tmp_path):
    seen = run_python(LOOK_AT_TRITON, tmp_path, TRITON_INTERPRET="0")
    assert seen == {**STUB_IDLE, "variable": "0"}


def test_opting_out_hides_the_stub(tmp_path):
    seen = run_python(LOOK_AT_TRITON, tmp_path, TRITON_BACKENDS_IN_TREE="1")
    assert seen == {**STUB_IDLE, "driver": None}


def test_idle_beside_a_build_of_vllm_for_gpus(tmp_path):
    add_distribution(tmp_path, "vllm", "0.32.0")
    assert run_python(LOOK_AT_TRITON, tmp_path, PYTHONPATH=str(tmp_path)) == STUB_IDLE


def test_gives_way_to_a_real_cpu_backend(tmp_path):
    package = tmp_path / "triton_for_cpus"
    package.mkdir()
    (package / "__init__.py").touch()
    for half, base in (("compiler", "BaseBackend"), ("driver", "DriverBase")):
        (package / f"{half}.py").write_text(
            f"from triton.backends.{half} import {base}\n"
            f"class Real({base}):\n"
            "    is_active = staticmethod(lambda: True)\n"
            "Real.__abstractmethods__ = frozenset()\n"
        )
    add_distribution(
        tmp_path, "triton-for-cpus", "1.0", "[triton.backends]\ncpu = triton_for_cpus\n"
    )
    seen = run_python(LOOK_AT_TRITON, tmp_path, PYTHONPATH=str(tmp_path))
    assert seen == {**STUB_IDLE, "driver": "Real", "driver_active": True}


ANSWER = """
import sys
from vllm import LLM, SamplingParams
import vllm_refusion
assert sys.prefix in vllm_refusion.__file__
llm = LLM(sys.argv[1], max_model_len=512, enforce_eager=True, dtype="float32")
chat = [{"role": "user", "content": sys.argv[2]}]
(output,) = llm.chat(chat, SamplingParams(max_tokens=200), use_tqdm=False)
print(output.outputs[0].text)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bdist_wheel", "sdist"])
def test_built_packages_work_without_the_tree(
    kind, tiny_checkpoint, questions, reference, tmp_path
):
    """In an environment of its own that finds all else, but not this package, in this one."""
    root, tree = Path(__file__).parents[1], tmp_path / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    build = [sys.executable, "setup.py", "-q", kind, "--dist-dir", str(tmp_path)]
    subprocess.run(build, cwd=tree, check=True)
    shutil.rmtree(tree)
    (built,) = tmp_path.glob("vllm_refusion-*")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    (packages,) = tmp_path.glob("new/lib/python*/site-packages")
    (packages / "others.pth").write_text(
        "\n".join(path for path in sys.path if "site-pack" in path)
    )
    python = tmp_path / "new/bin/python"
    install = "-m pip install --quiet --no-deps --no-build-isolation".split()
    subprocess.run([python, *install, built], cwd=tmp_path, check=True)
    answer = subprocess.run(
        [python, "-c", ANSWER, tiny_checkpoint, questions[22]],
        cwd=tmp_path, text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert answer.strip().endswith(reference.text(questions[22]))  # below vLLM's log
