"""Sessions on several ranks, in real processes over gloo; and torch.compile around the model, alone and with them."""

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from runs import assert_equal, nothing_changes
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fxprune import Plan, Session, TrainingPass
from fxprune.errors import FileError, SessionError
from fxprune.passes import PruneTrain
from fxprune.training import distributed
from fxprune.training.memory import Memory
from fxprune.training.run import Run
from fxprune.training.state import cut_as_saved, state_of
from fxprune.training.when import Decision
from fxprune.training.wrappers import arguments_of

SHRINK = PruneTrain(ratio=0.8, interval=1, threshold=0.02, proximal=True)
STEPS, SAMPLES = 3, 8
PARAMETERS = inspect.signature(DistributedDataParallel).parameters


class Net(nn.Module):
    """A residual network in float64. Without batch norm, ranks that share a batch train as one that has it all."""

    def __init__(self, norm: bool = False, spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.b = nn.Conv2d(12, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 20, 3, padding=1)
        self.head = nn.Linear(20, 4)
        if spare:
            self.spare = nn.Linear(2, 2)
        self.double()
        with torch.no_grad():  # channels of all strengths, so that some fall below the threshold every few steps
            for writer, reader in ((self.a, self.b), (self.c, self.head)):
                scale = torch.linspace(0.03, 1, writer.out_channels).double()
                writer.weight.mul_(scale[:, None, None, None])
                reader.weight.mul_(scale[:, None, None] if reader.weight.ndim == 4 else scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.b(self.norm(self.a(x)).relu())
        return self.head(self.c(x).relu().mean((2, 3)))


def batch(epoch: int, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    x = torch.randn(SAMPLES, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x[share], torch.randint(0, 4, (SAMPLES,), generator=generator)[share]


def mine() -> slice:
    """This rank's share of a batch."""
    return slice(distributed.own_rank(), None, distributed.count_ranks())


def begin(
    passes: Any = (SHRINK,), model: nn.Module | None = None, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> Session:
    model = Net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    wrap = wrap or (DistributedDataParallel if distributed.count_ranks() > 1 else lambda inner: inner)
    return Session(wrap(model), batch(0, 0)[0], optimizer, passes, progress=False)


def train(session: Session, steps: int = STEPS) -> None:
    """A few steps, each rank on its share; the last loss lives on while epoch_end cuts."""
    model = session.model
    for step in range(steps):
        x, y = batch(session.epoch, step, mine())
        task = F.cross_entropy(model(x), y)
        loss = task + session.penalty(task)
        loss.backward()
        session.optimizer.step()
        session.optimizer.zero_grad()
    session.last_loss = loss  # type: ignore[attr-defined]


def digest(session: Session) -> str:
    """Of every parameter and the optimizer's state, bit for bit."""
    state = session.optimizer.state
    tensors = [(p, *(v for v in state[p].values() if isinstance(v, Tensor))) for p in session.graph.parameters()]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for its in tensors for t in its)).hexdigest()


def assert_alike(session: Session) -> None:
    assert len(set(distributed.gather_values(digest(session)))) == 1


def whole(session: Session) -> dict[str, Any]:
    """What a run came to."""
    return {
        "state": copy.deepcopy(dict(session.graph.state_dict())),
        "widths": [dict(each.widths) for each in session.log],
        "removed": [each.removed for each in session.log],
        "lambda": [each.values.get("lambda") for each in session.log],
        "sent": [each.sent for each in session.log],
        "params": [each.params for each in session.log],
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert (found[name] - tensor).abs().max() <= 1e-10 * tensor.abs().max(), name


# --------------------------------------------------------------------------------------------- training


def whole_run(rank: int, proximal: bool = True, epochs: int = 4) -> dict[str, Any]:
    session = begin([replace(SHRINK, proximal=proximal)])
    model = session.model
    x, y = batch(0, 0, mine())
    first = F.cross_entropy(model(x), y).item()
    assert len(set(distributed.gather_values(first))) == distributed.count_ranks()
    for _ in range(epochs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PruneTrain: with lambda")
            train(session)
        assert_alike(session)
        session.epoch_end()
        assert_alike(session)
        assert session.model is model
    return whole(session)


@pytest.mark.parametrize(("world", "proximal"), [(2, True), (2, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_ranks_train_as_one(ranks: Ranks, tmp_path: Path, world: int, proximal: bool) -> None:
    alone = whole_run(0, proximal)
    assert sum(removed > 0 for removed in alone["removed"]) >= 3
    assert alone["sent"] == [0, 0, 0, 0]
    for found in ranks(world, tmp_path / "store", whole_run, proximal):
        for name in ("widths", "removed", "params"):
            assert found[name] == alone[name]
        assert_near(found["state"], alone["state"])
        assert found["lambda"] == pytest.approx(alone["lambda"], rel=1e-12)
        assert found["sent"] == [2 * (world - 1) / world * 8 * count * STEPS for count in alone["params"]]
        assert found["sent"][-1] < found["sent"][0]


def with_batch_norm(rank: int) -> None:
    session = begin(model=Net(norm=True))
    for _ in range(4):
        train(session)
        session.epoch_end()
        assert_alike(session)
    assert sum(each.removed > 0 for each in session.log) >= 3
    buffers = [buffer.tolist() for buffer in session.graph.buffers()]
    train(session, 1)
    assert [buffer.tolist() for buffer in session.graph.buffers()] != buffers
    session.model(batch(9, 9)[0])  # the first rank's go to the others, and all see the same samples
    assert len({str(each) for each in distributed.gather_values([b.tolist() for b in session.graph.buffers()])}) == 1


def test_batch_norm_keeps_statistics_of_the_first_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", with_batch_norm)


def accumulating(rank: int) -> None:
    """Gradients of two batches, and an epoch that ends between them."""
    session = begin()
    train(session)
    x, y = batch(0, 7, mine())
    with session.model.no_sync():
        F.cross_entropy(session.model(x), y).backward()
    record = session.epoch_end()
    assert record.removed == 0
    assert "the cut follows" in record.notes[-1]
    F.cross_entropy(session.model(x), y).backward()
    session.optimizer.step()
    session.optimizer.zero_grad()
    assert session.log[-1].removed > 0
    assert_alike(session)
    train(session)
    assert_alike(session)


def test_a_cut_waits_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", accumulating)


def inside_no_sync(rank: int) -> None:
    """A cut within no_sync leaves it in force."""
    session = begin()
    train(session)
    with session.model.no_sync():
        session.epoch_end()
        assert not session.model.require_backward_grad_sync
        x, y = batch(0, 7, mine())
        F.cross_entropy(session.model(x), y).backward()
        weight = session.graph.get_parameter("stem.weight")
        assert len({str(its) for its in distributed.gather_values(weight.grad.tolist())}) == 2
    assert session.model.require_backward_grad_sync


def test_a_cut_within_no_sync(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", inside_no_sync)


# ----------------------------------------------------------------------------------------- disagreement


class Own(TrainingPass):
    """Plans that differ by rank: other channels, or none."""

    plans: list[Plan | None]

    def after_epoch(self, run: Run, memory: Memory) -> Plan | None:
        return self.plans[distributed.own_rank()]


class Failing(TrainingPass):
    """A hook that fails on the second rank, once."""

    def __init__(self, hook: str) -> None:
        self.hook, self.count = hook, 0

    def fail(self, hook: str) -> None:
        self.count += hook == self.hook
        if hook == self.hook and self.count == 1 + (hook == "prepare") and distributed.own_rank() == 1:
            raise MemoryError("no room for it")

    def begin(self, run: Run) -> Memory:
        self.fail("begin")
        return Memory()

    def after_epoch(self, *_: Any) -> None:
        self.fail("after_epoch")

    def report(self, *_: Any) -> dict[str, float]:
        self.fail("report")
        return {}

    def after_cut(self, *_: Any) -> None:
        self.fail("after_cut")

    def prepare(self, *_: Any) -> None:
        self.fail("prepare")


def disagreeing(rank: int) -> None:
    session = begin()
    train(session)
    sizes = session.analysis.sizes
    weights = [session.graph.get_parameter(name) for name in ("a.weight", "b.weight")]
    held = [weight.detach().clone() for weight in weights]
    if rank == 1:
        for weight in weights:
            weight.data.zero_()
    differ = r"the ranks disagree on the plan: \w+ on \[0\], \w+ on \[1\]"
    with nothing_changes(session), pytest.raises(SessionError, match=differ):
        session.epoch_end()
    with nothing_changes(session), pytest.raises(SessionError, match=differ):
        session.reconfigure(Plan({"a": range(3 + rank)}, sizes))
    for weight, its in zip(weights, held, strict=True):
        weight.data.copy_(its)
    assert session.epoch_end().removed > 0
    train(session)
    assert_alike(session)

    own = Own()
    other = begin([own])
    for theirs in (None, Plan({}, sizes), Plan({"c": range(4)}, sizes)):
        own.plans = [Plan({"c": range(5)}, sizes), theirs]
        with nothing_changes(other), pytest.raises(SessionError, match=differ):
            other.epoch_end()


def test_ranks_that_disagree_raise_and_change_nothing(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", disagreeing)


def same_widths(rank: int) -> None:
    """Plans of the same widths that keep other channels, as a policy draws them, or a criterion on other weights."""
    own = Own()
    session = begin([own])
    train(session)
    sizes = session.analysis.sizes
    kept = [[*range(4)], [*range(4, 8)]]
    for first, second in (kept, ([0, 2], [0, 3]), ([1], [11])):
        plans: list[Plan | None] = [Plan({"a": channels}, sizes) for channels in (first, second)]
        own.plans = plans
        for cut in (session.epoch_end, lambda mine=plans[rank]: session.reconfigure(mine)):
            with nothing_changes(session), pytest.raises(SessionError, match=r"disagree on the plan: \w+ on \[0\]"):
                cut()
    own.plans = [Plan({"a": kept[0]}, sizes)] * 2
    assert session.epoch_end().removed == 8
    train(session)
    assert_alike(session)


def test_ranks_that_keep_as_many_but_other_channels(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", same_widths)


def other_options(rank: int, what: str) -> None:
    """The plans are the same on both ranks, what they are carried out on is not."""
    passes = [replace(SHRINK, ratio=0.5 + 0.1 * rank)] if what == "the passes" else []
    session = begin(passes, model=Crossed(rank == 1) if what == "the analysis" else None)
    if what == "the options of the session":
        session.verify = rank == 1
    if what == "the steps and epochs made":
        session.step += rank
    sizes = session.analysis.sizes
    first = next(iter(sizes))
    match = rf"the ranks disagree on {what}: \w+ on \[0\], \w+ on \[1\]"
    with nothing_changes(session), pytest.raises(SessionError, match=match):
        session.reconfigure(Plan({first: [0]}, sizes))


class Crossed(Net):
    """The same parameters; the second pairs the channels of its residual the other way round."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + (self.b(self.a(x)).flip(1) if self.crossed else self.b(self.a(x)))
        return self.head(self.c(x).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "what", ["the options of the session", "the passes", "the steps and epochs made", "the analysis"]
)
def test_ranks_that_carry_out_a_plan_on_something_else(ranks: Ranks, tmp_path: Path, what: str) -> None:
    ranks(2, tmp_path / "store", other_options, what)


def failing(rank: int, hook: str) -> None:
    session = begin([SHRINK, Failing(hook)])
    train(session)
    error, message = (MemoryError, "no room") if rank == 1 else (SessionError, "rank 1: MemoryError: no room for it")
    with nothing_changes(session), pytest.raises(error, match=message):
        session.epoch_end()
    assert session.epoch_end().removed > 0
    train(session)
    assert_alike(session)


@pytest.mark.parametrize("hook", ["after_cut", "prepare", "after_epoch", "report"])
def test_a_cut_that_fails_on_one_rank_is_taken_back_on_all(ranks: Ranks, tmp_path: Path, hook: str) -> None:
    ranks(2, tmp_path / "store", failing, hook)


def failing_at_first(rank: int) -> None:
    error, message = (MemoryError, "no room") if rank == 1 else (SessionError, "rank 1: MemoryError: no room for it")
    with pytest.raises(error, match=message):
        begin([Failing("begin")])
    begin()


def test_a_session_that_can_not_begin_on_one_rank_begins_on_none(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", failing_at_first)


def failing_policy(rank: int) -> None:
    """A policy that fails on one rank, while the other waits for the first one's word; and one rank without a plan."""

    def when(run: Run, *_: Any) -> Decision:
        if rank == run.epoch:
            raise OSError("the clock is gone")
        return Decision(True, "cut", 1.0)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    session = Session(DistributedDataParallel(model), batch(0, 0)[0], optimizer, [SHRINK], when=when, progress=False)
    train(session)
    for session.epoch in (0, 1):
        failed = session.epoch
        error, message = (OSError, "the clock") if rank == failed else (SessionError, f"rank {failed}: OSError: the cl")
        with nothing_changes(session), pytest.raises(error, match=message):
            session.epoch_end()
    session.epoch = 2
    assert session.epoch_end().removed > 0
    with pytest.raises(SessionError, match=("plan must be a Plan" if rank else "rank 1: SessionError: plan must be")):
        session.reconfigure(Plan({}, session.analysis.sizes) if rank == 0 else None)  # type: ignore[arg-type]


def test_a_policy_that_fails_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", failing_policy)


def taking_over(rank: int) -> None:
    """What the passes remembered fits on one rank only."""
    session = begin()
    train(session)
    session.epoch_end()
    saved = state_of(session)
    fresh = begin()
    spoiled = replace(saved, passes=(replace(saved.passes[0], saved={"colour": "red"}),))
    error, message = (FileError, "colour") if rank else (SessionError, "rank 1: FileError: it remembers colour")
    with nothing_changes(fresh), pytest.raises(error, match=message):
        cut_as_saved(fresh, spoiled if rank else saved)
    cut_as_saved(fresh, saved)
    assert fresh.analysis.sizes == session.analysis.sizes


def test_a_state_that_one_rank_can_not_take_over(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", taking_over)


class Averaging(TrainingPass):
    """Fails on the second rank before it gives its share of a mean; or within a block of its own."""

    inner = False

    def after_epoch(self, run: Run, memory: Memory) -> Plan | None:
        if self.inner:
            with distributed.all_or_none():
                self.fail()
        else:
            self.fail()
        distributed.mean_over_ranks(torch.ones(3))
        return None

    def fail(self) -> None:
        if distributed.own_rank() == 1:
            raise MemoryError("no room for it")


def failing_mean(rank: int) -> None:
    training_pass = Averaging()
    session = begin([training_pass])
    error, message = (MemoryError, "no room") if rank == 1 else (SessionError, "rank 1: MemoryError: no room for it")
    for training_pass.inner in (False, True):
        with pytest.raises(error, match=message) as raised:
            session.epoch_end()
        assert getattr(raised.value, "__notes__", []) == [distributed.TOLD] * (rank == 1)
    mean = distributed.mean_over_ranks(torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1))
    assert mean.tolist() == [1.5, 3.0]
    assert distributed.mean_over_ranks(torch.tensor(float(rank))).item() == 0.5


def test_a_rank_that_fails_while_others_wait_for_its_mean(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", failing_mean)


def joining(rank: int) -> None:
    """The second rank has one batch less, and would have another momentum. A cut waits for the end of the block."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    session = Session(DistributedDataParallel(model), batch(0, 0)[0], optimizer, progress=False)
    sizes = session.analysis.sizes
    calls = [
        session.epoch_end,
        lambda: session.reconfigure(Plan({"a": range(4)}, sizes)),
        lambda: session.save("run.pt"),
    ]
    with Join([session.model]):
        for step in range(2 - rank):
            x, y = batch(0, step, mine())
            F.cross_entropy(session.model(x), y).backward()
            session.optimizer.step()
            session.optimizer.zero_grad()
        if rank == 0:
            for call in calls:
                with nothing_changes(session), pytest.raises(SessionError, match="within torch's Join"):
                    call()
    session.step = 2  # the second rank has made one less
    session.epoch_end()
    session.reconfigure(Plan({"a": range(4)}, sizes))
    train(session)
    assert_alike(session)


def test_a_cut_within_join_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", joining)


def deciding(rank: int) -> None:
    """Somebody decides by the clock of each rank: the first one's counts."""
    asked = []

    def when(*_: Any) -> Decision:
        asked.append(rank)
        return Decision(rank == 0, f"says rank {rank}", 1.0)

    model = Net()
    session = Session(
        DistributedDataParallel(model), batch(0, 0)[0], torch.optim.SGD(model.parameters(), 0.05), [SHRINK], when=when
    )
    train(session)
    record = session.epoch_end()
    assert asked == [rank]
    assert record.notes == ("says rank 0",)
    assert record.removed > 0


def test_the_first_rank_decides_when(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", deciding)


# ---------------------------------------------------------------------------------------- the wrapper

ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "bucket_cap_mb": {"bucket_cap_mb": 0.01},
    "bucket_cap_mb_list": {"bucket_cap_mb_list": [0.01, 0.02]},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "buffers": {"forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers": False},
    "process_group": {"process_group": ...},
}


def keeps_arguments(rank: int, name: str) -> None:
    given = dict(ARGUMENTS[name])
    if "process_group" in given:
        given["process_group"] = dist.new_group([0, 1])
    ddp = DistributedDataParallel(Net(spare=name == "find_unused_parameters", norm=True), **given)
    data = ("bucket_cap_bytes", "find_unused_parameters", "gradient_as_bucket_view", "static_graph")
    logged = {key: ddp._get_ddp_logging_data().get(key) for key in data}
    expected = arguments_of(ddp)
    session = begin(model=ddp, wrap=lambda model: model)
    ddp.eval().train()
    for _ in range(3):
        train(session)
        assert session.epoch_end().removed > 0
        found = arguments_of(ddp)
        assert found.pop("process_group") is given.get("process_group", dist.group.WORLD)
        assert found == {key: value for key, value in expected.items() if key != "process_group"}
        assert {key: ddp._get_ddp_logging_data().get(key) for key in data} == logged
    train(session)
    for key, value in given.items():
        if hasattr(ddp, key):
            assert getattr(ddp, key) is value
    assert session.model is ddp
    assert_alike(session)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_wrapper_keeps_its_arguments(ranks: Ranks, tmp_path: Path, name: str) -> None:
    ranks(2, tmp_path / "store", keeps_arguments, name)


class Larger(nn.Module):
    """Holds the network as a part; its Python depends on shapes, so it can't be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Net()
        self.scale = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.scale(x) if x.shape[0] > 1 else x


def in_a_part(rank: int, compile: bool) -> list[int]:
    larger = Larger()
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.05, momentum=0.9)
    around: Any = DistributedDataParallel(larger) if distributed.count_ranks() > 1 else larger
    around = torch.compile(around, backend="eager") if compile else around
    session = Session(larger.part, batch(0, 0)[0], optimizer, [SHRINK], around=around, progress=False)
    larger.part = session.model
    session.model = around
    for _ in range(4):
        train(session)
        session.epoch_end()
        assert_alike(session)
        assert len(set(distributed.gather_values(str(larger.scale.weight.tolist())))) == 1
        assert optimizer.state[larger.scale.weight]["momentum_buffer"].any()
    with pytest.raises(SessionError, match="part of what is trained"):
        session.save("run.pt")
    return [each.removed for each in session.log]


@pytest.mark.parametrize("compile", [False, True])
def test_a_part_of_what_is_wrapped(ranks: Ranks, tmp_path: Path, compile: bool) -> None:
    alone = in_a_part(0, compile)
    assert sum(removed > 0 for removed in alone) >= 2
    assert ranks(2, tmp_path / "store", in_a_part, compile) == [alone, alone]
    other = nn.Linear(1, 1)
    with pytest.raises(SessionError, match="around= is a Linear that does not have"):
        Session(Net(), batch(0, 0)[0], torch.optim.SGD(other.parameters()), around=other)


def counting_hook(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The default hook, that counts the numbers it sends."""
    state.append(bucket.buffer().numel())
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])


def keeps_hooks(rank: int) -> dict[str, Any]:
    alone: list[int] = []
    fired: list[int] = []
    session = begin()
    session.model.register_comm_hook(alone, counting_hook)
    session.model.register_forward_pre_hook(lambda *_: fired.append(1))
    for _ in range(4):
        del alone[:], fired[:]
        train(session, 2)
        assert sum(alone) == 2 * sum(p.numel() for p in session.graph.parameters())
        assert len(fired) == 2
        session.epoch_end()
    assert len({tuple(each.widths.items()) for each in session.log}) >= 3
    assert_alike(session)
    return whole(session)["state"]


def test_the_wrapper_keeps_its_hooks(ranks: Ranks, tmp_path: Path) -> None:
    found, other = ranks(2, tmp_path / "store", keeps_hooks)
    assert_equal("state", found, other)


def compressing(rank: int) -> None:
    """PowerSGD remembers errors and factors in the shapes of the buckets."""
    session = begin()
    state = PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)
    session.model.register_comm_hook(state, powerSGD_hook)
    for _ in range(4):
        train(session, 5)
        assert state.error_dict
        session.epoch_end()
        assert_alike(session)
    assert sum(each.removed > 0 for each in session.log) >= 3


def test_compressed_gradients_go_on(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", compressing)


def test_without_ranks_nothing_is_sent() -> None:
    assert (distributed.count_ranks(), distributed.own_rank()) == (1, 0)
    assert distributed.gather_values("x") == ["x"]
    assert distributed.largest_over_ranks(2.0) == 2.0
    distributed.require_agreement({"the plan": "x"})


# -------------------------------------------------------------------------------------------- refusals


def refusals(rank: int) -> None:
    x = batch(0, 0)[0]

    def of(wrapped: nn.Module) -> Session:
        return Session(wrapped, x, torch.optim.SGD(wrapped.parameters(), 0.1))

    model = Net()
    fully_shard(model)
    with pytest.raises(SessionError, match="FSDPNet splits the model"):
        of(model)
    model = Net()
    fully_shard(model.a)
    with pytest.raises(SessionError, match=r"FSDPConv2d \(a\) splits the model"):
        of(model)
    model = Net()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (2,))))
    with pytest.raises(SessionError, match=r"Linear \(head\) has parameters that are spread over ranks"):
        of(model)
    session = of(Net())
    sizes = session.analysis.sizes
    fully_shard(session.model)
    with pytest.raises(SessionError, match=r"FSDP.*Module.* splits the model"):
        session.reconfigure(Plan({"a": range(3)}, sizes))
    F.cross_entropy(session.model(x), batch(0, 0)[1]).backward()  # it trains on, uncut
    model = Net()
    named = [(name, parameter) for name, parameter in model.named_parameters() if name == "head.bias"]
    ddp = DistributedDataParallel(
        model, delay_all_reduce_named_params=named, param_to_hook_all_reduce=model.stem.weight
    )
    with pytest.raises(SessionError, match="delay_all_reduce_named_params"):
        of(ddp)
    ddp = DistributedDataParallel(Net())
    ddp.mixed_precision = object()
    with pytest.raises(SessionError, match="mixed_precision="):
        of(ddp)


def test_wrappers_that_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", refusals)


# ----------------------------------------------------------------------------------------- checkpoints


def saving(rank: int, path: Path) -> dict[str, Any]:
    session = begin()
    for _ in range(2):
        train(session)
        session.epoch_end()
    session.save(path)
    train(session)
    session.epoch_end()
    assert session.log[-1].removed
    return whole(session)


def resuming(rank: int, path: Path) -> dict[str, Any]:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # its weights do not matter
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    wrapped = DistributedDataParallel(model) if distributed.count_ranks() > 1 else model
    session = Session.load(path, wrapped, batch(0, 0)[0], optimizer, progress=False)
    assert session.model is wrapped or distributed.count_ranks() == 1
    train(session)
    session.epoch_end()
    assert_alike(session)
    return whole(session)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_any_number_of_ranks(ranks: Ranks, tmp_path: Path, world: int) -> None:
    path = tmp_path / "run.pt"
    expected, _ = ranks(2, tmp_path / "store", saving, path)
    found = [resuming(0, path)] if world == 1 else ranks(world, tmp_path / "other", resuming, path)
    for each in found:
        assert each["removed"] == expected["removed"]
        assert each["widths"] == expected["widths"]
        if world == 2:
            assert_equal("state", each["state"], expected["state"])
        assert_near(each["state"], expected["state"])


def reading(rank: int, path: Path) -> None:
    """Each rank has a disk of its own, and on one of them the file is broken."""
    own = path / f"{rank}.pt"
    session = begin()
    path.mkdir(exist_ok=True)
    session.save(path / "run.pt")
    whole_file = (path / "run.pt").read_bytes()
    own.write_bytes(whole_file[: len(whole_file) // 2] if rank else whole_file)
    error, message = (FileError, "truncated") if rank else (SessionError, "rank 1: FileError: .*truncated")
    with pytest.raises(error, match=message):
        resuming(rank, own)
    with pytest.raises(FileError, match="can't write a checkpoint"):
        session.save(path / "no" / "folder" / "run.pt")


def test_a_checkpoint_that_one_rank_can_not_read(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", reading, tmp_path / "own")


# ------------------------------------------------------------------------------------------- compilation


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DDP in compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled in DDP": lambda model: DistributedDataParallel(compiled(model)),
}


def compiled_run(rank: int, how: str | None = None) -> dict[str, Any]:
    session = begin(wrap=WRAPPED.get(how) if how else None)
    model = session.model
    for _ in range(4):
        train(session)
        session.epoch_end()
        assert session.model is model
        assert_alike(session)
    return whole(session)


@pytest.mark.parametrize("how", [None, *WRAPPED])
def test_a_compiled_model_goes_on_compiled(ranks: Ranks, tmp_path: Path, how: str | None) -> None:
    alone = whole_run(0)
    alone_too = how == "compiled"
    found = [compiled_run(0, how)] if alone_too else ranks(2, tmp_path / "store", compiled_run, how)
    for each in found:
        assert each["removed"] == alone["removed"]
        assert_near(each["state"], alone["state"])


def test_what_is_compiled_is_the_smaller_model() -> None:
    seen: list[list[tuple[int, ...]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append([tuple(each.shape) for each in inputs])
        return graph.forward

    session = begin([], wrap=lambda model: torch.compile(model, backend=backend, dynamic=False))
    for cut in range(12):  # more often than torch recompiles one function
        train(session, 2)
        assert len(seen) == cut + 1
        sizes = session.analysis.sizes
        session.reconfigure(Plan({"c": range(sizes["c"] - 1)}, sizes))
    assert len({str(shapes) for shapes in seen}) == 12
