"""Files from strangers: what is refused before any loader sees it, and what loaders then refuse."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import gpt_plan
from torch import nn

from fxzero import checkpoint
from fxzero.budget_file import BudgetFile
from fxzero.configuration_limits import MAX_MODULES, checked_configuration
from fxzero.configurations import build_configuration
from fxzero.documents import MAX_DEPTH, beside, parse_json, parse_toml, read_json, read_text
from fxzero.errors import CheckpointError, FxzeroError, PlanError, UsageError
from fxzero.hardware import describe
from fxzero.plans import Plan

HERE = Path("a/document.json")

# Text


@given(st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape")))
def test_any_text_is_a_document_or_refused(text: str) -> None:
    for parse in (parse_json, parse_toml):
        with contextlib.suppress(UsageError):
            parse(text, "here", UsageError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "is not JSON: the key 'a' stands twice in an object"),
        ("[NaN]", "has a number that is nan"),
        ("[-Infinity]", "has a number that is -inf"),
        ("[1e999]", "has a number that is inf"),
        ("1" * 101, "has a number of more than 100 digits"),
        ("9" * 5000, "is not JSON: Exceeds the limit"),
        ("[" * 70 + "]" * 70, "is nested more than 64 times"),
        ("[" * 100_000, "is not JSON"),
        ("\ufeff{}", "is not JSON: Unexpected UTF-8 BOM"),
        ("{}\0", "is not JSON: Extra data"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_json(text, "here", PlanError)


def test_what_python_writes_is_read_where_it_may_be() -> None:
    assert parse_json("[Infinity]", "extra", PlanError, finite=False) == [float("inf")]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x", PlanError)
    assert parse_json('"\\ud800"', "x", PlanError) == "\ud800"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 30_000 + "b = 1", "line 1 has 30000 dots, more than 64"),
        ("x = 1\nx = 2", "is not TOML: Cannot overwrite a value"),
        ("x = " + "[" * 70 + "]" * 70, "is nested more than 64 times"),
        ("x = 0x" + "f" * 1000, "has a number of more than 100 digits"),
        ("x = " + "9" * 5000, "is not TOML: Exceeds the limit"),
    ],
)
def test_toml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_toml(text, "here", UsageError)


# Files


def test_files_that_have_no_end_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(PlanError, match=rf"cannot read {path}: not a file"):
            read_text(path, 10, PlanError)
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(PlanError, match="long has 11 bytes, more than the 10 that are read"):
        read_text(tmp_path / "long", 10, PlanError)


def test_the_encoding_is_not_that_of_the_locale(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('"\u00e9"'.encode())
    assert read_json(tmp_path / "x.json", 10, PlanError) == "\u00e9"
    (tmp_path / "x.json").write_bytes('"\u00e9"'.encode("latin-1"))
    with pytest.raises(PlanError, match=r"x.json is not UTF-8"):
        read_json(tmp_path / "x.json", 10, PlanError)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "./a"])
def test_names_of_files_are_no_paths(name: str) -> None:
    with pytest.raises(CheckpointError, match="names a file outside its directory"):
        beside(HERE, name, CheckpointError)


def test_links_lead_out_and_are_refused_unless_a_loader_takes_them(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    source = tmp_path / "document.json"
    with pytest.raises(CheckpointError, match=rf"link is a link\n  only what lies in {tmp_path}"):
        beside(source, "link", CheckpointError)
    assert beside(source, "link", CheckpointError, links=True) == tmp_path / "link"
    with pytest.raises(CheckpointError, match="folder is no file"):
        beside(source, "folder", CheckpointError)
    for name in ("\ud800", "x" * 300):
        with pytest.raises(CheckpointError, match="is missing"):
            beside(source, name, CheckpointError)


# Plans and budgets


def _pipeline(**changes: Any) -> Callable[[dict[str, Any]], None]:
    turn = {"rank": 0, "kind": "F", "stage": 0, "microbatch": 0, "start": 0.0, "end": 1.0}
    stage = {"rank": 0, "begins": "", "weight_bytes": 1, "in_flight": 1, "forward_seconds": 1.0,
             "input_seconds": 1.0, "weight_seconds": 1.0, "sent_bytes": 1}  # fmt: skip
    turn |= {key: value for key, value in changes.items() if key in turn and key != "rank"}
    turn["rank"] = changes.get("turn_rank", 0)
    stage["rank"] = changes.get("rank", 0)
    pipeline = {"schedule": "1f1b", "microbatches": 1, "bubble": 0.0,
                "stages": changes.get("stages", [stage]), "turns": [turn]}  # fmt: skip
    return lambda data: data.update(pipeline=pipeline)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "plan.pipeline has no stage"),
        ({"rank": 10**20}, r"stages\[0\].rank is 100000000000000000000, of at most 1 ranks"),
        ({"turn_rank": 3}, r"turns\[0\] is of stage 0 on rank 3: there is none"),
        ({"stage": 1}, r"turns\[0\] is of stage 1 on rank 0: there is none"),
        ({"start": 2.0}, r"turns\[0\] is 'F' from 2.0 s to 1.0 s"),
        ({"kind": "x"}, r"turns\[0\] is 'x' from 0.0 s to 1.0 s"),
    ],
)
def test_a_pipeline_that_cannot_be_drawn_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = json.loads(gpt_plan().to_json())
    _pipeline()(data)
    assert "F" in str(Plan.from_json(json.dumps(data)))
    _pipeline(**changes)(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"plan\.json: .*{message}"):
        Plan.load(tmp_path / "plan.json")


def test_a_number_in_a_name_that_counts_no_layers_is_text() -> None:
    data = json.loads(gpt_plan().to_json())
    for value in data["peak"]["alive"]:
        value["module"] = f"h.{'9' * 5000}.mlp"
    assert "mlp" in str(Plan.from_json(json.dumps(data)))


@pytest.mark.parametrize("size", ["9" * 400 + "GiB", "9" * 5000, "9" * 5000 + "%"])
def test_sizes_beyond_any_memory_are_malformed(size: str, tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(f'[limits]\npeak = "{size}"\n')
    with pytest.raises(UsageError, match=r"budget.toml: limits.peak=.* must be a positive size"):
        BudgetFile.read(path)


def test_options_in_any_script_are_written_and_read_back(tmp_path: Path) -> None:
    name = "\U0001f600\x7f\u00e9.json"
    path = tmp_path / "budget.toml"
    text = BudgetFile(path).updated(gpt_plan(), {"model": name})
    path.write_text(text, encoding="utf-8")
    assert BudgetFile.read(path).plan == {"model": name}


def test_a_hostile_description_of_hardware_is_refused_in_time(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("a." * 30_000 + "b = 1\n")
    with pytest.raises(UsageError, match=r"x.toml: line 1 has 30000 dots"):
        describe(path)


# Configurations

BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 16, "max_position_embeddings": 8,
}  # fmt: skip
UNET = {
    "model_type": "fxzero-unet", "image_size": 16, "image_channels": 3, "channels": [32],
    "blocks": 1, "attention_sizes": [], "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["bert"]}, r"model_type \['bert'\] is not known to transformers"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, more than the 16777216 it can"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000, more than the 65536 it can"),
        ({"num_labels": 10**8}, "num_labels is 100000000, more than the 65536 it can"),
        ({"dtype": "load"}, "dtype is 'load', none of float32, bfloat16, float16, float64"),
        ({"torch_dtype": "_inductor"}, "torch_dtype is '_inductor', none of float32"),
        ({"quantization_config": {}}, "quantized weights cannot be planned"),
        ({"max_position_embeddings": "x"}, "cannot build the model"),
        ({"hidden_size": -32}, "cannot build the model"),
        pytest.param(
            {**UNET, "blocks": 60_000},
            f"has more than {MAX_MODULES} modules",
            marks=pytest.mark.slow,
        ),
        ({**UNET, "channels": [32] * 30}, "image_size=16 cannot be halved 29 times"),
    ],
)
def test_configurations_that_no_model_has(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    known = changes if changes.get("model_type") == UNET["model_type"] else {**BERT, **changes}
    path.write_text(json.dumps(known))
    with pytest.raises(UsageError, match=rf"config\.json.*{message}"):
        build_configuration(path, batch=1, seq=None, dtype=None)


def test_a_configuration_chooses_no_code() -> None:
    hostile: dict[str, Any] = {
        "auto_map": {"AutoModel": "planted.Model"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "someone/kernel",
        "experts_implementation": "someone/kernel",
        "trust_remote_code": True,
        "_name_or_path": "someone/model",
    }
    inner = {"text_config": {**BERT, **hostile}}
    checked = checked_configuration({**BERT, **hostile, **inner}, HERE)
    assert checked == {**BERT, "text_config": BERT}


# Checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    return checkpoint.save(tmp_path, model, optimizer, step=1, extra={"best": float("inf")})


def load(path: Path) -> None:
    model = nn.Linear(2, 3)
    checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Changes a file and what the manifest says of it, as a stranger can."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = vars(checkpoint.directories.record_file(path / name))
    (path / "manifest.json").write_text(json.dumps(manifest))


def _optimizer(change: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda state: change(state["optimizer"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("extra"), r"state has \['optimizer'\], expected \['extra', 'optimizer'\]"),
        (lambda s: s.update(extra=[]), "extra must be an object, not list"),
        (_optimizer(lambda o: o.pop("state")), r"expected \['groups', 'state'\]"),
        (
            _optimizer(lambda o: o["groups"][0]["settings"].update(params=[])),
            r"groups\[0\].settings has params, which are the optimizer's own",
        ),
        (
            _optimizer(lambda o: o["groups"][0]["settings"].update(lr={"tuple": 3})),
            r"settings.lr is no setting of an optimizer: \{'tuple': 3\}",
        ),
        (
            _optimizer(lambda o: o["groups"][0]["settings"]["lr"].update(dtype="_inductor")),
            r"settings.lr is no setting of an optimizer",
        ),
        (
            _optimizer(
                lambda o: o["groups"][0]["settings"]["lr"].update(scalar=1e99, dtype="int8")
            ),
            r"settings.lr is no int8",
        ),
        (_optimizer(lambda o: o.update(state={"weight": 3})), "state.weight must be an object"),
    ],
)
def test_a_strange_state_is_refused_by_name(saved: Path, change: Any, message: str) -> None:
    state = json.loads((saved / "state.json").read_text())
    change(state)
    rewrite(saved, "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=rf"state\.json: .*{message}"):
        load(saved)


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    for extra, message in (
        ({"a": 10**200}, "extra has a number of more than 100 digits"),
        ({1: 1, "1": 2}, "the key '1' stands twice"),
    ):
        with pytest.raises(UsageError, match=message):
            checkpoint.save(tmp_path, nn.Linear(1, 1), step=1, extra=extra)
    assert not list(tmp_path.iterdir())


def tensors(path: Path) -> tuple[str, Any, bytes]:
    """Name, header and data of a checkpoint's only file of tensors."""
    (file,) = path.glob("*.safetensors")
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return file.name, json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize(
    ("name", "offsets", "message"),
    [
        ("model.bias", [10**12], r"\[1000000000003\] has 1 parts with 3 elements, not"),
        ("rng.0.cpu", [10**15], "has 1 parts with 5056 elements"),
        ("model.bias", [-1], r"'model.bias' of shape \[3\] begins at \[-1\]"),
        ("model.bias", [0, 0], r"'model.bias' of shape \[3\] begins at \[0, 0\]"),
        ("model.bias", "x", "must be a list, not str"),
        ("model.bias", [True], "must be int, not bool"),
    ],
)
def test_tensors_that_lie_about_where_they_begin_are_refused(
    saved: Path, name: str, offsets: Any, message: str
) -> None:
    file, header, data = tensors(saved)
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    places[name]["saved_offsets"] = offsets
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    text = json.dumps(header).encode()
    rewrite(saved, file, struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_a_state_of_random_generators_that_is_none_is_refused(saved: Path) -> None:
    file, header, data = tensors(saved)
    begin, end = header["rng.0.cpu"]["data_offsets"]
    rest = data[:begin] + b"\xff" * (end - begin) + data[end:]
    text = json.dumps(header).encode()
    rewrite(saved, file, struct.pack("<Q", len(text)) + text + rest)
    with pytest.raises(CheckpointError, match="has no state of a random generator"):
        load(saved)


def test_a_checkpoint_is_what_lies_in_its_folder_and_its_manifest(
    saved: Path, tmp_path: Path
) -> None:
    file, _, _ = tensors(saved)
    (saved / "extra.safetensors").write_bytes((saved / file).read_bytes())
    with pytest.raises(CheckpointError, match=r"extra.safetensors is not in .*manifest.json"):
        load(saved)
    (saved / "extra.safetensors").unlink()
    for name in (file, "state.json", "manifest.json"):
        moved = (saved / name).rename(tmp_path / name)
        (saved / name).symlink_to(moved)
        with pytest.raises(CheckpointError, match=rf"{name} is a link"):
            load(saved)
        (saved / name).unlink()
        moved.rename(saved / name)
    load(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state.json is not in .*manifest.json"):
        load(saved)


def test_a_checkpoint_that_is_a_link_is_deleted_without_what_it_leads_to(
    saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    checkpoint.save(other, nn.Linear(2, 3), step=0)
    (other / "step-9").symlink_to(saved)
    checkpoint.rollback(other, 0)
    assert [path.name for path in other.iterdir()] == ["step-0"]
    load(saved)


def test_an_index_of_weights_leads_nowhere_else(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(tmp_path / "pipe")
    for content, message in (
        ({"weight_map": ["ab"]}, "weight_map must be an object, not list"),
        ({"weight_map": {"weight": "../x"}}, "names a file outside its directory: '../x'"),
        ({"weight_map": {"weight": "pipe"}}, "pipe is no file"),
        ({}, "weight_map must be an object, not NoneType"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_safetensors(nn.Linear(1, 1), tmp_path)


def test_every_error_has_its_text_without_the_code() -> None:
    assert PlanError("no plan").text == "no plan"
    assert FxzeroError("x").text == "x"
