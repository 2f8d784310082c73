"""The images: the Dockerfile's rules, always; and both images really built, `make test-image` (as root, with buildah).

The build takes the CPU build of torch. Its base is a Debian 12 made here with debootstrap, where the one that the
Dockerfile names by digest cannot be pulled; what is in the images above the base is the same.
"""

import functools
import glob
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tests import missing

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("prep", "train")
HERE = "localhost/base:bookworm"

# Names of files that no image needs, and what keys look like inside of any file. The first line of a PEM block alone
# is no key: libraries name it to recognise one (google-auth, which the trackers bring).
FORBIDDEN_NAMES = re.compile(
    r"(^|/)(\.env|\.netrc|\.pypirc|pip\.conf|\.git|\.aws|\.ssh|id_(rsa|ed25519)|\.sky|\.cache|__pycache__/launch|"
    r"tests|bench)(/|$)|^root/\..*history$|var/lib/apt/lists/.+Packages|var/cache/apt/archives/.+\.deb$"
)
KEYS = re.compile(
    rb"-----BEGIN (RSA |EC |OPENSSH )?PRIVATE KEY-----(\\n|\s)+[A-Za-z0-9+/=]{32}|"
    rb"\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{34}\b|\bghp_[A-Za-z0-9]{36}\b"
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
    assert {".env*", "/.git", "/.venv", "/.venv-launch", "/wandb", "*.pem"} <= left_out
    assert not {line for line in left_out if (ROOT / line.strip("/")).name in ("launch", "core", "trainer", "sky")}


def test_no_key_that_lies_about_goes_to_a_node(tmp_path):
    """Made by the patterns as SkyPilot reads them (sky/data/storage_utils.py)."""
    keys = ".env .env.local .env~ .envrc key.pem deep/in/key.pem service-account.json deep/service-account-1.json"
    keys += " my-credentials.json id_rsa id_rsa.pub id_ed25519 .netrc tls.key wandb/run/config.yaml mlruns/0/meta.yaml"
    ours = ["launch/node/container.sh", "core/secrets.py", "core/stores/credentials.py", "sky/smoke-cpu.yaml"]
    for name in [*keys.split(), *ours]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    left_out = set()
    for line in (ROOT / ".skyignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = f".{line}" if line.startswith("/") else f"**/{line}"
            left_out |= {Path(each).resolve() for each in glob.glob(str(tmp_path / pattern), recursive=True)}

    def goes(name: str) -> bool:
        path = tmp_path / name
        return not left_out & {path.resolve(), *path.resolve().parents}

    assert [name for name in keys.split() if goes(name)] == []
    assert [name for name in ours if not goes(name)] == []
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"**/.env*", "**/*.pem", "**/service-account*.json"} <= set(ignored[ignored.index("!cost_report.py") :])


def test_the_health_check_needs_neither_torch_nor_a_gpu(tmp_path):
    """It runs every five minutes beside the training, where a second CUDA context would take memory."""
    assert (
        re.findall(r"^HEALTHCHECK .* CMD (.+)$", DOCKERFILE, re.M)
        == ['["python", "-m", "launch.node.selftest", "--health"]'] * 2
    )
    given = {**os.environ, **missing.environment(tmp_path, (*missing.PACKAGES, "torch", "numpy", "obstore"))}
    for target in TARGETS:
        done = subprocess.run(
            [sys.executable, "-m", "launch.node.selftest", "--health"],
            cwd=ROOT,
            env={**given, "IMAGE_TARGET": target},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(f"{target} image is healthy: process 1 is "), done.stderr


def with_venv() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


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
        said = run("buildah", "run", "--isolation", "chroot", container, "--", "python", "-m", "launch.node.selftest")
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
    """Prints what docs/internals.md quotes: compressed megabytes of each layer."""
    for target, image in built.items():
        sizes = [layer.stat().st_size / 1e6 for layer in layers(image)]
        print(f"{target}: {sum(sizes):.0f} MB compressed; layers {', '.join(f'{size:.0f}' for size in sizes)}")
        assert sum(sizes) > 0


# --- NVIDIA's compatibility package, from a repository made here ---------------------------------------------------

PACKAGE = """Package: cuda-compat-13-0
Version: 580.95.05-1
Architecture: {architecture}
Maintainer: nobody <nobody@example.org>
Description: what NVIDIA's package holds, without its content
"""


@pytest.fixture
def repository(tmp_path):
    """A function that serves an apt repository, signed by a new key, whose key file holds all keys made so far.

    Returns the repository's address and the key's fingerprint.
    """
    if not shutil.which("gpg"):
        pytest.skip("needs gpg")
    keys = tmp_path / "gnupg"
    keys.mkdir(mode=0o700)
    gpg = (
        "gpg",
        "--homedir",
        str(keys),
        "--batch",
        "--yes",
        "--quiet",
        "--pinentry-mode",
        "loopback",
        "--passphrase",
        "",
    )
    servers = []

    def serve() -> tuple[str, str]:
        name = f"key-{len(servers)}@example.org"
        run(*gpg, "--quick-generate-key", name, "rsa2048", "sign", "never")
        listed = run(*gpg, "--with-colons", "--list-keys", name)
        fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        top = tmp_path / f"repository-{len(servers)}"
        architecture = run("dpkg", "--print-architecture").strip()
        folder = top / {"amd64": "debian12/x86_64", "arm64": "ubuntu2404/sbsa"}[architecture]
        folder.mkdir(parents=True)
        control = PACKAGE.format(architecture=architecture)
        content = tmp_path / f"content-{len(servers)}"
        (content / "DEBIAN").mkdir(parents=True)
        (content / "DEBIAN/control").write_text(control)
        libraries = content / "usr/local/cuda-13.0/compat"
        libraries.mkdir(parents=True)
        (libraries / "libcuda.so.580.95.05").write_text("a library\n")
        (libraries / "libcuda.so.1").symlink_to("libcuda.so.580.95.05")
        run("dpkg-deb", "--root-owner-group", "--build", str(content), str(folder / "package.deb"))
        package = (folder / "package.deb").read_bytes()
        digest = hashlib.sha256(package).hexdigest()
        index = f"{control}Filename: ./package.deb\nSize: {len(package)}\nSHA256: {digest}\n".encode()
        (folder / "Packages").write_bytes(index)
        digest = hashlib.sha256(index).hexdigest()
        (folder / "Release").write_text(f"Origin: test\nSHA256:\n {digest} {len(index)} Packages\n")
        run(
            *gpg,
            "--local-user",
            fingerprint,
            "--clearsign",
            "--output",
            str(folder / "InRelease"),
            str(folder / "Release"),
        )
        (folder / "3bf863cc.pub").write_text(run(*gpg, "--armor", "--export"))
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(top))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", fingerprint

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def container(built):
    """A function that runs a command as root in a container of the train image. Returns its code and output."""
    name = run("buildah", "from", "--pull-never", "localhost/train").strip()

    def execute(*command: str, **environment: str) -> tuple[int, str]:
        settings = [f"{key}={value}" for key, value in environment.items()]
        inside = ["buildah", "run", "--user", "root", "--isolation", "chroot", name, "--", "env", *settings, *command]
        done = subprocess.run(inside, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    yield execute
    run("buildah", "rm", name)


@pytest.mark.image
def test_nvidias_package_comes_from_a_signed_repository(container, repository):
    address, fingerprint = repository()
    assert container("test", "-e", "/usr/local/cuda-13.0")[0] == 1, "not with TORCH=cpu"
    settings = {"CUDA_REPOSITORY": address, "CUDA_KEY": fingerprint}
    code, output = container("bash", "requirements/cuda-compat.sh", **settings)
    assert code == 0, output
    code, output = container("cat", "/usr/local/cuda-13.0/compat/libcuda.so.1", "/usr/local/cuda/compat/libcuda.so.1")
    assert (code, output) == (0, "a library\na library\n")
    code, output = container("sh", "-c", "ls /etc/apt/keyrings /etc/apt/sources.list.d /var/lib/apt/lists")
    assert "nvidia" not in output


@pytest.mark.image
def test_a_repository_that_another_key_signed_is_refused(container, repository):
    """Also if the file of keys, which comes from the same place, holds that key beside NVIDIA's."""
    _, trusted = repository()
    address, _ = repository()
    code, output = container("bash", "requirements/cuda-compat.sh", CUDA_REPOSITORY=address, CUDA_KEY=trusted)
    assert code != 0
    assert "is not signed" in output
    assert "CUDA_COMPAT=no leaves it out" in output
    assert container("test", "-e", "/usr/local/cuda-13.0")[0] == 1


@pytest.mark.image
def test_a_repository_out_of_reach_names_the_way_around_it(container):
    settings = {"CUDA_REPOSITORY": "http://127.0.0.1:9", "CUDA_KEY": "0" * 40}
    code, output = container("bash", "requirements/cuda-compat.sh", **settings)
    assert code != 0
    assert "from http://127.0.0.1:9; the lines above say why. --build-arg CUDA_COMPAT=no leaves it out" in output


def test_nvidias_key_is_pinned_by_its_fingerprint_and_the_package_is_left_out_without_cuda():
    assert re.search(r"^ARG CUDA_KEY=EB693B3035CD5710E231E123A4B469963BF863CC$", DOCKERFILE, re.M)
    assert re.search(
        r"^ARG CUDA_REPOSITORY=https://developer\.download\.nvidia\.com/compute/cuda/repos$", DOCKERFILE, re.M
    )
    assert re.search(r"yes \| cuda\) bash requirements/cuda-compat\.sh ;;", DOCKERFILE)


def test_the_scan_can_find_something():
    """Without this, the scans above could not fail."""
    assert FORBIDDEN_NAMES.search("app/.env")
    assert FORBIDDEN_NAMES.search("root/.cache/pip/http/x")
    assert not FORBIDDEN_NAMES.search("app/core/settings/loader.py")
    assert KEYS.search(io.BytesIO(b"key = AKIA" + b"A" * 16).read())
    for line_end in (b"\n", b"\\n"):  # a key file, and the key inside of a JSON string
        assert KEYS.search(b"-----BEGIN RSA PRIVATE KEY-----" + line_end + b"MIIE" * 16)
    assert not KEYS.search(b'PEM_FIRST_LINE = b"-----BEGIN RSA PRIVATE KEY-----"')
