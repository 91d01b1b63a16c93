"""Training on several processes is training on one: the same losses, gradient norms and weights."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import processes
from compare import check
from llama_ext import Llama, LlamaConfig, parallel

STEPS, BATCH, T = 3, 4, 16
BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**shape):
    return LlamaConfig(**{"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2,
                          "vocab_size": 96, "hidden_dim": 56, "max_seq_len": T, **shape})


def batches(step, parts):
    """The global batch of a step in equal parts, (tokens, targets) each."""
    ids = torch.randint(96, (BATCH, T + 1), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[:, 3] = -100
    return list(zip(ids[:, :-1].chunk(parts), targets.chunk(parts)))


class Calls(TorchDispatchMode):
    """The names of the operators that ran, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


def train(model, parts, clip, forward):
    """Train on parts(step), one after the other: ([(loss, norm of the gradient)], the operators
    of the last step)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, fused=True)
    seen = []
    for step in range(STEPS):
        with Calls() as calls:
            loss = sum(forward(tokens, targets, last).item()
                       for tokens, targets, last in last_marked(parts(step)))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        seen.append((loss, (norm.full_tensor() if dist.is_initialized() else norm).item()))
        optimizer.step()
        optimizer.zero_grad()
    return seen, calls.names


def last_marked(parts):
    return [(*part, i == len(parts)) for i, part in enumerate(parts, 1)]


def one_process(dtype, parts, clip=1.0, compute=None, **shape):
    """(losses and norms, weights) after STEPS steps on `parts` parts of each batch."""
    model = Llama(config(**shape), device="meta", dtype=dtype).to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(5))

    def forward(tokens, targets, last):
        weights = {name: p.to(compute or dtype) for name, p in model.named_parameters()}
        loss = functional_call(model, weights, (tokens, targets)) / parts
        loss.backward()
        return loss
    seen, _ = train(model, lambda step: batches(step, parts), clip, forward)
    return seen, {name: p.detach() for name, p in model.named_parameters()}


def many_processes(tp, dtype, accumulate=1, clip=1.0, compute=None, options=None, **shape):
    """The same of this rank, its losses averaged over all; the number of elements it holds, and
    the operators of its last step."""
    mesh = parallel.mesh(config(**shape), tp)
    model = Llama(config(**shape), device="meta", dtype=dtype)
    parallel.parallelize(model, mesh, compute or dtype, **options or {})
    parallel.reset_parameters(model.to_empty(device="cpu"), 5)
    dp, rank = mesh["dp"].size(), mesh["dp"].get_local_rank()

    def forward(tokens, targets, last):
        parallel.accumulate(model, last)
        loss = model(tokens, targets) / accumulate
        loss.backward()
        return loss
    seen, calls = train(model, lambda step: batches(step, dp * accumulate)[rank::dp], clip,
                              forward)
    losses = torch.tensor(seen, dtype=torch.float64)
    dist.all_reduce(losses)
    held = sum(p.to_local().numel() for p in model.parameters())
    return ((losses / dist.get_world_size()).tolist(),
            {name: p.detach().full_tensor() for name, p in model.named_parameters()},
            held, calls)


def run_all(cases):
    return [many_processes(**copy.deepcopy(case)) for case in cases]


CASES = {
    2: [{"tp": 1, "dtype": torch.float32, "clip": 1e9},
        {"tp": 1, "dtype": torch.float32, "clip": 1e9, "compute": BF16},
        {"tp": 1, "dtype": torch.float64, "accumulate": 2, "vocab_size": 97,
         "options": {"reshard_after_forward": False, "prefetch": False}},
        {"tp": 2, "dtype": torch.float64, "accumulate": 2},
        {"tp": 2, "dtype": torch.float64, "tie_embeddings": True},
        {"tp": 2, "dtype": torch.float32, "clip": 1e9, "compute": BF16}],
    4: [{"tp": 1, "dtype": torch.float64, "clip": 0.3},
        {"tp": 2, "dtype": torch.float64, "clip": 0.3},
        {"tp": 2, "dtype": torch.float64, "tie_embeddings": True, "n_kv_heads": 4,
         "options": {"reshard_after_forward": False}}],
}


@pytest.fixture(scope="module", params=CASES)
def results(request):
    """[(case, what each rank returned)] of all cases in one group of processes."""
    ranks = processes.run(request.param, run_all, CASES[request.param])
    return list(zip(CASES[request.param], zip(*ranks)))


def test_losses_norms_and_weights_are_one_process_s(results):
    for case, ranks in results:
        how = {k: v for k, v in case.items() if k not in ("tp", "options", "accumulate")}
        dp = len(ranks) // case["tp"]
        seen, weights = one_process(parts=dp * case.get("accumulate", 1), **how)
        for got_seen, got, _, _ in ranks:
            if case["dtype"] == torch.float64:
                check(torch.tensor(got_seen, dtype=torch.float64),
                      torch.tensor(seen, dtype=torch.float64), what=f"{case}: losses, norms")
            for name, weight in weights.items():
                if case["dtype"] == torch.float64:
                    check(got[name], weight, what=f"{case}: {name}")
                elif case["tp"] == 1:  # two gradients are added, which rounds alike either way
                    assert torch.equal(got[name], weight), (case, name)
                else:  # bf16 rounds the parts of a split sum
                    error = (got[name] - weight).norm() / weight.norm()
                    assert 0 < error < 1e-2, (case, name, error)


def test_every_rank_has_the_same_numbers(results):
    for case, (first, *others) in results:
        for other in others:
            assert other[0] == first[0], case
            assert all(torch.equal(other[1][name], w) for name, w in first[1].items()), case


def test_a_rank_holds_its_part_only(results):
    for case, ranks in results:
        shape = {k: v for k, v in case.items() if k in ("vocab_size", "tie_embeddings",
                                                         "n_kv_heads")}
        model = Llama(config(**shape), device="meta")
        norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        expected = (model.num_parameters() - norms + case["tp"] * norms) / len(ranks)
        held = [rank[2] for rank in ranks]
        assert sum(held) == expected * len(ranks), case
        assert max(held) - min(held) <= 2 * 32, case  # a row of vocabulary 97 and of nothing else


def test_gradients_are_reduced_once_a_step(results):
    for case, ranks in results:
        dp = len(ranks) // case["tp"]
        reductions = ranks[0][3].count("c10d::_reduce_scatter_base_")
        assert reductions == (0 if dp == 1 else 4), case  # the layers, and all else


def test_parameters_are_gathered_ahead_and_again_in_the_backward_as_asked(results):
    for case, ranks in results:
        operators, options = ranks[0][3], case.get("options", {})
        batches = case.get("accumulate", 1)
        if len(ranks) == case["tp"]:
            assert "c10d::_allgather_base_" not in operators
            continue
        gathers = operators.count("c10d::_allgather_base_")
        again = options.get("reshard_after_forward", True)
        assert gathers == batches * (4 + 3 * again), case
        before = operators[:operators.index("llama_ext::attention_fwd")]
        ahead = options.get("prefetch", True)  # of the first layer's attention: the second layer
        assert before.count("c10d::_allgather_base_") == 2 + ahead, case


@pytest.mark.parametrize("tp, world, shape, message", [
    (2, 3, {}, "the number of processes = 3, got 2"), (0, 2, {}, "of processes = 2, got 0"),
    (4, 4, {}, "n_kv_heads = 2, got 4"), (3, 3, {}, "n_heads = 4, got 3"),
    (4, 4, {"n_kv_heads": 4, "hidden_dim": 58}, "hidden_dim = 58, got 4"),
    (2, 2, {"vocab_size": 97}, "vocab_size = 97, got 2"),
    (2, 2, {"max_seq_len": 15}, "max_seq_len = 15, got 2")])
def test_processes_that_cannot_share_a_model_are_refused(tp, world, shape, message):
    with pytest.raises(ValueError, match=f"^tensor_parallel: expected a divisor of .*{message}$"):
        parallel.check(config(**shape), tp, world)


def refused():
    mesh = parallel.mesh(config(), 2)
    model = parallel.parallelize(Llama(config()), mesh)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    messages = []
    for args in ((tokens,), (tokens[:, :7], tokens[:, :7])):
        try:
            model(*args)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_split_model_wants_targets_and_a_sequence_that_can_be_split():
    assert processes.run(2, refused) == 2 * [[
        "Llama: targets: expected (B, T) under tensor parallelism, got None",
        "Llama: tokens: expected a multiple of tensor_parallel = 2 positions, got 7"]]


def split_as_it_is():
    torch.manual_seed(3)  # the same weights on every rank
    model = Llama(config())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    parallel.parallelize(model, parallel.mesh(config(), 2))
    return all(torch.equal(p.full_tensor(), weights[name]) for name, p in model.named_parameters())


def test_a_model_with_weights_keeps_them():
    assert processes.run(2, split_as_it_is) == [True, True]


def loss_and_gradients(compile):
    mesh = parallel.mesh(config(n_layers=2), 2)
    model = Llama(config(n_layers=2), device="meta", dtype=torch.float64)
    parallel.parallelize(model, mesh, torch.float64, compile=compile)
    parallel.reset_parameters(model.to_empty(device="cpu"), 5)
    (batch,) = batches(0, 1)
    loss = model(*batch)
    loss.backward()
    return loss.item(), [p.grad.full_tensor() for p in model.parameters()]


def plain_and_compiled():
    return loss_and_gradients(False), loss_and_gradients(True), counters["stats"]["unique_graphs"]


def test_compiled_layers():
    (loss, gradients), (compiled_loss, compiled), graphs = processes.run(2, plain_and_compiled)[0]
    assert graphs > 0 and abs(compiled_loss - loss) < 1e-12
    for got, expected in zip(compiled, gradients):
        check(got, expected)
