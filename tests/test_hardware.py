"""Descriptions of hardware, what they make of operators and collectives, and plans for them."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import gpt_plan
from torch import Tensor, nn

import fxzero
from fxzero.capture import capture
from fxzero.cost import CPU, CUDA, CostModel, modelled_cost
from fxzero.errors import PlanError, UsageError
from fxzero.hardware import Achieved, Hardware, Link, describe, load, names
from fxzero.hardware_measurement import measure_hardware, to_toml
from fxzero.network import route
from fxzero.options import device_memory
from fxzero.report.diff import diff
from fxzero.report.html import render
from fxzero.utilisation import utilisation

LIBRARY = (
    "a100-40gb", "a100-80gb", "b200-180gb", "cpu", "h100-96gb-hbm2e", "h100-pcie-80gb",
    "h100-sxm-80gb", "h200-141gb", "l4", "l40s", "mi300x", "rtx-3090", "rtx-4090", "t4",
    "v100-32gb",
)  # fmt: skip
H100 = describe("h100-sxm-80gb")
FILES = Path(fxzero.__file__).parent / "devices"
GB = 10**9


# The library


def test_the_library_has_these_names() -> None:
    assert names() == LIBRARY


@pytest.mark.parametrize("name", LIBRARY)
def test_every_description_says_where_each_figure_comes_from(name: str) -> None:
    found = describe(name)
    assert found.name == name
    assert found.device == ("cpu" if name == "cpu" else "cuda")
    assert set(found.sources) == {
        "memory", "compute", "host", "node", "network", "power", "achieved",
    }  # fmt: skip
    assert all(found.sources.values())
    assert found.usable is not None
    assert found.memory is not None
    assert 0.8 * found.memory < found.usable < found.memory
    if name != "cpu":
        assert 0 < found.peak_of("float32") <= found.peak_of("tf32") <= found.peak_of("float16")
        assert found.watts


def test_memory_and_peaks_are_those_of_the_datasheets() -> None:
    gibibytes = {name: (describe(name).memory or 0) / 2**30 for name in LIBRARY}
    assert gibibytes["a100-80gb"] == 80
    assert gibibytes["h100-sxm-80gb"] == pytest.approx(80, rel=0.01)
    assert gibibytes["h100-96gb-hbm2e"] == pytest.approx(96, rel=0.01)
    assert describe("h100-96gb-hbm2e").peak_bandwidth == 2.4e12
    assert describe("h100-96gb-hbm2e").peak_flops == H100.peak_flops
    assert H100.peak_of("bfloat16") == 989.4e12
    assert describe("a100-40gb").peak_of("bfloat16") == 312e12
    # What a device has no units for runs as something else.
    assert describe("t4").peak_of("bfloat16") == describe("t4").peak_of("float32") == 8.1e12
    assert describe("a100-80gb").peak_of("fp8") == 312e12
    assert describe("v100-32gb").peak_of("float64") == 15.7e12


def test_names_are_found_whatever_their_case_and_unknown_ones_are_refused_in_clear_words() -> None:
    assert describe("H100-SXM-80GB") is H100
    assert describe(H100) is H100
    for text, nearest in (
        ("h100-sxm", "h100-sxm-80gb"),
        ("a100", "a100-40gb"),
        ("4090", "rtx-4090"),
    ):
        with pytest.raises(
            UsageError, match=f"no hardware '{text}'; did you mean '{nearest}'"
        ) as e:
            describe(text)
        assert ", ".join(LIBRARY) in str(e.value)
    with pytest.raises(UsageError, match="must be a name, or the path"):
        describe(80)
    with pytest.raises(UsageError, match="no hardware ''"):
        describe("")


# Files of users


def written(tmp_path: Path, change: Any) -> Path:
    """A description like the H100's with a change to its text."""
    path = tmp_path / "mine.toml"
    path.write_text(change((FILES / "h100-sxm-80gb.toml").read_text()))
    return path


def test_a_users_file_is_read_as_the_librarys_are(tmp_path: Path) -> None:
    mine = describe(str(written(tmp_path, lambda text: text.replace("3350e9", "1e12"))))
    assert mine == dataclasses.replace(H100, name="mine", peak_bandwidth=1e12)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "bytes = 85_520_809_984",
            "bytes = -1",
            r"memory.bytes = -1 must be a whole number of bytes",
        ),
        (
            "bytes = 85_520_809_984",
            "bytes = 8.5e10",
            r"memory.bytes must be a whole number of bytes",
        ),
        ("bytes = 85_520_809_984", "bytes = true", r"memory.bytes must be a whole number"),
        ("bandwidth = 3350e9", "bandwidth = nan", r"memory.bandwidth = nan must be bytes a second"),
        ("bandwidth = 3350e9", "bandwidth = inf", r"memory.bandwidth = inf must be bytes a second"),
        ("bandwidth = 3350e9", "bandwidth = 0", r"memory.bandwidth = 0 must be"),
        ("bandwidth = 3350e9", "bandwidth = 1e30", r"memory.bandwidth = 1e\+30 must be"),
        ("bandwidth = 3350e9", 'bandwidth = "fast"', r"memory.bandwidth must be .*, not 'fast'"),
        ("bandwidth = 3350e9", "", r"\[memory\]: missing bandwidth"),
        ("matmul = 0.8", "matmul = 80", r"achieved.matmul = 80 must be a share, 0.01 to 1"),
        ("watts = 700", "wats = 700", r"\[power\]: unknown key 'wats'; did you mean 'watts'"),
        ("[power]", "[pwr]", r"unknown key 'pwr'; did you mean 'power'"),
        ('device = "cuda"', 'device = "tpu"', r'device must be "cpu" or "cuda", not \'tpu\''),
        ('device = "cuda"', "", r"missing device"),
        ('device = "cuda"', 'device = "cuda', r"mine.toml is not TOML"),
        ('device = "cuda"', 'device = "cuda"\nhost = 3', r"mine.toml is not TOML"),
        ('device = "cuda"', f"device = {'9' * 5000}", r"mine.toml"),
        ('device = "cuda"', f"device = {'[' * 5000}", r"mine.toml is not TOML"),
        ("float32 = 66.9e12", "", r"\[compute\]: missing float32"),
    ],
)
def test_a_file_that_is_no_description_is_refused_with_file_key_and_what_is_expected(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = written(tmp_path, lambda text: text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as error:
        load(path)
    assert "mine.toml" in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        describe(str(tmp_path / "none.toml"))
    (tmp_path / "large.toml").write_text("#" * 10**5)
    with pytest.raises(UsageError, match="has 100000 bytes"):
        describe(tmp_path / "large.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8"):
        describe(tmp_path / "bytes.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"cannot read .*: not a file"):
        describe(tmp_path / "folder.toml")


# Operators


def test_products_reach_the_peak_of_their_dtype_and_share() -> None:
    x = torch.empty(8192, 8192, device="meta", dtype=torch.bfloat16)
    for dtype, peak in ((torch.bfloat16, 989.4e12), (torch.float32, 66.9e12)):
        model = nn.Linear(8192, 8192, bias=False, device="meta", dtype=dtype)
        graph = capture(model, (x.to(dtype),)).graph
        product = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.mm.default)
        seconds = modelled_cost(product, H100).seconds
        ideal = 2 * 8192**3 / (0.8 * peak)
        # 64 x 64 tiles in 32 waves of 132 processors: 3 % of the last wave is idle.
        assert seconds == pytest.approx(ideal * 32 * 132 / 4096 + H100.launch)


def test_small_products_lose_what_their_tiles_leave_idle() -> None:
    assert utilisation(1, 128 * 132, 128, 512, 132) == 1.0
    assert utilisation(1, 128 * 133, 128, 512, 132) == pytest.approx(133 / 264)
    assert utilisation(1, 64, 128 * 132, 512, 132) == pytest.approx(0.5)
    # Few tiles: the sum is cut, as far as it is long enough.
    assert utilisation(1, 128, 128, 512, 132) == pytest.approx(1 / 132)
    assert utilisation(1, 128, 128, 512 * 132, 132) == 1.0
    assert utilisation(1, 0, 128, 512, 132) == 1.0


def test_attention_that_is_causal_takes_half_the_time() -> None:
    class Attention(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.causal = causal
            self.scale = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            attend = nn.functional.scaled_dot_product_attention
            return attend(x, x, x, is_causal=self.causal).sum()

    x = torch.empty(4, 16, 4096, 128, device="meta")
    seconds = []
    for causal in (False, True):
        nodes = capture(Attention(causal), (x,)).graph.graph.nodes
        costs = [modelled_cost(n, H100) for n in nodes if "dot_product" in str(n.target)]
        costs = [cost for cost in costs if cost.seconds]
        assert len(costs) == 2
        seconds.append(sum(cost.seconds - H100.launch for cost in costs))
    assert seconds[1] == pytest.approx(seconds[0] / 2)


# Links


def test_dimensions_lie_within_nodes_or_across_them() -> None:
    mesh = {"pp": 4, "dp_replicate": 2, "dp_shard": 8}
    inside = route(H100, mesh, "dp_shard")
    assert (inside.ranks, inside.together, inside.nodes) == (8, 8, 1)
    across = route(H100, mesh, "dp_replicate")
    assert (across.ranks, across.together, across.nodes) == (2, 1, 2)
    assert route(H100, mesh, "pp").nodes == 4
    wide = route(H100, {"pp": 2, "dp": 64}, "dp")
    assert (wide.ranks, wide.together, wide.nodes) == (64, 8, 8)
    assert route(H100, {"dp": 16, "pp": 4}, "pp").nodes == 1
    assert route(H100, {"dp": 16, "pp": 4}, "dp").together == 2


def test_collectives_take_latencies_of_their_hops_and_bytes_by_the_slowest_link() -> None:
    near, far, whole = Link(100e9, 1e-6), Link(10e9, 5e-6), 2**30
    hardware = dataclasses.replace(
        H100, node=near, network=far, devices=8, startup=0.0, achieved=Achieved()
    )
    inside = route(hardware, {"dp": 8}, "dp")
    assert inside.gather(whole) == pytest.approx(7e-6 + whole * 7 / 8 / 100e9)
    assert inside.all_reduce(0) == pytest.approx(14e-6)
    assert inside.all_reduce(whole) == pytest.approx(2 * inside.gather(whole))
    assert inside.send(whole) == pytest.approx(1e-6 + whole / 100e9)
    # Four nodes: eight adapters each, 80 GB/s together.
    outside = route(hardware, {"dp": 32}, "dp")
    assert outside.gather(whole) == pytest.approx(28e-6 + 3 * 5e-6 + whole * 31 / 32 / 80e9)
    assert outside.all_reduce(0) == pytest.approx(2 * (7e-6 + 2 * 5e-6))  # a tree
    assert outside.send(whole) == pytest.approx(5e-6 + whole / 10e9)
    alone = route(hardware, {"dp": 4, "pp": 8}, "dp")
    assert alone.gather(whole) == pytest.approx(3 * 5e-6 + whole * 3 / 4 / 10e9)
    assert outside.all_to_all(whole) == pytest.approx(43e-6 + whole * 24 / 32 / 10e9)


def test_latency_grows_with_ranks_and_bandwidth_does_not_hide_it() -> None:
    seconds = [route(H100, {"dp": n}, "dp").gather(2**20) for n in (2, 8, 64, 512, 4096)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 4 * seconds[-2] > 0


def test_without_hardware_collectives_cost_what_they_did() -> None:
    for hardware, latency, network in ((CPU, 3e-4, 1e9), (CUDA, 2e-5, 2e11)):
        for ranks in (2, 64, 1024):
            found = route(hardware, {"dp": ranks}, "dp")
            expected = latency + 2**30 * (ranks - 1) / ranks / network
            assert found.gather(2**30) == pytest.approx(expected)
            assert found.send(2**20) == pytest.approx(latency + 2**20 / network)


# Plans


class Gpt(nn.Module):
    """Seven and a half billion parameters in few operators: it is wide, not deep."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.heads = width // 128

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        norms = iter(self.norms)
        for mix, out, up, down in zip(self.mix, self.out, self.up, self.down, strict=True):
            parts = mix(next(norms)(x)).chunk(3, -1)
            q, k, v = (p.unflatten(-1, (self.heads, 128)).transpose(1, 2) for p in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            x = x + down(nn.functional.gelu(up(next(norms)(x))))
        logits = nn.functional.linear(x, self.embedding.weight).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def gpt(layers: int, width: int, vocabulary: int) -> tuple[nn.Module, tuple[Tensor]]:
    with torch.device("meta"):
        model = Gpt(layers, width, vocabulary).to(torch.bfloat16)
        return model, (torch.zeros(1, 64, dtype=torch.int64),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "gigabytes", "fits"),
    [(0, 120, False), (1, 31.4, True), (2, 16.6, True), (3, 1.88, True)],
)
def test_model_states_are_those_of_the_zero_paper(zero: int, gigabytes: float, fits: bool) -> None:
    """Table 1 of Rajbhandari et al., 2020; it rounds stage 3 up to 1.9."""
    model, inputs = gpt(4, 12_288, 20_480)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.5e9, rel=0.001)
    plan = fxzero.plan(model, inputs, devices=64, zero=zero, optimizer=12, hardware="a100-80gb")
    assert plan.fits == fits
    assert plan.states is not None
    assert plan.states.bytes / GB == pytest.approx(gigabytes, rel=0.01)
    step = next(phase for phase in plan.phases if phase.name == "optimizer step")
    kept = plan.states.bytes if zero == 0 else 16 * 7.5e9 / 64
    assert step.peak_bytes == pytest.approx(kept, rel=0.01)
    breakdown = plan.ranks[0].breakdown
    assert breakdown["parameter"] / GB == pytest.approx(15 if zero == 0 else 15 / 64, rel=0.01)
    assert breakdown["optimizer"] / GB == pytest.approx(90 if zero == 0 else 90 / 64, rel=0.01)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, tuple[Tensor]]:
    return gpt(1, 256, 512)


def mlp() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))


def test_a_plan_for_hardware_says_so_and_has_its_memory_as_the_budget(small: Any) -> None:
    plan = fxzero.plan(*small, hardware="h100-sxm-80gb", devices=64, zero=3)
    assert plan.request.hardware == "h100-sxm-80gb"
    assert plan.request.device == "cuda"
    assert plan.request.memory_budget == H100.usable
    assert any("h100-sxm-80gb is taken to reach 80%" in note for note in plan.notes)
    assert fxzero.Plan.from_json(plan.to_json()) == plan
    assert "h100-sxm-80gb  budget 74.7 GiB" in str(plan)
    assert "states " in str(plan)


def test_percentages_are_of_the_hardwares_memory_and_sizes_are_rounded_as_cuda_does(
    small: Any,
) -> None:
    plan = fxzero.plan(*small, hardware="t4", memory_budget="50%")
    assert plan.request.memory_budget == (describe("t4").memory or 0) // 2
    assert all(value.bytes % 512 == 0 for value in plan.peak.alive if value.role == "saved")


def test_faster_hardware_makes_faster_steps_and_nodes_matter() -> None:
    model, inputs = mlp(), torch.empty(2048, 1024, device="meta")
    seconds = {
        name: fxzero.plan(model, inputs, hardware=name).step_seconds
        for name in ("t4", "a100-80gb", "h100-sxm-80gb")
    }
    assert seconds["t4"] > seconds["a100-80gb"] > seconds["h100-sxm-80gb"]
    inside, across = (
        fxzero.plan(model, inputs, hardware=H100, zero=3, mesh=mesh).communication_seconds
        for mesh in ({"dp_replicate": 2, "dp_shard": 8}, {"dp_shard": 8, "dp_replicate": 2})
    )
    assert inside < across


@pytest.mark.slow
def test_a_pipeline_is_planned_for_hardware() -> None:
    plan = fxzero.plan(
        mlp(),
        torch.empty(64, 1024, device="meta"),
        hardware=H100,
        devices=4,
        pipeline=fxzero.Pipeline(stages=2, microbatches=4),
        loss_fn=torch.sum,
    )
    assert plan.request.hardware == "h100-sxm-80gb"
    assert plan.request.memory_budget == H100.usable
    assert plan.pipeline is not None
    assert plan.states is None


@pytest.mark.slow
def test_a_plan_for_hardware_is_replayed_where_the_model_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
    x = torch.randn(512, 16)
    free = fxzero.plan(model, x, hardware="t4", optimizer="sgd")
    budget = free.minimum_budget
    plan = fxzero.plan(model, x, hardware="t4", optimizer="sgd", memory_budget=budget)
    assert plan.decisions.recompute
    plan.save(tmp_path / "plan.json")
    compiled = fxzero.compile(model, (x,), plan=tmp_path / "plan.json", inner="eager")
    compiled(x).sum().backward()
    assert compiled.plan.decisions == plan.decisions
    assert compiled.verify(x).ok


def test_reports_and_differences_show_the_hardware() -> None:
    before = gpt_plan()
    after = gpt_plan(request=dataclasses.replace(before.request, hardware="l40s", device="cuda"))
    assert "hardware                     not named -> l40s" in diff(before, after)
    assert "gpt2  l40s  budget" in str(after)
    assert "\n    l40s, inputs" in render(after)
    with pytest.raises(PlanError, match=r"plan.request.hardware must be str, not int"):
        fxzero.Plan.from_json(after.to_json().replace('"l40s"', "3"))


def test_costs_without_hardware_are_the_old_ones() -> None:
    assert (CPU.bandwidth, CPU.launch, CPU.host_bandwidth) == (1e10, 3e-6, 5e9)
    assert {CPU.peak_of(d) for d in ("float32", "bfloat16", "float16", "float64")} == {5e10}
    assert (CUDA.bandwidth, CUDA.launch, CUDA.host_bandwidth) == (2e12, 4e-6, 2.5e10)
    assert isinstance(CostModel(CPU).hardware, Hardware)
    assert math.isclose(CUDA.peak_of("fp8"), 4e14)
    with (FILES / "cpu.toml").open("rb") as file:
        assert tomllib.load(file)["device"] == "cpu"


# This machine


@pytest.mark.slow
def test_this_machine_is_measured_and_written_as_a_description(tmp_path: Path) -> None:
    text = measure_hardware(tmp_path / "mine.toml")
    found = describe(str(tmp_path / "mine.toml"))
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.memory == device_memory(found.device)
    assert all(1e8 < found.peak_of(dtype) < 1e17 for dtype in ("float32", "bfloat16", "float16"))
    assert 1e8 < found.bandwidth < 1e14
    assert 1e-8 < found.launch < 1e-2
    assert "measured on" in found.sources["compute"]
    assert "not measured" in found.sources["network"]
    assert "links between processes not measured" in text
    plan = fxzero.plan(nn.Linear(8, 8), torch.randn(4, 8), hardware=tmp_path / "mine.toml")
    assert plan.request.hardware == "mine"


def test_descriptions_are_written_as_they_are_read(tmp_path: Path) -> None:
    for name in LIBRARY:
        (tmp_path / f"{name}.toml").write_text(to_toml(describe(name)))
        assert load(tmp_path / f"{name}.toml") == describe(name)
