"""Every check of this repository, one session each: ``python3 noxfile.py -s tests``.

Needs Python and nothing else: run as a script without nox, it installs nox into an environment of
its own and starts again there. Sessions that need the same packages share an environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / ".environments"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def can_make_environments(python: str) -> bool:
    """Whether this interpreter has what ``python -m venv`` needs; Debian's own has not."""
    command = [python, "-c", "import ensurepip, venv"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def create_environment(directory: Path, python: str = sys.executable) -> str:
    """Make an empty virtual environment in ``directory`` and return its Python."""
    if not can_make_environments(python):
        sys.exit(
            f"cannot make a virtual environment with {python}: its module ensurepip is missing; "
            "install it (Debian, Ubuntu: apt-get install python3-venv) and run the command again"
        )
    subprocess.run([python, "-m", "venv", "--clear", str(directory)], check=True)
    return str(directory / "bin" / "python")


def restart_with_nox() -> None:
    """Run this file again in an environment that has nox; does not return."""
    directory = ENVIRONMENTS / "nox"
    python = str(directory / "bin" / "python")
    if not (directory / "installed").exists():
        print(f"installing nox into {directory}", flush=True)  # noqa: T201 - nox's log is not there yet
        create_environment(directory)
        subprocess.run([python, *PIP, "install", "nox>=2024.4.15"], check=True)
        (directory / "installed").touch()
    os.execv(python, [python, *sys.argv])


if __name__ == "__main__" and importlib.util.find_spec("nox") is None:
    restart_with_nox()

import nox  # installed by the lines above

nox.options.default_venv_backend = "none"  # `prepare` shares environments between sessions
nox.options.sessions = ["lint", "style", "types"]

PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
PYTEST = ["pytest>=8.3", "pytest-randomly>=3.15", "hypothesis>=6.100"]
TOOLS = ["ruff==0.17.6", "import-linter==2.16", "pre-commit-hooks==6.0.0"]
NEWEST_TORCH = "torch==2.13.0"
# Composer asks for torch below 2.7.1, so whatever runs beside it runs on that one.
TORCH_WITH_COMPOSER = ["torch==2.7.0", "torchvision==0.22.0"]
LIBRARIES = {
    "composer": ["mosaicml==0.32.1"],
    "deepspeed": ["deepspeed==0.19.8"],
    "ffcv": ["ffcv==1.0.2", "numba", "setuptools"],
    "fsdp": ["fairscale==0.4.13"],
}
# ffcv has no wheels: pip compiles it against these, with a compiler and Python's headers.
SYSTEM_PACKAGES = ["pkg-config", "libopencv-dev", "libturbojpeg0-dev", "g++"]
# Other trainers: the benchmark measures them, and the documentation starts from their scripts.
PEERS = ["lightning", "accelerate", "pytorch-ignite"]
# Builds the documentation as a site.
SITE = ["mkdocs==1.6.1"]
# Metrics, a logger and models that users bring.
BROUGHT = ["torchmetrics", "transformers==5.24.0", "wandb"]
WITH_PLUGIN = [*PYTEST, "scikit-learn", "hatchling>=1.24"]
WITH_PLUGINS = [*WITH_PLUGIN, *PEERS, *SITE, *BROUGHT, "mypy==2.4.1", "types-tqdm"]
# What never imports torch is tested on every Python that is supported and found.
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCH_FREE = ["cli", "discovery", "docs", "options", "pages", "plan", "registry", "resolve"]
TORCH_FREE += ["verdicts", "vocabulary"]
# What may depend on torch runs on the older one too; all of it runs on the newest one.
DEPEND_ON_TORCH = {
    "deepspeed": ["faults", "optimizers", "parity", "state", "trainer"],
    "fsdp": ["deferred", "parity", "remedies", "trainer", "units"],
}
# Other points of the supported range, by hand: Python, torch, the plugins that go with both.
# FSDP2 of torch 2.6 has no CPU.
VERSIONS = {
    "2.6": ("3.10", ["torch==2.6.0", "torchvision==0.21.0"], ["composer", "deepspeed"]),
    "2.9": ("3.12", ["torch==2.9.1", "torchvision==0.24.1"], ["deepspeed", "ffcv", "fsdp"]),
    "2.13": ("3.13", ["torch==2.13.0", "torchvision==0.28.0"], ["deepspeed", "ffcv", "fsdp"]),
}
# Two processes run on two cores: a thread more would wait for the others.
ENV = {"OMP_NUM_THREADS": "1"}


def prepare(
    session: nox.Session,
    name: str,
    requirements: Sequence[str],
    *,
    torch: Sequence[str] = (),
    folders: Sequence[str] = (),
    python: str = sys.executable,
) -> str:
    """Return the Python of the environment ``name``, made anew when its content has changed.

    Args:
        session: the session that asks.
        name: of the environment; sessions that give the same one share it.
        requirements: what pip installs.
        torch: requirements that are taken from an environment of their own, which this one sees
            and all others that ask for the same: with CUDA's libraries torch takes 5 GB.
        folders: distributions of this repository; reinstalled when their metadata changes.
        python: the interpreter it is made of.
    """
    directory = ENVIRONMENTS / name
    projects = [(ROOT / folder / "pyproject.toml").read_text("utf-8") for folder in folders]
    content = sha256("\n".join([python, *torch, *requirements, *projects]).encode()).hexdigest()
    stamp = directory / "installed"
    if not stamp.exists() or stamp.read_text("utf-8") != content:
        beneath = prepare(session, torch[0].replace("==", "-"), torch) if torch else None
        session.log(f"installing {' '.join([*torch, *requirements])} into {directory}")
        create_environment(directory, python)
        if beneath:
            add_packages(directory, Path(beneath).parents[1])
        # torch is named again: pip keeps the one it sees, or says what cannot go with it.
        session.run(str(directory / "bin" / "python"), *PIP, "install", *torch, *requirements)
        stamp.write_text(content, "utf-8")
    return str(directory / "bin" / "python")


def add_packages(environment: Path, beneath: Path) -> None:
    """Let an environment see what is installed in the one ``beneath``; its own come first."""
    packages = sysconfig.get_path("purelib", "venv", {"base": str(beneath)})
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    (own / "beneath.pth").write_text(packages + "\n", "utf-8")


def has_headers() -> bool:
    """Whether C code can be compiled for this Python; Debian's own needs a package for it."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def has_system_packages() -> bool:
    """Whether what ffcv is compiled with is there."""
    if not (shutil.which("pkg-config") and shutil.which("g++") and has_headers()):
        return False
    found = ["pkg-config", "--exists", "opencv4", "libturbojpeg"]
    return subprocess.run(found, check=False).returncode == 0


def install_system_packages(session: nox.Session) -> None:
    """Install what ffcv is compiled with: as root with apt-get, otherwise say how and stop."""
    if has_system_packages():
        return
    # A Python that apt did not install has its headers, and perhaps a version that apt has not.
    headers = "python{}.{}-dev".format(*sys.version_info)
    packages = [*SYSTEM_PACKAGES, *([] if has_headers() else [headers])]
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        session.error(
            "ffcv is compiled here and needs a compiler, OpenCV and libjpeg-turbo; install them "
            f"as root and run the command again: {' '.join(install)} (conda: conda install -c "
            "conda-forge pkg-config opencv libjpeg-turbo compilers; macOS: brew install "
            "pkg-config opencv jpeg-turbo)"
        )
    session.log(f"ffcv is compiled here: installing {', '.join(packages)}")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    session.run("apt-get", "update", "-qq", env=environment, external=True)
    session.run(*install, env=environment, external=True)


def torch_for(plugins: Sequence[str]) -> list[str]:
    """The newest torch that goes with all ``plugins``."""
    # ffcv's datasets are torchvision's, which needs the torch that it was made for.
    return TORCH_WITH_COMPOSER if {"composer", "ffcv"} & set(plugins) else [NEWEST_TORCH]


def libraries(plugins: Sequence[str]) -> list[str]:
    """What ``plugins`` are made for, in the versions they are tested with."""
    return [library for name in plugins for library in LIBRARIES[name]]


def distributions(plugins: Sequence[str]) -> list[str]:
    """The folders of core and of ``plugins``."""
    return ["core", *(f"plugins/{name}" for name in plugins)]


def editable(folders: Sequence[str]) -> list[str]:
    """What makes pip install ``folders`` so that their files are the ones that run."""
    return [f"--editable={folder}" for folder in folders]


def with_plugins(session: nox.Session, plugins: Sequence[str]) -> str:
    """Return the Python of an environment with core and ``plugins``, all in editable mode."""
    if "ffcv" in plugins:
        install_system_packages(session)
    folders = distributions(plugins)
    tools = WITH_PLUGIN if len(plugins) == 1 else WITH_PLUGINS
    requirements = [*libraries(plugins), *tools, *editable(folders)]
    name = "-".join(["core", *plugins])
    return prepare(session, name, requirements, torch=torch_for(plugins), folders=folders)


def order_seed() -> int:
    """Seed of the tests' random order: another with every change of the tests, else the same one.

    What has passed in one place then passes in another, and what fails there fails here.
    """
    files = sorted((ROOT / "tests").rglob("*.py"))
    content = sha256(b"".join(path.read_bytes() for path in files)).digest()
    return int.from_bytes(content[:4], "big")


def run_pytest(session: nox.Session, python: str, *arguments: str) -> None:
    """Run tests; a session that finds none fails, because pytest's exit code 5 is no success."""
    ordered = any("randomly" in word for word in session.posargs)
    seed = [] if ordered else [f"--randomly-seed={order_seed()}"]
    session.run(python, "-m", "pytest", *seed, *arguments, *session.posargs, env=ENV)


@nox.session
def lint(session: nox.Session) -> None:
    """Check code style and formatting, and the hygiene of every tracked file."""
    python = prepare(session, "tools", TOOLS)
    session.run(python, "-m", "ruff", "check", ".")
    session.run(python, "-m", "ruff", "format", "--check", ".")
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        session.log("this is no git checkout: the checks of tracked files are left out")
        return
    files = str(session.run("git", "ls-files", silent=True)).split()
    session.run(python, "-m", "pre_commit_hooks.end_of_file_fixer", *files)
    session.run(python, "-m", "pre_commit_hooks.trailing_whitespace_fixer", *files)
    session.run(python, "-m", "pre_commit_hooks.check_added_large_files", "--enforce-all", *files)


@nox.session
def style(session: nox.Session) -> None:
    """Check that imports in core point down only."""
    python = prepare(session, "tools", TOOLS)
    session.run(str(Path(python).with_name("lint-imports")), env={"PYTHONPATH": "core/src"})


@nox.session
def types(session: nox.Session) -> None:
    """Check all annotations with mypy, those of the tests too."""
    session.run(with_plugins(session, PLUGINS), "-m", "mypy")


@nox.session
def core(session: nox.Session) -> None:
    """Test core alone, without any plugin, on the newest torch."""
    requirements = [*PYTEST, "--editable=core"]
    python = prepare(session, "core", requirements, torch=torch_for([]), folders=["core"])
    run_pytest(session, python, "tests/core")


@nox.session
def pythons(session: nox.Session) -> None:
    """Test what needs no torch on each supported Python that is found here."""
    needs = nox.project.load_toml("core/pyproject.toml")["project"]["dependencies"]
    requirements = [*PYTEST, *(need for need in needs if not need.startswith("torch>"))]
    tests = [f"tests/core/test_{name}.py" for name in TORCH_FREE]
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        if not found or not can_make_environments(found):
            session.log(f"Python {version} is not installed: left out")
            continue
        python = prepare(session, f"python{version}", requirements, folders=["core"], python=found)
        session.run(python, *PIP, "install", "--no-deps", "--editable=core")
        run_pytest(session, python, *tests)


@nox.session
@nox.parametrize("name", PLUGINS, ids=PLUGINS)
def plugin(session: nox.Session, name: str) -> None:
    """Test core with one plugin and no other."""
    run_pytest(session, with_plugins(session, [name]), f"tests/{name}")


@nox.session
@nox.parametrize("torch", list(VERSIONS), ids=list(VERSIONS))
def versions(session: nox.Session, torch: str) -> None:
    """Test core and plugins on another torch and Python; takes 6 GB, removed afterwards."""
    version, torches, plugins = VERSIONS[torch]
    found = shutil.which(f"python{version}")
    if not found:
        session.skip(f"Python {version} is not installed")
    folders = distributions(plugins)
    requirements = [*torches, *libraries(plugins), *WITH_PLUGIN, *editable(folders)]
    python = prepare(session, f"versions-{torch}", requirements, folders=folders, python=found)
    try:
        run_pytest(session, python, "tests/core", *(f"tests/{name}" for name in plugins))
    finally:
        shutil.rmtree(ENVIRONMENTS / f"versions-{torch}")


@nox.session
def newest(session: nox.Session) -> None:
    """Test all plugins but composer at once on the newest torch, without torchvision."""
    install_system_packages(session)
    plugins = [name for name in PLUGINS if name != "composer"]
    folders = distributions(plugins)
    requirements = [*libraries(plugins), *PYTEST, *editable(folders)]
    python = prepare(session, "newest", requirements, torch=torch_for([]), folders=folders)
    run_pytest(session, python, "tests/together/test_without_composer.py")


@nox.session
def together(session: nox.Session) -> None:
    """Test everything installed at once, with core's own tests and those of older torch."""
    tests = [
        f"tests/{name}/test_{file}.py" for name, files in DEPEND_ON_TORCH.items() for file in files
    ]
    folders = ["tests/core", "tests/together", "tests/parity"]
    run_pytest(session, with_plugins(session, PLUGINS), *folders, *tests)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site in .site/, then run all that it shows."""
    python = with_plugins(session, PLUGINS)
    session.run(python, "-m", "docs.site.build")
    names = ("coming_from", "docs", "examples", "language_model", "site")
    run_pytest(session, python, *(f"tests/together/test_{name}.py" for name in names))


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels, check them, and install each into an environment of its own."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    python = prepare(session, "packaging", [*PYTEST, "packaging"])
    folders = [f"./{folder}" for folder in distributions(PLUGINS)]
    session.run(python, *PIP, "wheel", "--no-deps", f"--wheel-dir={dist}", *folders)
    session.env["TORCHWELD_WHEELS"] = str(dist)
    run_pytest(session, python, "tests/packaging")
    core_wheel = next(dist.glob("torchweld-*.whl"))
    install_alone(session, [], [core_wheel])
    for name in PLUGINS:
        wheel = next(dist.glob(f"torchweld_{name}-*.whl"))
        install_alone(session, [name], [core_wheel, wheel])


def install_alone(session: nox.Session, plugins: Sequence[str], wheels: Sequence[Path]) -> None:
    """Install wheels and what they ask for into an environment with torch alone, and start them."""
    paths = [str(wheel) for wheel in wheels]
    folders = distributions(plugins)
    name = "-".join(["wheel", *(plugins or ["core"])])
    requirements = [*libraries(plugins), *paths]
    python = prepare(session, name, requirements, torch=torch_for(plugins), folders=folders)
    # The environment may be an older one: what the wheels ask for is in it, their code is replaced.
    session.run(python, *PIP, "install", "--no-deps", "--force-reinstall", *paths)
    session.run(python, *PIP, "check")
    torchweld = str(Path(python).with_name("torchweld"))
    session.run(torchweld, "plugins")
    session.run(torchweld, "explain", "TW302", silent=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all that has to pass: the command that the README names."""
    install_system_packages(session)  # what cannot be installed is said before anything else
    plugins = [f"plugin({name})" for name in PLUGINS]
    first = ["lint", "style", "types", "pythons", "core"]
    for name in [*first, *plugins, "newest", "together", "build"]:
        session.notify(name)


@nox.session
def demo(session: nox.Session) -> None:
    """Train on JPEG files in two processes, with DeepSpeed, FSDP, FFCV and Composer in one run."""
    run = [with_plugins(session, PLUGINS), "-m", "torch.distributed.run", "--standalone"]
    session.run(*run, "--nproc-per-node=2", "examples/article.py", *session.posargs, env=ENV)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a step costs beside other trainers, sharding, and all plugins together."""
    python = with_plugins(session, PLUGINS)
    session.run(python, "benchmarks/overhead.py", *session.posargs, env=ENV)
    session.run(python, "-m", "benchmarks.fsdp", env=ENV)
    session.run(python, "-m", "benchmarks.zero", env=ENV)
    session.run(python, "-m", "benchmarks.together", env=ENV)


@nox.session
def soak(session: nox.Session) -> None:
    """Run the long crash and matrix tests."""
    run_pytest(session, with_plugins(session, PLUGINS), "-m", "soak")


@nox.session
def matrix(session: nox.Session) -> None:
    """Run every pair of components and write docs/compatibility.md anew."""
    python = with_plugins(session, PLUGINS)
    session.run(python, "-m", "tests.together.matrix", *session.posargs, env=ENV)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests and the benchmark that need a CUDA device."""
    python = with_plugins(session, PLUGINS)
    run_pytest(session, python, "-m", "gpu")
    session.run(python, "-m", "benchmarks.fsdp", env=ENV)
    session.run(python, "-m", "benchmarks.zero", env=ENV)


if __name__ == "__main__":
    os.chdir(ROOT)
    nox.main()
