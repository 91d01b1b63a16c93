import pytest
import torch

import llama_ext


def pytest_configure(config):
    torch.set_num_threads(2)


def pytest_report_header(config):
    return f"torch {torch.__version__}; CPU kernels: {torch.ops.llama_ext.cpu_isas()}"


SUMMARY = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def summary(pytestconfig):
    """A list of lines that are printed at the end of the run."""
    return pytestconfig.stash.setdefault(SUMMARY, [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(SUMMARY, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded_and_nan_filled():
    """Fixed random numbers; and every torch.empty is filled with NaN, so that an output that a
    kernel leaves unwritten, or adds to, shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=torch.ops.llama_ext.cpu_isas().split())
def isa(request):
    """Runs the test once with the kernels of each instruction set this CPU has."""
    torch.ops.llama_ext.cpu_isa(request.param)
    yield request.param
    torch.ops.llama_ext.cpu_isa("")
