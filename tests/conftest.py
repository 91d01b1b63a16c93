import os
import random

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # threads that spin while they wait for work would keep the others from theirs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402  reads the variable

import llama_ext  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--backend", choices=["cpu", "vgpu", "cuda"], default="cpu",
                     help="what runs the ops: the CPU kernels; the CUDA kernels on the virtual "
                          "A100 (tests/vgpu); the CUDA kernels on a GPU")


def pytest_configure(config):
    torch.set_num_threads(2)
    if config.getoption("backend") == "vgpu":
        import vgpu.library

        torch.set_num_threads(1)  # the launches have threads of their own
        vgpu.library.activate(threads=max(os.cpu_count() // WORKERS, 1))
    elif config.getoption("backend") == "cuda":
        torch.set_default_device("cuda")  # of every tensor that a test makes


def pytest_collection_modifyitems(items):
    """With a fault planted (vgpu/mutate.py), a random order comes sooner to a test that fails than
    one subject after another."""
    if "VGPU_MUTANT" in os.environ:
        random.Random(0).shuffle(items)


def pytest_report_header(config):
    kernels = (torch.ops.llama_ext.cuda_kernels() if config.getoption("backend") == "cuda"
               else torch.ops.llama_ext.cpu_isas())
    return f"torch {torch.__version__}; backend {config.getoption('backend')}: {kernels}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that meets an op whose kernel is null in the backend's table is skipped."""
    report = yield
    error = call.excinfo and call.excinfo.value
    while error is not None:
        if str(error).endswith("has no kernel for this op yet"):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {error}")
            break
        error = error.__cause__ or error.__context__
    return report


@pytest.fixture
def cuda_kernels(pytestconfig):
    """For a test of the CUDA kernels alone."""
    if pytestconfig.getoption("backend") == "cpu":
        pytest.skip("of the CUDA kernels")


@pytest.fixture
def vgpu(pytestconfig):
    """vgpu.library with an empty log, for a test that counts what the virtual A100 does."""
    if pytestconfig.getoption("backend") != "vgpu":
        pytest.skip("counts what the virtual A100 does")
    import vgpu.library

    vgpu.library.take_log()
    return vgpu.library


SUMMARY = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def summary(pytestconfig):
    """A list of lines that are printed at the end of the run."""
    return pytestconfig.stash.setdefault(SUMMARY, [])


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # this is a worker of pytest-xdist
        session.config.workeroutput["summary"] = session.config.stash.get(SUMMARY, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    summary = node.config.stash.setdefault(SUMMARY, [])
    summary += getattr(node, "workeroutput", {}).get("summary", [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(SUMMARY, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded_and_nan_filled(pytestconfig):
    """Fixed random numbers; and every torch.empty is filled with NaN, so that an output that a
    kernel leaves unwritten, or adds to, shows. (vgpu fills with NaNs of its own, to know them.)"""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        pytestconfig.getoption("backend") != "vgpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """For the tests of a module whose models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        backend = metafunc.config.getoption("backend")
        isas = torch.ops.llama_ext.cpu_isas().split() if backend == "cpu" else [backend]
        metafunc.parametrize("isa", isas, indirect=True)


@pytest.fixture
def isa(request, pytestconfig):
    """Runs the test once with the kernels of each instruction set this CPU has; other backends have
    one set of kernels."""
    if pytestconfig.getoption("backend") == "cpu":
        torch.ops.llama_ext.cpu_isa(request.param)
    yield request.param
    torch.ops.llama_ext.cpu_isa("")
