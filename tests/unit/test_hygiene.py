"""Rules of the house that no linter knows. Each check takes a folder, so that each is shown to catch what it is for."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("llava_core", "backends", "plugins", "examples")
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt", ".ci", "docs")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

DEVICES = "cuda|npu|nccl|hccl|xpu|mps|cann|ascend"
DEVICE_WORD = re.compile(rf"\b({DEVICES})\b", re.IGNORECASE)
DEVICE_PART = re.compile(rf"(^|_)({DEVICES})(_|$)")
# A path of the machine it was written on; "docs/work/" and "$HOME/work/" are none.
MACHINE_PATH = re.compile(r"(?<![\w.~})-])/(work|root)/")

# Files that may catch everything, and why. Each of them reports what it caught.
BLIND_EXCEPT_ALLOWED = {
    "llava_core/plugins/registry.py": "the plugin boundary: a broken plugin is named and takes no other down",
    "llava_core/backend/kernels.py": "the plugin boundary: a kernel whose import fails is rejected with that reason",
    "llava_core/engine/hardware.py": "the plugin boundary: a backend whose probe fails is unavailable for that reason",
    "llava_core/plan/of_run.py": "the plugin boundary: a run whose step cannot be simulated says why, and starts",
    "llava_core/train/saver.py": "the thread boundary: what a save raises is raised again where the save is awaited",
    "llava_core/testing/conformance/check.py": "the vendor boundary: a check that crashes fails, with its traceback",
}

# What `import llava_core` and registering a backend must not load: each costs a user of `--help` a second or a crash.
HEAVY = ("torch", "transformers", "numpy", "pydantic", "omegaconf", "tokenizers", "PIL", "matplotlib", "safetensors")
VENDOR = ("torch_npu", "transformer_engine", "flash_attn", "apex", "liger_kernel", "triton", "mindspeed", "megatron")


def python_files(root: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The name, relative to `root`, and the text of each Python file under the folders that exist."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def device_words(root: Path) -> list[str]:
    """Where the core names hardware: in a string that is no docstring, an attribute, a name or an import."""
    found = []
    for name, text in python_files(root, ("llava_core",)):
        tree = ast.parse(text)
        docstrings = {
            id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.expr, ast.stmt)) and id(node) not in docstrings and (said := _device_word(node)):
                found.append(f"{name}:{node.lineno} says {said!r}")
    return found


def _device_word(node: ast.AST) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text if DEVICE_WORD.search(text) else None
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name if DEVICE_PART.search(name) else None
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in aliases)]
            return next((n for n in names if any(DEVICE_PART.search(part) for part in n.split("."))), None)
    return None


def oversized(root: Path) -> list[str]:
    """Files and functions past the lengths at which they want to be two."""
    found = []
    for name, text in python_files(root, CODE):
        if (num_lines := len(text.splitlines())) > MAX_FILE_LINES:
            found.append(f"{name}: {num_lines} lines; at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno} {node.name}: {num_lines} lines; at most {MAX_FUNCTION_LINES}")
    return found


def blind_excepts(root: Path, allowed: dict[str, str]) -> list[str]:
    """Where every error is caught and not raised again: nowhere but in the allowed files, and never in silence."""
    found = []
    for name, text in python_files(root, CODE):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and _is_blind(node.type):
                if _does_nothing(node):
                    found.append(f"{name}:{node.lineno} swallows every error")
                elif not isinstance(node.body[-1], ast.Raise) and name not in allowed:
                    found.append(f"{name}:{node.lineno} catches every error; name those that are meant")
            elif isinstance(node, ast.Call) and _suppresses_everything(node):
                found.append(f"{name}:{node.lineno} swallows every error")
    return found


def _is_blind(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def _does_nothing(node: ast.ExceptHandler) -> bool:
    return all(
        isinstance(n, (ast.Pass, ast.Continue)) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        for n in node.body
    )


def _suppresses_everything(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name == "suppress" and any(_is_blind(arg) for arg in node.args)


def machine_paths(root: Path) -> list[str]:
    """Where prose or code names an absolute path of the machine it was written on."""
    found = []
    for entry in (*PROSE, *CODE, "benchmarks"):
        start = root / entry
        for path in [start] if start.is_file() else sorted(p for p in start.rglob("*") if p.is_file()):
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                continue  # a picture or an archive
            found += [
                f"{path.relative_to(root).as_posix()}:{number} {line.strip()}"
                for number, line in enumerate(lines, start=1)
                if MACHINE_PATH.search(line)
            ]
    return found


def run_python(code: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints; `path` is put first on its module path."""
    environment = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_imports(module: str, path: Path | None = None) -> list[str]:
    """The top-level packages, of those that must wait until they are needed, that importing `module` loads."""
    loaded = run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))", path)
    top_level = {name.partition(".")[0] for name in json.loads(loaded)}
    return sorted(top_level & {*HEAVY, *VENDOR})


IMPORT_ALL = """
import importlib, json, pkgutil, traceback
failures = []
package = importlib.import_module({package!r})
for info in pkgutil.walk_packages(package.__path__, {package!r} + ".", onerror=lambda name: None):
    if not info.name.endswith(".__main__"):
        try:
            importlib.import_module(info.name)
        except BaseException:
            failures.append(info.name + ": " + traceback.format_exc())
print("\\n" + json.dumps(failures))
"""


def import_failures(package: str, path: Path | None = None) -> list[str]:
    """The modules of a package, itself included, that a fresh interpreter cannot import, each with its traceback."""
    return json.loads(run_python(IMPORT_ALL.format(package=package), path).splitlines()[-1])


def write(root: Path, name: str, text: str) -> Path:
    """Puts a file into a tree made for one test."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return root


def test_core_names_no_device() -> None:
    assert device_words(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        'device = "cuda"',
        'device = f"npu:{0}"',
        'raise ValueError("install CANN first")',
        "torch.cuda.synchronize()",
        "torch.npu.synchronize()",
        "model.cuda()",
        "model.npu()",
        "tensor.is_cuda",
        "from torch import cuda",
        "import torch.mps",
    ],
)
def test_a_device_word_is_caught(tmp_path: Path, line: str) -> None:
    write(tmp_path, "llava_core/a.py", f'"""Runs on cuda."""\n{line}\n')
    (found,) = {entry.partition(" ")[0] for entry in device_words(tmp_path)}
    assert found == "llava_core/a.py:2"


def test_a_word_that_only_contains_a_device_is_not_caught(tmp_path: Path) -> None:
    write(tmp_path, "llava_core/a.py", 'def f():\n    """On npu too."""\n    return "maps", "scanned", timps, inputs\n')
    write(tmp_path, "backends/llava_cuda/a.py", 'device = "cuda"\n')
    assert device_words(tmp_path) == []


@pytest.mark.parametrize("module", ["llava_core", "llava_core.plugins", "llava_cpu.plugin", "llava_cuda.plugin"])
def test_import_is_light(module: str) -> None:
    assert heavy_imports(module) == []


def test_a_heavy_import_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "leaky/__init__.py", "import numpy.linalg\n")
    assert heavy_imports("leaky", tmp_path) == ["numpy"]


def test_files_and_functions_are_short() -> None:
    assert oversized(ROOT) == []


def test_a_long_function_and_a_long_file_are_caught(tmp_path: Path) -> None:
    body = "    x = 1\n"
    write(tmp_path, "examples/fits.py", "def f():\n" + body * (MAX_FUNCTION_LINES - 1))
    write(tmp_path, "examples/function.py", "def f():\n" + body * MAX_FUNCTION_LINES)
    write(tmp_path, "llava_core/file.py", "x = 1\n" * (MAX_FILE_LINES + 1))
    assert [entry.split(":")[0] for entry in oversized(tmp_path)] == ["llava_core/file.py", "examples/function.py"]


def test_no_error_is_swallowed() -> None:
    assert blind_excepts(ROOT, BLIND_EXCEPT_ALLOWED) == []


def test_every_allowed_file_exists() -> None:
    assert [name for name in BLIND_EXCEPT_ALLOWED if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as error", " (ValueError, Exception)"])
def test_a_blind_except_is_caught(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "llava_core/a.py", f"try:\n    f()\nexcept{kind}:\n    g()\n")
    assert blind_excepts(tmp_path, {}) == ["llava_core/a.py:3 catches every error; name those that are meant"]
    assert blind_excepts(tmp_path, {"llava_core/a.py": "a reason"}) == []


@pytest.mark.parametrize("body", ["pass", "...", "'not now'"])
def test_a_swallowed_error_is_caught_even_where_blind_excepts_are_allowed(tmp_path: Path, body: str) -> None:
    write(tmp_path, "plugins/a.py", f"try:\n    f()\nexcept Exception:\n    {body}\n")
    write(tmp_path, "plugins/b.py", "with contextlib.suppress(Exception):\n    f()\n")
    found = blind_excepts(tmp_path, {"plugins/a.py": "a reason", "plugins/b.py": "a reason"})
    assert found == ["plugins/a.py:3 swallows every error", "plugins/b.py:1 swallows every error"]


def test_a_named_error_and_one_raised_again_are_no_blind_excepts(tmp_path: Path) -> None:
    write(
        tmp_path,
        "examples/a.py",
        "try:\n    f()\nexcept KeyError:\n    pass\nexcept BaseException:\n    g()\n    raise\n",
    )
    assert blind_excepts(tmp_path, {}) == []


def test_no_machine_path() -> None:
    assert machine_paths(ROOT) == []


@pytest.mark.parametrize("name", ["README.md", "docs/guide/start.md", "llava_core/a.py", "examples/a.yaml", ".ci/run"])
def test_a_machine_path_is_caught(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "see docs/work/ and $HOME/root/\npath: /work/here\n")
    write(tmp_path, "docs/picture.png", "")
    (tmp_path / "docs/picture.png").write_bytes(b"\xff\xfe\x00/root/")
    assert machine_paths(tmp_path) == [f"{name}:2 path: /work/here"]


def test_no_connection_leaves_the_machine() -> None:
    with pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()


def test_every_module_of_the_core_can_be_imported() -> None:
    assert import_failures("llava_core") == []


def test_a_module_that_cannot_be_imported_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "walked/__init__.py", "")
    write(tmp_path, "walked/good.py", "print('noise')\n")
    write(tmp_path, "walked/deep/__init__.py", "")
    write(tmp_path, "walked/deep/bad.py", "import no_such_module\n")
    (failure,) = import_failures("walked", tmp_path)
    assert failure.startswith("walked.deep.bad: ")
    assert "no_such_module" in failure
