"""Who may import what: the floor loads no torch, stages do not know each other, `sky` stays SkyPilot's name."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clouds.providers import CLOUDS

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("core", "clouds", "data_prep", "costs", "trainer", "launch")
TORCH_FREE = ("core", "clouds", "data_prep", "costs", "launch")
FLOORS = ("core", "clouds")  # what the packages above may import, and the second the first


def modules(package: str) -> list[str]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    return [
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files if file.name != "__init__.py"
    ]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


def import_all_and_look(names: list[str], forbidden: str) -> subprocess.CompletedProcess:
    loads = "; ".join(f"import {name}" for name in names)
    return run_python(f"import sys; {loads}; sys.exit({forbidden!r} in sys.modules)")


def test_the_floor_loads_no_torch():
    names = [name for package in TORCH_FREE for name in modules(package)] + ["cost_report"]
    result = import_all_and_look(names, "torch")
    assert result.returncode == 0, result.stderr


def test_the_check_above_can_fail():
    assert import_all_and_look(["core.data.shard"], "numpy").returncode == 1


def test_our_sky_folder_does_not_hide_skypilot(tmp_path: Path):
    """From the repository's root `import sky` must find SkyPilot, not the folder of task YAMLs."""
    assert not (REPOSITORY / "sky" / "__init__.py").exists()
    installed = tmp_path / "sky"
    installed.mkdir()
    (installed / "__init__.py").write_text("__version__ = 'the installed one'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import sky; print(sky.__version__)"
    assert run_python(code).stdout.strip() == "the installed one"


@functools.cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


@functools.cache
def imports_of(file: Path) -> frozenset[str]:
    found = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_and_never_sideways(package: str):
    below = FLOORS[: FLOORS.index(package)] if package in FLOORS else FLOORS
    allowed = {package, *below}
    for file in (REPOSITORY / package).rglob("*.py"):
        others = {name.partition(".")[0] for name in imports_of(file)} & {*PACKAGES, "demo", "tests", "bench"}
        assert others <= allowed, f"{file} imports {others - allowed}"


def test_no_modules_import_each_other_in_a_circle():
    names = {name for package in PACKAGES for name in modules(package)}
    graph = {name: imports_of(REPOSITORY / f"{name.replace('.', '/')}.py") & names for name in names}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_nothing_imports_an_entry():
    def is_entry(file: Path) -> bool:
        return "\nif __name__ == " in file.read_text()

    libraries = [package for package in PACKAGES if package != "launch"]  # whose commands build on each other
    files = [file for package in libraries for file in (REPOSITORY / package).rglob("*.py")]
    entries = {".".join(f.relative_to(REPOSITORY).with_suffix("").parts) for f in files if is_entry(f)}
    assert {"trainer.train", "data_prep.prepare", "data_prep.verify"} <= entries
    for file in files:
        assert not imports_of(file) & entries, file


# --- layers of the trainer -------------------------------------------------------------------------------------

# Each folder may import itself and the folders to its right.
LAYERS = (
    *("loop", "stages", "evals", "inference", "weights"),
    *("optim", "checkpoint", "data", "model", "distributed"),
)
ALONE = ("synthesis",)  # imports no other folder


def folders_imported(file: Path) -> set[str]:
    """The folders of trainer/ that a file imports from."""
    parts = [name.split(".") for name in imports_of(file)]
    return {part[1] for part in parts if len(part) > 1 and part[0] == "trainer"} & {*LAYERS, *ALONE}


def imports_that_point_up(module: str, imported: set[str]) -> set[tuple[str, str]]:
    folder = module.split(".")[1]
    allowed = {folder, *LAYERS[LAYERS.index(folder) + 1 :]} if folder in LAYERS else {folder}
    return {(module, other) for other in imported - allowed}


def test_folders_of_the_trainer_import_only_the_layers_below():
    folders = {path.name for path in (REPOSITORY / "trainer").iterdir() if (path / "__init__.py").exists()}
    assert folders == {*LAYERS, *ALONE}
    found = set()
    for module in modules("trainer"):
        if module.count(".") == 2:
            found |= imports_that_point_up(module, folders_imported(REPOSITORY / f"{module.replace('.', '/')}.py"))
    assert not found


@pytest.mark.parametrize(("folder", "imported"), [("data", "loop"), ("optim", "weights"), ("synthesis", "model")])
def test_the_layers_test_can_fail(folder: str, imported: str):
    assert imports_that_point_up(f"trainer.{folder}.new", {imported, folder})


def test_only_the_training_entry_imports_the_loop():
    entries = [path for path in (REPOSITORY / "trainer").glob("*.py") if "loop" in folders_imported(path)]
    assert [path.name for path in entries] == ["train.py"]


def test_package_markers_are_empty():
    for package in PACKAGES:
        for marker in (REPOSITORY / package).rglob("__init__.py"):
            assert not marker.read_text().strip(), marker


# --- stores ----------------------------------------------------------------------------------------------------

# How places are spelt, and what opens them. Everything else asks the store.
KNOW_SCHEMES = {"core/urls.py", "core/bucket.py", "core/stores/hub.py", "core/stores/opener.py"}
# They run with a node's own Python, outside of the image and of all packages.
KNOW_SCHEMES |= {"launch/node/arrival.py", "launch/node/switch.py"}


def test_only_the_opener_branches_on_a_scheme():
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            literals = [
                node.value for node in nodes_of(file) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            name = file.relative_to(REPOSITORY).as_posix()
            if schemes := [text for text in literals if re.fullmatch(r"(s3|gs|az|hf)(://)?", text)]:
                found[name] = schemes
    # Azure's command line, and a service in botocore's words.
    assert (found.pop("core/stores/credentials.py"), found.pop("clouds/aws.py")) == (["az"], ["s3"])
    assert set(found) == KNOW_SCHEMES


def test_only_the_stores_import_what_reads_them():
    allowed = {
        "obstore": {"core/stores/credentials.py", "core/stores/opener.py", "core/stores/remote.py"},
        "botocore": {"core/stores/credentials.py", "clouds/aws.py", "clouds/ec2.py", "launch/role.py"},
        "boto3": {"core/stores/credentials.py", "clouds/aws.py", "launch/role.py"},
        "fsspec": {"data_prep/sources/streamed.py"},
        "s3fs": set(),
    }
    found: dict[str, set[str]] = {name: set() for name in allowed}
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            for name in {name.partition(".")[0] for name in imports_of(file)} & set(allowed):
                found[name].add(file.relative_to(REPOSITORY).as_posix())
    assert found == allowed


# A storage service is called aws, too: that of S3.
KNOW_SERVICES = {"core/environment.py", "core/stores/aws.py", "costs/discover.py"}


def test_only_the_providers_spell_the_names_of_clouds():
    """Task files and the catalog apart. Everything else asks clouds/providers.py."""
    names = "|".join(CLOUDS)
    found = set()
    for package in set(PACKAGES) - {"clouds"}:
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in nodes_of(file):
                if isinstance(node, ast.Constant) and re.fullmatch(names, str(node.value), re.I):
                    found.add(file.relative_to(REPOSITORY).as_posix())
    assert found == KNOW_SERVICES


IMAGES = {
    "prep": ("core", "clouds", "costs", "launch", "data_prep"),
    "train": ("core", "clouds", "costs", "launch", "trainer"),
}
# Imported where they are installed only: on the user's computer, or in an image to which they were added.
NOT_IN_IMAGES = {"apprise", "boto3", "gguf", "lm_eval", "matplotlib", "mlflow", "prompt_toolkit", "sky", "transformers"}
NOT_IN_IMAGES |= {"tensorboard", "wandb"}
DISTRIBUTIONS = {"yaml": "pyyaml", "dotenv": "python-dotenv", "huggingface_hub": "huggingface-hub"}
# launch.node.preflight asks torch about GPUs, on machines that have some; core.xxh3 sums checkpoints; trainer.metrics
# writes parquet on the user's computer.
ELSEWHERE = {"prep": {"torch", "xxhash"}, "train": {"pyarrow"}}


def third_party(folders: tuple[str, ...]) -> set[str]:
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")] + [
        REPOSITORY / "cost_report.py"
    ]
    found = {name.partition(".")[0] for file in files for name in imports_of(file)}
    return found - set(sys.stdlib_module_names) - set(PACKAGES) - NOT_IN_IMAGES - {"cost_report"}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_what_its_programs_import_and_nothing_else(image: str):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {"prep": ("prep",), "train": ("train", "fp8")}[image]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines}
    imported = {DISTRIBUTIONS.get(name, name) for name in third_party(IMAGES[image])}
    assert imported - ELSEWHERE[image] == declared


def test_gpu_images_hold_no_other_reader_of_buckets():
    for name in ("train-cuda", "train-cpu"):
        pinned = set(re.findall(r"^([\w.-]+)==", (REPOSITORY / f"requirements/{name}.txt").read_text(), re.M))
        assert "obstore" in pinned
        assert not pinned & {"boto3", "s3fs", "aiobotocore", "gcsfs", "adlfs"}


def test_trackers_of_the_image_keep_the_versions_of_its_other_packages():
    def pins(name: str) -> set[tuple[str, str]]:
        text = (REPOSITORY / f"requirements/{name}.txt").read_text()
        return set(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))

    trackers, train = pins("track"), pins("train-cuda")
    assert {"mlflow-skinny", "tensorboard", "wandb"} <= {name for name, _ in trackers}
    both = {name for name, _ in trackers} & {name for name, _ in train}
    assert "numpy" in both
    assert {pin for pin in trackers if pin[0] in both} == {pin for pin in train if pin[0] in both}
