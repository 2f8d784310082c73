"""The images: the Dockerfile's rules, always; and both images really built, `make test-image` (as root, with buildah).

The build takes the CPU build of torch. Its base is a Debian 12 made here with debootstrap, where the one that the
Dockerfile names by digest cannot be pulled; what is in the images above the base is the same.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("prep", "train")
HERE = "localhost/base:bookworm"

# Names of files that no image needs, and what keys look like inside of any file.
FORBIDDEN_NAMES = re.compile(
    r"(^|/)(\.env|\.netrc|\.pypirc|pip\.conf|\.git|\.aws|\.ssh|id_(rsa|ed25519)|\.sky|\.cache|__pycache__/launch|"
    r"tests|bench)(/|$)|^root/\..*history$|var/lib/apt/lists/.+Packages|var/cache/apt/archives/.+\.deb$"
)
KEYS = re.compile(
    rb"-----BEGIN (RSA |EC |OPENSSH )?PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{34}\b|"
    rb"\bghp_[A-Za-z0-9]{36}\b"
)
# Not ours, and no secrets: test keys and examples that Python packages carry.
KEYS_OF_PACKAGES = re.compile(r"^opt/venv/lib/python3\.11/site-packages/(aiohttp|botocore|cryptography|torch)/")


def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, env=with_venv())
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_base_is_pinned_by_digest_and_packages_by_hash():
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.M)
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert installs
    for line in installs:
        assert "--require-hashes" in line or "torch.constraint" in line


def test_only_what_an_image_is_made_of_enters_the_build():
    copied = {word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for word in line.split()[:-1]}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert {word.split("/")[0] for word in copied} == allowed


def test_written_for_old_builders():
    """BuildKit of Docker 20.10 and buildah 1.28 know neither heredocs nor COPY --link."""
    assert "<<" not in DOCKERFILE
    assert "--link" not in DOCKERFILE


def test_the_working_tree_goes_to_a_node_without_secrets():
    """What .skyignore leaves out, by the very code that SkyPilot uses: glob, with ** before a name without a slash."""
    lines = [line.strip() for line in (ROOT / ".skyignore").read_text().splitlines()]
    left_out = {line for line in lines if line and not line.startswith("#")}
    assert {".env", "/.git", "/.venv", "/.venv-launch"} <= left_out
    assert not {line for line in left_out if (ROOT / line.strip("/")).name in ("launch", "core", "trainer", "sky")}


def with_venv() -> dict[str, str]:
    return {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}


# --- built for real --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Target → folder of its image in OCI layout."""
    if not shutil.which("buildah") or os.geteuid() != 0:
        pytest.skip("needs root and buildah (apt-get install buildah debootstrap)")
    base = find_base(tmp_path_factory)
    folder = tmp_path_factory.mktemp("oci")
    found = {}
    for target in TARGETS:
        arguments = ["--format", "docker", "--isolation", "chroot", "--layers", "--target", target, "-t", target]
        arguments += [
            "--build-arg",
            f"BASE_IMAGE={base}",
            "--build-arg",
            "TORCH=cpu",
            "--build-arg",
            "GIT_REVISION=abc",
        ]
        links = os.environ.get("PIP_FIND_LINKS", "")
        if Path(links).is_dir() and links:
            arguments += ["-v", f"{links}:/wheels:ro", "--build-arg", "PIP_FIND_LINKS=/wheels"]
        run("buildah", "build", *arguments, *certificates(), ".")
        run("buildah", "push", target, f"oci:{folder / target}:latest")
        found[target] = folder / target
    return found


def find_base(tmp_path_factory) -> str:
    """The Dockerfile's own base if it can be pulled, else a Debian 12 of this machine's mirror."""
    named = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.M).group(1)
    if (
        subprocess.run(["buildah", "pull", "--quiet", f"docker.io/library/{named}"], capture_output=True).returncode
        == 0
    ):
        return f"docker.io/library/{named}"
    if subprocess.run(["buildah", "inspect", "--type", "image", HERE], capture_output=True).returncode:
        root = tmp_path_factory.mktemp("base") / "rootfs"
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(root))
        for cache in ("var/cache/apt/archives", "var/lib/apt/lists"):  # which Debian's published images do not hold
            shutil.rmtree(root / cache)
        container = run("buildah", "from", "--pull-never", "scratch").strip()
        run("buildah", "add", container, str(root), "/")
        run("buildah", "commit", container, HERE)
        run("buildah", "rm", container)
    return HERE


def certificates() -> list[str]:
    """A private CA between here and the package index is mounted for the build, not copied."""
    file = os.environ.get("PIP_CERT")
    mounted = "/etc/ssl/build-ca.pem"
    return ["-v", f"{file}:{mounted}:ro", "--build-arg", f"PIP_CERT={mounted}"] if file else []


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def layers(image: Path) -> list[Path]:
    index = json.loads((image / "index.json").read_text())
    manifest = json.loads(blob(image, index["manifests"][0]["digest"]).read_text())
    return [blob(image, layer["digest"]) for layer in manifest["layers"]]


def blob(image: Path, digest: str) -> Path:
    return image / "blobs" / digest.replace(":", "/")


def files(image: Path):
    """(name, member, archive) of every file in every layer, deleted ones included."""
    for layer in layers(image):
        with tarfile.open(layer) as archive:
            for member in archive:
                yield member.name.removeprefix("./"), member, archive


@pytest.mark.image
@pytest.mark.parametrize("target", TARGETS)
def test_image_passes_its_self_test(built, target):
    container = run("buildah", "from", "--pull-never", f"localhost/{target}").strip()
    try:
        said = run("buildah", "run", "--isolation", "chroot", container, "--", "python", "-m", "launch.selftest")
        assert said.startswith(f"{target} image works: Python 3.11")
        assert said.strip().endswith("revision abc")
        config = json.loads(run("buildah", "inspect", "--type", "image", target))["Docker"]["config"]
        assert config["User"] == "10001:10001"
        assert config["Labels"]["org.opencontainers.image.revision"] == "abc"
        assert config["Healthcheck"]["Test"][0] == "CMD"
    finally:
        run("buildah", "rm", container)


@pytest.mark.image
def test_prep_image_holds_no_torch(built):
    assert not [name for name, _, _ in files(built["prep"]) if re.search(r"site-packages/torch(/|-)", name)]
    assert any("site-packages/pyarrow/" in name for name, _, _ in files(built["prep"]))


@pytest.mark.image
@pytest.mark.parametrize("target", TARGETS)
def test_no_layer_holds_a_secret_or_a_cache(built, target):
    found = []
    for name, member, archive in files(built[target]):
        if not member.isfile() or "/.wh." in name:  # .wh. marks what a layer deletes
            continue
        if FORBIDDEN_NAMES.search(name) and not name.startswith("opt/venv/lib"):
            found.append(name)
        if member.size < 1 << 20 and not KEYS_OF_PACKAGES.search(name):
            content = archive.extractfile(member).read()
            found += [f"{name}: {match.group()[:12]!r}" for match in [KEYS.search(content)] if match]
    assert found == []


@pytest.mark.image
def test_sizes_are_stated(built):
    """Prints what docs/launch.md quotes: compressed megabytes of each layer."""
    for target, image in built.items():
        sizes = [layer.stat().st_size / 1e6 for layer in layers(image)]
        print(f"{target}: {sum(sizes):.0f} MB compressed; layers {', '.join(f'{size:.0f}' for size in sizes)}")
        assert sum(sizes) > 0


def test_the_scan_can_find_something():
    """Without this, the scans above could not fail."""
    assert FORBIDDEN_NAMES.search("app/.env")
    assert FORBIDDEN_NAMES.search("root/.cache/pip/http/x")
    assert not FORBIDDEN_NAMES.search("app/core/config.py")
    assert KEYS.search(io.BytesIO(b"key = AKIA" + b"A" * 16).read())
