"""Models named on the command line: presets, configuration files, factories."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxzero.errors import UsageError
from fxzero.sources import Source, load_factory, load_model, presets

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "unet-ddpm-32": 35_746_307,
    "unet-ddpm-256": 113_673_219,
    "vit-base": 86_567_656,
    "vit-large": 304_326_632,
    "bert-base": 109_514_298,
    "t5-base": 222_903_552,
}


def tensors(source: Source) -> list[torch.Tensor]:
    inputs = [*source.args, *source.kwargs.values()]
    return [*source.model.parameters(), *source.model.buffers(), *inputs]


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in source.kwargs.items()}


# Presets


def test_every_preset_has_a_parameter_count_here() -> None:
    assert presets() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_published_size_and_no_memory(name: str) -> None:
    source = load_model(name, batch=2)
    assert sum(parameter.numel() for parameter in source.model.parameters()) == PARAMETERS[name]
    assert all(tensor.is_meta for tensor in tensors(source))
    assert source.name == name
    assert source.model.training
    assert all(tensor.shape[0] == 2 for tensor in source.kwargs.values())


@pytest.mark.slow
def test_building_8b_parameters_takes_little_time_and_memory(tmp_path: Path) -> None:
    # VmHWM, for the resident set that getrusage tells may be that of the process that forked.
    code = (
        "import re, time; from fxzero.sources import load_model; start = time.process_time();"
        "load_model('llama-3-8b', batch=1, seq=8192, dtype=None);"
        "seconds = time.process_time() - start; status = open('/proc/self/status').read();"
        "print(seconds, int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) / 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seconds, gibibytes = map(float, done.stdout.split())
    assert seconds < 10
    assert gibibytes < 1


def test_inputs_fit_the_task() -> None:
    assert shapes(load_model("gpt2")) == {"input_ids": (1, 1024), "labels": (1, 1024)}
    assert shapes(load_model("bert-base")) == {"input_ids": (1, 512), "labels": (1, 512)}
    assert shapes(load_model("llama-3-8b", batch=3, seq=9000))["labels"] == (3, 9000)
    images = load_model("vit-base", batch=2, dtype="bfloat16")
    assert shapes(images) == {"pixel_values": (2, 3, 224, 224), "labels": (2,)}
    assert images.kwargs["pixel_values"].dtype == torch.bfloat16
    noisy = load_model("unet-ddpm-32", batch=2, dtype="bfloat16")
    assert shapes(noisy) == {"noisy": (2, 3, 32, 32), "times": (2,), "noise": (2, 3, 32, 32)}
    assert noisy.kwargs["noise"].dtype == torch.bfloat16


def test_dtype_comes_from_the_configuration_unless_it_is_given() -> None:
    def dtypes(name: str, dtype: str | None = None) -> set[torch.dtype]:
        return {p.dtype for p in load_model(name, dtype=dtype).model.parameters()}

    assert dtypes("gpt2") == {torch.float32}
    assert dtypes("llama-3-8b") == {torch.bfloat16}
    assert dtypes("llama-3-8b", "float32") == {torch.float32}


def test_tied_weights_stay_tied_and_no_cache_is_made() -> None:
    model = load_model("gpt2").model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.use_cache is False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert-base", "vit-base"])
def test_a_preset_can_be_traced(name: str) -> None:
    from fxzero.capture import capture

    source = load_model(name)
    assert "['loss']" in capture(source.model, source.args, source.kwargs).outputs.paths


# Configuration files


SMALL = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
}


def written(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(SMALL | changes))
    return str(path)


def test_a_configuration_file_is_a_model(tmp_path: Path) -> None:
    source = load_model(written(tmp_path / "config.json"))
    assert type(source.model).__name__ == "GPT2LMHeadModel"
    assert shapes(source) == {"input_ids": (1, 32), "labels": (1, 32)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["GPT2Model"]}, "GPT2LMHeadModel"),
        ({"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2}, "BertForMaskedLM"),
        (
            {
                "model_type": "bert",
                "hidden_size": 16,
                "num_attention_heads": 2,
                "architectures": ["BertLMHeadModel"],
            },
            "BertLMHeadModel",
        ),
        ({"model_type": "t5", "d_model": 16}, "T5ForConditionalGeneration"),
        ({"model_type": "resnet"}, "ResNetForImageClassification"),
    ],
)
def test_the_class_is_the_named_one_or_the_first_that_trains(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    source = load_model(written(tmp_path / "config.json", **changes))
    assert type(source.model).__name__ == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt99"}, "model_type 'gpt99' is not known to transformers"),
        ({"model_type": None}, "model_type None is not known"),
        ({"model_type": "clap"}, "no inputs are known for clap"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "no inputs are known for GPT2ForToken"),
        ({"quantization_config": {}}, "quantized weights"),
        ({"n_embd": 17}, "cannot build the model: ValueError"),
        ({"model_type": "fxzero-unet"}, "config.json: missing .*'image_size'.*unknown .*'n_embd'"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(written(tmp_path / "config.json", **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        (b"{", "is not JSON"),
        (b"\xff\x00", "is not UTF-8"),
        (b"[]", "holds no configuration, but a list"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_model(str(path))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("gpt2x", {}, "no model 'gpt2x'; did you mean 'gpt2"),
        ("qqq", {}, "no model 'qqq'\n  presets: bert-base, gpt2,"),
        ("gpt2", {"seq": 1025}, "--seq 1025: gpt2 has 1024 positions"),
        ("gpt2", {"seq": 0}, "seq=0 must be positive"),
        ("gpt2", {"dtype": "int8"}, "dtype='int8' is not one of float32"),
        ("vit-base", {"seq": 4}, "--seq 4 has no effect: vit takes images"),
        ("unet-ddpm-32", {"seq": 4}, "--seq 4 has no effect: fxzero-unet takes images"),
    ],
)
def test_wrong_names_and_sizes_are_refused(
    spec: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(spec, **options)


# Factories


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4).double())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) * self.scale.float())


def no_meta() -> tuple[nn.Module, torch.Tensor]:
    assert torch.ones(1).item() == 1  # raises on the meta device
    return Tied(), torch.zeros(2, 3, dtype=torch.int64)


def sized(batch: int = 1, dtype: torch.dtype | None = None) -> tuple[nn.Module, torch.Tensor]:
    return Tied(), torch.zeros(batch, 3, dtype=dtype)


def failing() -> None:
    raise ValueError("no such data")


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("factories")
    module.__dict__.update(
        no_meta=no_meta,
        sized=sized,
        failing=failing,
        tuple=lambda: (Tied(), (IDS,)),
        tensor=lambda: (Tied().eval(), IDS),
        dict=lambda: (Tied(), {"ids": IDS}),
        both=lambda: (Tied(), (IDS,), {"flag": True}),
        alone=lambda: Tied(),
        number=3,
    )
    monkeypatch.setitem(sys.modules, "factories", module)
    return module


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        ("tuple", 1, []),
        ("tensor", 1, []),
        ("dict", 0, ["ids"]),
        ("both", 1, ["flag"]),
        ("no_meta", 1, []),
    ],
)
def test_a_factory_may_return_its_inputs_in_four_forms(
    name: str, positional: int, keywords: list[str]
) -> None:
    source = load_model(f"factories:{name}")
    assert len(source.args) == positional
    assert list(source.kwargs) == keywords
    assert source.model.training
    found = [tensor for tensor in tensors(source) if isinstance(tensor, torch.Tensor)]
    assert all(tensor.is_meta for tensor in found)
    model = source.model
    assert isinstance(model, Tied)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert model.scale.dtype == torch.float64


@pytest.mark.usefixtures("factories")
def test_a_factory_gets_the_sizes_that_it_takes() -> None:
    source = load_model("factories:sized", batch=5, dtype="float16")
    assert source.args[0].shape == (5, 3)
    assert source.args[0].dtype == torch.float16
    with pytest.raises(UsageError, match="--seq has no effect"):
        load_model("factories:sized", seq=5)


@pytest.mark.usefixtures("factories")
def test_load_factory_keeps_real_tensors() -> None:
    source = load_factory("factories:no_meta")
    assert {tensor.device.type for tensor in tensors(source)} == {"cpu"}


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("factories:sised", "has no function 'sised'; did you mean 'sized'"),
        ("factories:number", "has no function 'number'"),
        ("factories:failing", "factories:failing raised ValueError: no such data"),
        ("factories:alone", "returned Tied, expected"),
        (":f", "cannot import ''"),
    ],
)
def test_a_factory_that_fails_is_one_clear_line(spec: str, message: str) -> None:
    for load in (load_model, load_factory):
        with pytest.raises(UsageError, match=message):
            load(spec)


@pytest.mark.slow
def test_a_factory_in_the_working_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2), torch.ones(1, 2)\n"
    )
    code = "from fxzero.sources import load_model; print(load_model('mine:make').args[0].device)"
    script = tmp_path / "elsewhere" / "script.py"  # as a console script: not in the same folder
    script.parent.mkdir()
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'mine'" in done.stderr  # a safe path stays safe
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stdout == "meta\n", done.stderr
