"""Files of recorded routing, `--skew file:PATH`: a trace that fits, or one error that says what is in the file."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.inputs import make_inputs
from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, WorkloadSpec
from moe_dist.workloads.skew_names import LARGEST_TRACE, skew_label
from moe_dist.workloads.skews import synthetic_routing

E, K = 8, 2
ALONE = Comm.single()
SPEC = MoESpec(hidden=64, intermediate=64, num_experts=E, top_k=K)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/should-not-exist",))


def good(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(rows * K).view(rows, K) % E, "weights": torch.full((rows, K), 0.5)}


@pytest.fixture
def saved(tmp_path: Path):
    def save(content: object) -> str:
        torch.save(content, tmp_path / "trace.pt")
        return f"file:{tmp_path / 'trace.pt'}"

    return save


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": good()["ids"].float()}, "ids of torch.float32"),  # whole numbers all the same: one form
        ({"ids": good()["ids"].float() + 0.5}, "ids of torch.float32"),
        ({"ids": good()["ids"].bool()}, "ids of torch.bool"),
        ({"weights": torch.ones(3, K, dtype=torch.int64)}, "weights of torch.int64"),
        ({"weights": torch.ones(3, K, dtype=torch.complex64)}, "weights of torch.complex64"),
        ({"weights": torch.full((3, K), 1e300, dtype=torch.float64)}, "infinite"),
        ({"ids": torch.zeros(1, K, dtype=torch.int64).expand(1 << 40, K)}, "rows"),  # a few bytes that claim terabytes
        ({"ids": torch.zeros(3, K, dtype=torch.int64).to_sparse()}, "dense tensors"),
        ({"ids": torch.zeros(0, K, dtype=torch.int64), "weights": torch.zeros(0, K)}, "1 to"),
        ({"ids": None}, "dense tensors"),
        ({"expert_ids": good()["ids"]}, "nothing else"),
        ({"ids": torch.tensor([[0, 1], [2, 2], [3, 4]])}, "holds expert 2 twice in row 1"),
    ],
)
def test_what_is_no_trace_says_what_it_is(saved, change, said):
    with pytest.raises(ConfigError) as caught:
        synthetic_routing(SPEC, 4, saved(good() | change), 0)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"^experiment\.skews = 'file:/"):  # as a user has written it
        Experiment(models=(SPEC,), skews=(saved(good() | change),))


def test_no_expert_may_stand_in_a_row_more_than_once(saved):
    ids = torch.full((1, K), -1)
    ids[0, 0] = 3
    assert synthetic_routing(SPEC, 1, saved({"ids": ids, "weights": torch.ones(1, K)}), 0).ids_TK.tolist() == [[3, -1]]
    both = {"ids": ids, "weights": torch.tensor([[1e-35, 1.0]])}
    both["ids"] = torch.tensor([[3, 4]])  # a router's smallest weight may be as small as it likes
    assert synthetic_routing(SPEC, 1, saved(both), 0).weights_TK[0, 0] > 0


def test_what_stands_beside_no_expert_counts_for_nothing(saved):
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, float("nan")]])
    routing = synthetic_routing(SPEC, 2, saved({"ids": ids, "weights": weights}), 0)
    assert routing.weights_TK.tolist() == [[0.5, 0.0]] * 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"ids,weights\n", pickle.dumps(Evil()), pickle.dumps({})])
def test_other_files_are_one_line(tmp_path, content):
    path = tmp_path / "trace.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        synthetic_routing(SPEC, 4, f"file:{path}", 0)
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value)  # torch advises to switch its protection off
    assert not Path("/tmp/should-not-exist").exists()


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(LARGEST_TRACE + 1)
    for name, said in (("fifo", "a FIFO"), ("endless", "a device"), ("huge", "at most"), (".", "a folder"),
                       ("x" * 5000, "can't be read"), ("a\0b", "can't be read")):  # fmt: skip
        start = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            Experiment(models=(SPEC,), skews=(f"file:{tmp_path / name}",))
        assert said in str(caught.value)
        assert time.monotonic() - start < 2


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    """Ranks on a running cluster have a working directory of their own."""
    torch.save(good(), tmp_path / "trace.pt")
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(models=(SPEC,), skews=("file:trace.pt", "uniform"))
    assert experiment.skews == (f"file:{tmp_path / 'trace.pt'}", "uniform")
    assert {case.workload.skew for case in experiment.cases("cpu")} == set(experiment.skews)


def test_a_trace_that_does_not_fit_is_refused_with_the_experiment(saved):
    with pytest.raises(ConfigError, match="ids of torch"):
        Experiment(models=(SPEC,), skews=(saved(good() | {"ids": torch.zeros(3, K)}),))


def cases_of(skew: str, **changes) -> list[Case]:
    keys = {"worlds": (1,), "placements": ("tp",), "exchanges": ("local",), "tokens": (4,)} | changes
    return list(Experiment(models=(SPEC,), skews=(skew,), **keys).cases("cpu"))


def test_a_case_keeps_the_trace_that_it_began_with(saved):
    """A file that is written anew between a case and its ranks must not lend its name to the old numbers."""
    skew = saved(good())
    (case,) = cases_of(skew)
    label = skew_label(skew, case.workload.trace)
    again = synthetic_routing(SPEC, 4, skew, 0, trace=case.workload.trace)
    saved({"ids": good()["ids"].flip(0), "weights": good()["weights"]})
    with pytest.raises(ConfigError, match=f"another file than.*the trace {label.removeprefix('file:')}"):
        synthetic_routing(SPEC, 4, skew, 0, trace=case.workload.trace)
    os.remove(skew.removeprefix("file:"))
    assert skew_label(skew, case.workload.trace) == label
    assert again.ids_TK[0].tolist() == [0, 1]


def test_a_rank_refuses_a_trace_that_has_changed(saved):
    skew = saved(good())
    (case,) = cases_of(skew)
    plan = case.plan(Machine("cpu", 1, "cpu"))
    make_inputs(case, plan, ALONE, [None])
    saved(good(rows=4))
    with pytest.raises(ConfigError, match="another file"):
        make_inputs(case, plan, ALONE, [None])


def test_a_case_made_by_hand_has_its_trace(saved):
    (case,) = cases_of(saved(good()))
    byhand = case.with_changes(workload=WorkloadSpec(tokens=4, skew=case.workload.skew))
    assert byhand == case
    assert cases_of("uniform")[0].workload.trace is None


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ({"ids": torch.full((3, K), -1), "weights": torch.ones(3, K)}, 4),
        ({"ids": good()["ids"], "weights": torch.zeros(3, K)}, 4),
        ({"ids": good()["ids"], "weights": torch.full((3, K), 1e-200, dtype=torch.float64)}, 4),
        ({"ids": good()["ids"], "weights": torch.full((3, K), 1e-40)}, 4),
        ({"ids": torch.tensor([[0, 1], [-1, -1]]), "weights": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}, 4),
        ({"ids": torch.tensor([[-1, -1], [0, 1]]), "weights": torch.ones(2, K)}, 1),
    ],
)
def test_a_trace_that_leaves_nothing_to_measure_is_refused(saved, content, tokens):
    with pytest.raises(ConfigError, match="nowhere"):
        cases_of(saved(content), tokens=(tokens, 64))


def test_one_routing_under_two_names_is_measured_once(saved, tmp_path):
    first = saved(good())
    shutil.copy(first.removeprefix("file:"), tmp_path / "copy.pt")
    skews = (first, "zipf:1.2", f"file:{tmp_path / 'copy.pt'}", "zipf:1.20", "zipf:01.2", "hot:02", "hot:2", "zipf:10",
             "zipf:10.", "zipf:.0", "zipf:0", "limited:02x1", "limited:2x1", "zipf:0.5", "zipf:.50")  # fmt: skip
    found = Experiment(models=(SPEC,), skews=skews).skews
    assert found == (first, "zipf:1.2", "hot:2", "zipf:10", "zipf:0", "limited:2x1", "zipf:0.5")
    same = [synthetic_routing(SPEC, 9, skew, 3).ids_TK.tolist() for skew in ("zipf:1.2", "zipf:01.20")]
    assert same[0] == same[1]


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
dtypes = st.sampled_from([torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.bfloat16,
                          torch.float64, torch.complex64])  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3) | st.just([3, K]) | st.just([3, K]))
    values = st.integers(-1, E - 1) | st.integers(-3, E + 1) | st.floats(width=32)
    count = torch.Size(shape).numel()
    made = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64)
    made = made.view(shape).to(draw(dtypes))
    kind = draw(st.sampled_from(["as it is"] * 4 + ["transposed", "requires grad", "sparse", "meta"]))
    if kind == "transposed" and made.ndim == 2:
        return made.t()
    if kind == "requires grad" and made.is_floating_point():
        return made.requires_grad_()
    if kind == "sparse":
        return made.to_sparse()
    return made.to("meta") if kind == "meta" else made


contents = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.dictionaries(st.sampled_from(["ids", "weights", "other", 3]), tensors() | scalars, max_size=3),
    st.builds(lambda ids, weights: {"ids": ids, "weights": weights}, tensors(), tensors()),
    st.builds(lambda change: good() | change, st.dictionaries(st.sampled_from(["ids", "weights"]), tensors())),
)


@examples(30)
@given(content=contents, cut=st.none() | st.integers(0, 1500), flipped=st.none() | st.integers(0, 1500))
def test_any_file_is_a_routing_or_one_config_error(content, cut, flipped):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.pt"
        torch.save(content, path)
        data = bytearray(path.read_bytes())
        if flipped is not None and flipped < len(data):
            data[flipped] ^= 0xFF
        path.write_bytes(data[:cut])
        refusal = None
        try:
            routing = synthetic_routing(SPEC, 5, f"file:{path}", 0)
        except ConfigError as error:
            refusal = str(error)
    if refusal is not None:
        assert refusal.isprintable()
        return
    assert routing.ids_TK.shape == routing.weights_TK.shape == (5, K)
    assert (routing.ids_TK.dtype, routing.weights_TK.dtype) == (torch.int32, torch.float32)
    assert -1 <= int(routing.ids_TK.min()) <= int(routing.ids_TK.max()) < E
    assert bool(routing.weights_TK.isfinite().all())
    if flipped is None:  # what the file holds, from its first row on
        ids, weights = content["ids"].long(), content["weights"].float()
        rows = torch.arange(5) % len(ids)
        assert torch.equal(routing.ids_TK.long(), ids[rows])
        assert torch.equal(routing.weights_TK, torch.where(ids[rows] < 0, 0.0, weights[rows]))
