"""The rules of the house: who imports whom, what is packaged, and what the files hold."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Folders of code, by the package that they are imported as.
FOLDERS = {
    "eldric": "eldric",
    "engine": "eldric.engine",
    "transport": "eldric.transport",
    "cli": "eldric.cli",
    "tests": "tests",
    "benchmarks": "benchmarks",
}
ROLES = ("controller", "worker", "data", "router", "edge", "client")
LONGEST_FILE = 500


def source_files(*folders: str) -> Iterator[Path]:
    """Python files, each once: the links eldric/engine, eldric/transport and eldric/cli are not followed."""
    for folder in folders or FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def package_of(path: Path) -> str:
    """The package that a file's module lies in, e.g. "eldric.engine.ggml"."""
    top, *rest = path.relative_to(ROOT).parts[:-1]
    return ".".join([FOLDERS[top], *rest])


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, also within functions, and the lines. Relative imports keep their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from eldric import engine` imports a package, `from eldric import PROTOCOL` a name
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "eldric" else [module]
            yield from ((name, node.lineno) for name in names)


def allowed(package: str, module: str) -> bool:
    """Whether a module of `package` may import `module`: cli -> eldric -> (engine, transport) -> protos."""
    if module.startswith(".") or module.partition(".")[0] in ("engine", "transport", "cli"):
        return False
    if not is_in(module, "eldric") or package.startswith(("tests", "benchmarks", "eldric.cli")):
        return True
    if is_in(package, "eldric.v1"):
        return is_in(module, "eldric.v1")
    for lower in ("eldric.engine", "eldric.transport"):
        if is_in(package, lower):
            return is_in(module, lower) or is_in(module, "eldric.v1")
    if is_in(module, "eldric.cli"):
        return False
    if is_in(module, "eldric.transport"):
        return is_in(package, "eldric.worker")  # where engine and transport meet
    role = module.split(".")[1] if module.count(".") else ""
    shared = package == "eldric" or is_in(package, "eldric.security")
    return not (shared and role in ROLES)  # what every node shares knows no kind of node


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in source_files()
        for module, line in imports_of(path)
        if not allowed(package_of(path), module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "module", "fine"),
    [
        ("eldric.engine", "eldric.v1.frame_pb2", True),
        ("eldric.engine", "eldric.transport.frame", False),
        ("eldric.engine.ggml", "eldric.errors", False),
        ("eldric.engine", "eldric.engine.errors", True),
        ("eldric.transport", "eldric.engine.errors", False),
        ("eldric.transport", "zmq", True),
        ("eldric.worker", "eldric.transport.base", True),
        ("eldric.router", "eldric.transport.base", False),
        ("eldric.router", "eldric.engine.chat", True),
        ("eldric.router", "eldric.cli.main", False),
        ("eldric", "eldric.worker.config", False),
        ("eldric.cli", "eldric.worker.main", True),
        ("eldric.worker", "engine.stage", False),
        ("eldric.worker", ".stage", False),
        ("tests.unit", "transport", False),
        ("eldric.v1", "eldric.errors", False),
    ],
)
def test_import_rules_tell_right_from_wrong(package: str, module: str, fine: bool) -> None:
    assert allowed(package, module) is fine


def test_packages_are_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    folders = {
        package_of(path)
        for path in source_files("eldric", "engine", "transport", "cli")
        if path.name == "__init__.py" or package_of(path) == "eldric.v1"
    }
    assert sorted(listed) == sorted(folders)
    mapped = project["tool"]["setuptools"]["package-dir"]
    assert mapped == {package: folder for folder, package in FOLDERS.items() if package.count(".")}


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in source_files("eldric", "engine", "transport", "cli")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_entry_points_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = [*project["scripts"].values()]
    for group in project["entry-points"].values():
        points.extend(group.values())
    for point in points:
        module, name = point.split(":")
        # In a process of its own: what an extra loads may not get on with what other tests have loaded here.
        script = f"import importlib; getattr(importlib.import_module({module!r}), {name!r})"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        said = [f"pip install 'eldric[{extra}]'" in done.stderr for extra in project["optional-dependencies"]]
        assert done.returncode == 0 or any(said), f"{point}: {done.stderr}"


def test_public_names_are_there() -> None:
    """Every name in an `__all__` can be imported."""
    for path in source_files("eldric", "engine", "transport", "cli"):
        if "__all__" not in path.read_text() or is_generated(path):
            continue
        name = package_of(path) if path.stem == "__init__" else f"{package_of(path)}.{path.stem}"
        module = importlib.import_module(name)
        assert [each for each in module.__all__ if not hasattr(module, each)] == [], name


def test_import_of_the_package_is_light() -> None:
    heavy = "{'grpc', 'google', 'numpy', 'starlette', 'uvicorn', 'cryptography', 'zmq', 'tokenizers'}"
    script = f"import sys, eldric; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def is_generated(path: Path) -> bool:
    return path.parent == ROOT / "eldric" / "v1"


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in source_files()
        if not is_generated(path) and path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in source_files()
        if not is_generated(path)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def text_files() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve():
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue  # a model, a picture


#: Paths of one machine, and words about how the files came to be.
FOREIGN = re.compile(
    r"(?<![\w.~-])/(?:work|tmp|root|home/\w+)/|\b(?:workplace|this session|the brief)\b", re.IGNORECASE
)


def test_files_speak_of_the_project_alone() -> None:
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path, text in text_files() for match in FOREIGN.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["see /work/main", "'/tmp/x'", "/home/me/x", "in this session"])
def test_foreign_words_are_found(text: str) -> None:
    assert FOREIGN.search(text)


@pytest.mark.parametrize("text", ["https://host/tmp/x", "~/tmp/x", "a TLS session", "the network/work/x", "briefly"])
def test_ordinary_words_pass(text: str) -> None:
    assert not FOREIGN.search(text)
