"""Checkpoints with the keys of Diff-Mix and with newer keys are applied exactly, or refused in one line."""

import json
import pickle
import shutil
import subprocess
import sys
import warnings

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from drawing import (
    ROOT,
    TINY_WIDTH,
    files_of,
    in_old_keys,
    offline_environment,
    random_lora,
    run_to_the_end,
    write_checkpoint,
    write_embeddings,
)
from finetuning import finetune
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.checkpoint import load_pipeline
from noisecutmix.classes import load_classes
from noisecutmix.errors import InputError
from noisecutmix.lora import fuse_lora, read_lora
from noisecutmix.sources import find_checkpoint_files, fingerprint_checkpoint, fingerprint_files, fingerprint_model

LORA = "pytorch_lora_weights.safetensors"
EMBEDDINGS = "learned_embeds-steps-last.bin"


def in_peft_keys(layers):
    state_dict = {}
    for name, (down, up) in layers.items():
        state_dict[f"unet.{name}.lora_A.weight"] = down
        state_dict[f"unet.{name}.lora_B.weight"] = up
    return state_dict


def in_named_adapter_keys(layers):
    """The key names that peft uses in a model."""
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in in_peft_keys(layers).items()}


def in_prefixed_old_keys(layers):
    return {f"unet.{key}": tensor for key, tensor in in_old_keys(layers).items()}


def in_kohya_keys(layers):
    """With an alpha of half the rank, which halves the LoRA."""
    state_dict = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state_dict[f"{key}.lora_down.weight"] = down
        state_dict[f"{key}.lora_up.weight"] = up
        state_dict[f"{key}.alpha"] = torch.tensor(len(down) / 2)
    return state_dict


def unet_with(tiny_model, folder):
    """Return the UNet's weights with the LoRA in a folder, as `load_pipeline` adds it."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    file, _, settings_file = find_checkpoint_files(folder)
    fuse_lora(unet, *read_lora(file, settings_file), file)
    return unet.state_dict()


def load_whole(model, folder):
    return load_pipeline(str(model), folder, device="cpu")


PLAIN_KEYS = (in_old_keys, in_prefixed_old_keys, in_peft_keys, in_named_adapter_keys)


@pytest.mark.parametrize(("keys", "scale"), [*((keys, 1) for keys in PLAIN_KEYS), (in_kohya_keys, 0.5)])
def test_lora_changes_the_unet_by_up_times_down(tiny_model, tiny_lora, tmp_path, keys, scale):
    write_checkpoint(tmp_path, keys(tiny_lora))
    before = UNet2DConditionModel.from_pretrained(tiny_model / "unet").state_dict()
    after = unet_with(tiny_model, tmp_path)
    assert after.keys() == before.keys()  # no adapter remains
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        expected = weight
        if layer in tiny_lora:
            down, up = tiny_lora[layer]
            expected = weight + scale * up @ down
            assert not torch.equal(after[name], weight)
        assert (after[name] - expected).abs().max() < 1e-5


PEFT_SETTINGS = {
    "alpha above the rank": {"r": 4, "lora_alpha": 16},
    "rank-stabilised": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "alpha pattern": {"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 12, "attn2.to_k": 2}},
    "rank pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 6, "attn1.to_q": 2}},
    # these change the base weights in a way that peft repeats when it loads them
    "pissa": {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "lora_alpha": 8, "init_lora_weights": "olora"},
}


def save_with_peft(unet, folder, target_modules=("to_q", "to_k", "to_v"), **settings):
    """Save a random LoRA with peft into `folder`; return the UNet's weights after peft's own merge."""
    model = get_peft_model(unet, LoraConfig(target_modules=list(target_modules), **settings))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=rng) * 0.3)
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").replace(folder / LORA)
    return model.merge_and_unload().state_dict()


@pytest.fixture
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model / "unet")


def assert_weights_are(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert (actual[name] - weight).abs().max() < 1e-5


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_a_lora_saved_by_peft_changes_the_unet_as_peft_does(tiny_model, unet, tmp_path, case):
    merged = save_with_peft(unet, tmp_path, **PEFT_SETTINGS[case])
    write_embeddings(tmp_path)
    assert_weights_are(unet_with(tiny_model, tmp_path), merged)


@pytest.mark.parametrize(("case", "prefix"), [*((case, "unet.") for case in PEFT_SETTINGS), ("alpha pattern", "")])
def test_settings_in_the_safetensors_file_are_applied(tiny_model, unet, tmp_path, case, prefix):
    """In the form in which diffusers saves them: with a prefix for a pipeline, without one for a UNet."""
    merged = save_with_peft(unet, tmp_path, **PEFT_SETTINGS[case])
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").unlink()
    tensors = {prefix + name.removeprefix("base_model.model."): t for name, t in load_file(tmp_path / LORA).items()}
    packed = json.dumps({prefix + name: value for name, value in settings.items()})
    save_file(tensors, tmp_path / LORA, metadata={"format": "pt", "lora_adapter_metadata": packed})
    write_embeddings(tmp_path)
    assert_weights_are(unet_with(tiny_model, tmp_path), merged)


def test_layers_of_several_ranks_keep_their_scale(tiny_model, tiny_components, tmp_path):
    """Without settings the scale of a layer is 1 for any rank, and an alpha applies only to its own layer."""
    ranks = {name: random_lora(tiny_components["unet"], rank=rank) for name, rank in (("to_q", 3), ("to_k", 5))}
    layers = {name: halves for name, halves in ranks["to_q"].items() if not name.endswith("to_k")}
    layers |= {name: halves for name, halves in ranks["to_k"].items() if name.endswith("to_k")}
    expected = UNet2DConditionModel.from_pretrained(tiny_model / "unet").state_dict()
    alphas = {}
    for number, (name, (down, up)) in enumerate(sorted(layers.items())):
        alphas[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(number + 1))
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + (number + 1) / len(down) * up @ down
    write_checkpoint(tmp_path, in_kohya_keys(layers) | alphas)
    assert_weights_are(unet_with(tiny_model, tmp_path), expected)


def refusal_of(model, folder, load=unet_with):
    with pytest.raises(InputError) as caught:
        load(model, folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_peft_keys_without_their_settings_are_refused(tiny_model, unet, tmp_path):
    save_with_peft(unet, tmp_path, r=4, lora_alpha=16)
    write_embeddings(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "was saved by peft: put its adapter_config.json" in refusal_of(tiny_model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"r": 5}, "does not fit the UNet"),
        # peft 0.21.2: a start by randomised SVD is another one when it is loaded, with an error of 1.0
        ({"init_lora_weights": "pissa_niter_4"}, "starts with pissa_niter_4, from base weights that"),
        ({"init_lora_weights": "loftq"}, "starts with loftq"),
        ({"init_lora_weights": "corda"}, "starts with corda"),
        ({"init_lora_weights": "lora_ga"}, "starts with lora_ga"),
        ({"target_parameters": ["to_q.weight"]}, "LoRAs with target_parameters are not read"),
        ({"alora_invocation_tokens": [1]}, "LoRAs with alora_invocation_tokens are not read"),
        ({"rank_pattern": [1]}, "does not fit the UNet"),
        ({"setting_of_tomorrow": 1}, "setting_of_tomorrow"),
        ("[", "settings cannot be read"),
        ("[]", "settings cannot be read"),
    ],
)
def test_settings_that_cannot_be_applied_are_refused(tiny_model, unet, tmp_path, change, message):
    save_with_peft(unet, tmp_path, r=4, lora_alpha=16)
    write_embeddings(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    assert message in refusal_of(tiny_model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"setting_of_tomorrow": None},
        {"setting_of_tomorrow": False},
        {"rank_pattern": None, "alpha_pattern": None},
        {"enable_lora": None, "merge_weights": False},  # of peft 0.1
        {"init_lora_weights": "eva"},  # found from data, and all of it is in the LoRA
        {"peft_type": None},
    ],
)
def test_settings_of_other_versions_of_peft_change_nothing(tiny_model, unet, tmp_path, change):
    merged = save_with_peft(unet, tmp_path, r=4, lora_alpha=16)
    write_embeddings(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_weights_are(unet_with(tiny_model, tmp_path), merged)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(LoKrConfig, "unet."), (LoKrConfig, ""), (LoHaConfig, "unet."), (OFTConfig, "unet."), (IA3Config, "unet.")],
)
def test_what_is_no_down_and_up_matrices_is_refused(tiny_model, unet, tmp_path, kind, prefix):
    """diffusers 0.42 loads a LoKr without its settings, at a wrong strength."""
    more = (
        {"oft_block_size": 4, "r": 0} if kind is OFTConfig else {"feedforward_modules": []} if kind is IA3Config else {}
    )
    get_peft_model(unet, kind(target_modules=["to_q", "to_v"], **more)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({prefix + name.removeprefix("base_model.model."): t for name, t in tensors.items()}, tmp_path / LORA)
    write_embeddings(tmp_path)
    refusal = refusal_of(tiny_model, tmp_path)
    assert "nothing in the UNet takes " in refusal and "only down and up matrices are read" in refusal


def test_a_plain_lora_of_lycoris_is_read_like_one_of_kohya(tiny_model, tiny_lora, tmp_path):
    kohya = in_kohya_keys(tiny_lora)
    write_checkpoint(tmp_path / "kohya", kohya)
    write_checkpoint(tmp_path / "lycoris", {name.replace("lora_unet_", "lycoris_"): t for name, t in kohya.items()})
    expected, actual = (unet_with(tiny_model, tmp_path / name) for name in ("kohya", "lycoris"))
    assert_weights_are(actual, expected)
    name = next(name for name in kohya if name.endswith("lora_down.weight")).replace("lora_unet_", "lycoris_")
    mid = name.replace("lora_down", "lora_mid")
    write_checkpoint(tmp_path / "mid", {**load_file(tmp_path / "lycoris" / LORA), mid: torch.ones(2, 2)})
    assert "lora_mid.weight; only down and up matrices are read" in refusal_of(tiny_model, tmp_path / "mid")


def test_a_dora_is_refused(tiny_model, unet, tiny_lora, tmp_path):
    save_with_peft(unet, tmp_path, r=4, use_dora=True)
    write_embeddings(tmp_path)
    assert "is a DoRA" in refusal_of(tiny_model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "is a DoRA" in refusal_of(tiny_model, tmp_path)
    kohya = in_kohya_keys(tiny_lora)
    write_checkpoint(tmp_path, kohya | {min(kohya).replace(".alpha", ".dora_scale"): torch.ones(1)})
    assert "is a DoRA" in refusal_of(tiny_model, tmp_path)


@pytest.mark.parametrize("prefix", ["text_encoder.", "lora_te_"])
def test_weights_for_the_text_encoder_are_refused(tiny_model, tiny_lora, tmp_path, prefix):
    name = f"{prefix}text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    write_checkpoint(tmp_path, in_kohya_keys(tiny_lora) | {name: torch.ones(4, 4)})
    assert "is for the text encoder" in refusal_of(tiny_model, tmp_path)


def test_a_pickled_lora_is_read_and_a_hostile_one_refused(tiny_model, tiny_checkpoint, tiny_lora, tmp_path, capsys):
    write_embeddings(tmp_path)
    pickled = tmp_path / "pytorch_lora_weights.bin"
    torch.save(in_old_keys(tiny_lora), pickled)
    expected = unet_with(tiny_model, tiny_checkpoint)
    assert_weights_are(unet_with(tiny_model, tmp_path), expected)
    for content in (pickle.dumps(Hostile()), b"zip?"):
        pickled.write_bytes(content)
        assert f"{pickled} is not a pickle that holds only tensors" in refusal_of(tiny_model, tmp_path)
    torch.save([1], pickled)
    assert "holds no dictionary of tensors" in refusal_of(tiny_model, tmp_path)
    assert "this ran" not in capsys.readouterr().out


def as_pickles(model, folder, *parts):
    """Copy a model, with `.bin` weights in place of safetensors in these parts."""
    StableDiffusionPipeline.from_pretrained(model).save_pretrained(folder)
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), folder / part / name)
        file.unlink()
    return folder


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("text_encoder",)])
def test_a_base_model_of_pickles_is_read(tiny_model, tiny_checkpoint, tmp_path, parts):
    pickled = as_pickles(tiny_model, tmp_path / "model", *parts)
    expected = load_pipeline(str(tiny_model), tiny_checkpoint, device="cpu")
    loaded = load_pipeline(str(pickled), tiny_checkpoint, device="cpu")
    assert_weights_are(loaded.unet.state_dict(), expected.unet.state_dict())
    assert_weights_are(loaded.text_encoder.state_dict(), expected.text_encoder.state_dict())


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_hostile_pickle_in_a_base_model_is_not_run(tiny_model, tiny_checkpoint, tmp_path, capsys, part):
    pickled = as_pickles(tiny_model, tmp_path / "model", part)
    (file,) = (pickled / part).glob("*.bin")
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=r"model: .* cannot be loaded") as caught:
        load_pipeline(str(pickled), tiny_checkpoint, device="cpu")
    assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """A function that puts the tiny model as a commit, with a README, into a hub cache that is used offline."""
    cache = tmp_path / "hub" / "models--someone--tiny"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *names, **options: snapshot_download(*names, **options, cache_dir=tmp_path / "hub"),
    )

    def commit(number, readme="A model.", branch="main", model=tiny_model):
        snapshot = cache / "snapshots" / (str(number) * 40)
        shutil.copytree(model, snapshot, dirs_exist_ok=True)
        (snapshot / "README.md").write_text(readme)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(str(number) * 40)
        return snapshot

    return commit


def test_a_hub_model_is_identified_by_the_files_that_are_loaded(hub, tiny_model):
    snapshot = hub(1)
    first = fingerprint_model("someone/tiny", False)
    assert first == fingerprint_model(str(tiny_model), False)  # a local copy is identified in the same way
    hub(2, readme="An edited page.")
    assert fingerprint_model("someone/tiny", False) == first
    snapshot = hub(3)
    (snapshot / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    assert fingerprint_model("someone/tiny", False) == first
    (snapshot / "scheduler" / "scheduler_config.json").write_text("{}")
    assert fingerprint_model("someone/tiny", False) != first


def test_a_revision_of_a_hub_model_can_be_selected(hub, tiny_checkpoint, tmp_path, capsys):
    hub(1)
    changed = StableDiffusionPipeline.from_pretrained(hub(2, branch="v2"))
    with torch.no_grad():
        changed.unet.conv_in.bias.fill_(0.5)
    changed.save_pretrained(tmp_path / "changed")
    hub(2, branch="v2", model=tmp_path / "changed")
    assert fingerprint_model("someone/tiny@v2", False) != fingerprint_model("someone/tiny", False)
    capsys.readouterr()
    assert (load_pipeline("someone/tiny@v2", tiny_checkpoint, "cpu").unet.conv_in.bias == 0.5).all()
    assert not (load_pipeline("someone/tiny", tiny_checkpoint, "cpu").unet.conv_in.bias == 0.5).any()
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"model: someone/tiny@v3 .* cannot be downloaded"):
        load_pipeline("someone/tiny@v3", tiny_checkpoint, "cpu")


def test_a_data_set_continues_with_its_model_after_the_repository_has_moved(
    hub, tiny_arguments, tiny_checkpoint, tmp_path
):
    hub(1)
    flags = [*tiny_arguments, "--model=someone/tiny"]
    run_to_the_end(tmp_path, flags, 2, script="augmentation.py")
    changed = StableDiffusionPipeline.from_pretrained(hub(2))  # another program has fetched the new commit
    with torch.no_grad():
        changed.unet.conv_in.bias.fill_(0.5)
    changed.save_pretrained(tmp_path / "changed")
    hub(2, model=tmp_path / "changed")
    run_to_the_end(tmp_path, flags, 4, script="augmentation.py")
    flags = [*tiny_arguments, f"--model=someone/tiny@{'1' * 40}"]
    run_to_the_end(tmp_path, flags, 4, "--output_dir=whole", script="augmentation.py")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_commit"] == "1" * 40


def test_fine_tuning_continues_with_its_model_and_draws_with_it(hub, flags, tmp_path):
    flags = [*flags, "--model=someone/tiny", "--output_dir=tuned"]
    hub(1)
    finetune(tmp_path, *flags, "--max_train_steps=1")
    snapshot = hub(2)
    (snapshot / "scheduler" / "scheduler_config.json").write_text("{}")
    finetune(tmp_path, *flags, "--max_train_steps=2")
    assert load_classes(str(tmp_path / "tuned")).model == f"someone/tiny@{'1' * 40}"


def test_the_fingerprint_of_a_checkpoint_includes_the_lora_settings(unet, tmp_path):
    save_with_peft(unet, tmp_path, r=4, lora_alpha=16)
    write_embeddings(tmp_path)
    before = fingerprint_checkpoint(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
    assert fingerprint_checkpoint(tmp_path) != before


@pytest.mark.parametrize("name", [LORA, EMBEDDINGS])
def test_an_unreadable_checkpoint_is_named(tiny_model, tiny_lora, tmp_path, name):
    """A folder replaces a file without read permission, because root may read such a file."""
    write_checkpoint(tmp_path, in_old_keys(tiny_lora))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert f"has no {name}; " in refusal_of(tiny_model, tmp_path)
    with pytest.raises(InputError, match=f"{name} cannot be read: "):
        fingerprint_files(tmp_path, [tmp_path / name])


OTHER_MODELS = {
    "inpainting": {"in_channels": 9},
    "InstructPix2Pix": {"in_channels": 8},
    "depth": {"in_channels": 5},
    "learned variance": {"out_channels": 8},
    "SDXL": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TINY_WIDTH + 6 * 8,
    },
    "unCLIP": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": TINY_WIDTH},
    "upscaler": {"num_class_embeds": 10},
    "another text encoder": {"cross_attention_dim": 2 * TINY_WIDTH},
    "guidance distilled": {"time_cond_proj_dim": 8},
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_that_is_no_plain_stable_diffusion_is_refused(tiny_model, tiny_checkpoint, unet, tmp_path, kind):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    UNet2DConditionModel(**{**config, **OTHER_MODELS[kind]}).save_pretrained(model / "unet")
    assert "is not a plain Stable Diffusion model, such as 1.5 or 2.1" in refusal_of(model, tiny_checkpoint, load_whole)


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content.pop(name, None) if value is None else content.update({name: value})
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "is a flow-matching, EDM or"),
        ("EDMEulerScheduler", {"prediction_type": "epsilon"}, "is a flow-matching, EDM or"),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "epsilon"}, "is a flow-matching, EDM or"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "is a flow-matching, EDM or"),
        ("LCMScheduler", {}, "is a flow-matching, EDM or"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "has a schedule that DPM-Solver++ lacks"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "has a scheduler with variance_type 'learned_range'"),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(
    tiny_model, tiny_checkpoint, tmp_path, name, settings, message
):
    """diffusers 0.42.1 makes a DPM-Solver++ from the settings of any class, and draws with it as if it were epsilon."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(model / "model_index.json", scheduler=["diffusers", name])
    edit_json(model / "scheduler" / "scheduler_config.json", _class_name=name, **settings)
    assert message in refusal_of(model, tiny_checkpoint, load_whole)


def test_a_text_encoder_with_a_projection_is_refused(tiny_model, tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = CLIPTextConfig.from_pretrained(model / "text_encoder")
    shutil.rmtree(model / "text_encoder")
    CLIPTextModelWithProjection(config).save_pretrained(model / "text_encoder")
    edit_json(model / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    assert "is not a plain Stable Diffusion model" in refusal_of(model, tiny_checkpoint, load_whole)


@pytest.mark.parametrize("length", [None, 1000])
def test_a_tokenizer_pads_to_the_positions_of_the_text_encoder(tiny_model, tiny_checkpoint, tmp_path, length):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    pipe = load_pipeline(str(model), tiny_checkpoint, "cpu")
    positions = pipe.text_encoder.config.max_position_embeddings
    assert pipe.tokenizer.model_max_length == positions
    assert pipe.encode_prompt("a photo", "cpu", 1, False)[0].shape[1] == positions


def test_schedules_that_diffusers_cannot_make_are_refused(tiny_model, tiny_checkpoint, tiny_data, tmp_path):
    """With "trailing" spacing, diffusers 0.42.1 makes one timestep more for 62 numbers of steps."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = model / "scheduler" / "scheduler_config.json"
    edit_json(settings, timestep_spacing="trailing")
    pipe = load_pipeline(str(model), tiny_checkpoint, "cpu")
    refused = 0
    for steps in range(1, 999):
        try:
            pipe.check_steps(steps, 7.5, (0.0, 1.0))
        except InputError as error:
            assert "num_inference_steps" in str(error)
            refused += 1
            continue
        pipe.scheduler.set_timesteps(steps)
        assert len(pipe.scheduler.timesteps) == steps and pipe.scheduler.timesteps.min() >= 0
    assert 30 < refused < 100
    edit_json(settings, timestep_spacing="leading", use_karras_sigmas=True, solver_order=3)
    pipe = load_pipeline(str(model), tiny_checkpoint, "cpu")
    with pytest.raises(InputError, match=r"model: .*solver_order 3"):
        pipe.check_steps(20, 7.5, (0.0, 1.0))
    edit_json(settings, solver_order=2)
    load_pipeline(str(model), tiny_checkpoint, "cpu").check_steps(20, 7.5, (0.0, 1.0))
    edit_json(settings, solver_order=3)
    for file in model.glob("*/*.safetensors"):
        file.write_bytes(b"refused before any weight is read")
    with pytest.raises(InputError, match=r"model: .*solver_order 3"):
        NoiseCutMixGenerator("cpu", str(tiny_data), ckpt_path=tiny_checkpoint, model=model, num_inference_steps=20)


def test_a_vae_that_only_draws_is_refused_in_fine_tuning(tiny_model, flags, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    blocks = {f"{way}coder_block_out_channels": (8, 8) for way in ("en", "de")}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(model / "vae")
    edit_json(model / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(InputError, match=r"--model: .* has an AutoencoderTiny, which only draws"):
        finetune(tmp_path, *flags, f"--model={model}")
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_covers_every_byte(tmp_path):
    """A model of which only attention weights differ, as after concept editing, has the same size and the same ends."""
    file = tmp_path / "unet.safetensors"
    content = bytearray(5 * 2**20)
    fingerprints = set()
    for place in (0, 2**20 + 7, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        fingerprints.add(fingerprint_files(tmp_path, [file]))
    assert len(fingerprints) == 4


def test_loading_is_silent_and_leaves_the_libraries_as_they_were(tiny_model, tiny_checkpoint, capfd):
    libraries, random_state = (diffusers_logging, transformers_logging), torch.random.get_rng_state()
    for library in libraries:
        library.set_verbosity_info()
        library.enable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load_pipeline(str(tiny_model), tiny_checkpoint, "cpu", torch.float16)
            assert [library.get_verbosity() for library in libraries] == [diffusers_logging.INFO] * 2
            assert all(library.is_progress_bar_enabled() for library in libraries)
            assert not huggingface_hub.utils.are_progress_bars_disabled()
            assert torch.equal(torch.random.get_rng_state(), random_state)
    finally:
        for library in libraries:
            library.set_verbosity_warning()
    captured = capfd.readouterr()
    assert (captured.out, captured.err, seen) == ("", "", [])


@pytest.mark.slow
def test_python_prints_nothing_from_the_import_to_the_picture(tmp_path):
    """The output holds no warnings and no progress bars of the libraries."""
    code = """
from noisecutmix import NoiseCutMixGenerator, load_pipeline
NoiseCutMixGenerator(device="cpu", data_name="digits", num_inference_steps=1)([3])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=offline_environment(PYTHONPATH=str(ROOT)),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_slashes_and_underlosses_in_names_become_spaces(tiny_model, tiny_lora, tmp_path):
    """As in the method's first implementation, in both mappings."""
    write_checkpoint(tmp_path, in_old_keys(tiny_lora), class_names=["Sooty/Albatross", "Blue_Jay", "owl "])
    pipe = load_pipeline(str(tiny_model), tmp_path, device="cpu")
    assert pipe.name2placeholder == {"Sooty Albatross": "<class_0>", "Blue Jay": "<class_1>", "owl": "<class_2>"}
    assert pipe.placeholder2name == {"<class_0>": "Sooty Albatross", "<class_1>": "Blue Jay", "<class_2>": "owl"}


def test_tokens_get_their_embeddings(tiny_model, tiny_checkpoint):
    pipe = load_pipeline(str(tiny_model), tiny_checkpoint, device="cpu")
    learned = torch.load(tiny_checkpoint / EMBEDDINGS, weights_only=True)
    assert pipe.name2placeholder == learned["name2placeholder"]
    plain = StableDiffusionPipeline.from_pretrained(tiny_model).text_encoder.get_input_embeddings().weight
    weight = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[: len(plain)], plain)
    for token, embedding in learned["learned_embeds_dict"].items():
        (token_id,) = pipe.tokenizer(token, add_special_tokens=False).input_ids
        assert torch.equal(weight[token_id], embedding)


def test_scheduler_ends_at_sigma_min(tiny_pipeline):
    assert isinstance(tiny_pipeline.scheduler, DPMSolverMultistepScheduler)
    tiny_pipeline.scheduler.set_timesteps(25)
    assert tiny_pipeline.scheduler.sigmas[-1] > 0


def test_half_precision_files_are_used_where_they_are(tiny_model, tiny_checkpoint, tmp_path):
    """A folder with only fp16 files loads in either dtype; if both exist, float16 loads the fp16 files."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    half = tmp_path / "half"
    pipe.to(torch.float16).save_pretrained(half, variant="fp16")
    load_pipeline(str(half), tiny_checkpoint, "cpu")
    assert load_pipeline(str(half), tiny_checkpoint, "cpu", torch.float16).unet.dtype == torch.float16

    both = tmp_path / "both"
    StableDiffusionPipeline.from_pretrained(tiny_model).save_pretrained(both)
    changed = pipe.unet
    with torch.no_grad():
        changed.conv_in.bias.fill_(0.5)
    pipe.save_pretrained(both, variant="fp16")
    assert (load_pipeline(str(both), tiny_checkpoint, "cpu", torch.float16).unet.conv_in.bias == 0.5).all()
    assert not (load_pipeline(str(both), tiny_checkpoint, "cpu", torch.float32).unet.conv_in.bias == 0.5).any()


def remove(name):
    return lambda folder: (folder / name).unlink()


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change_lora(change):
    def damage(folder):
        tensors = load_file(folder / LORA)
        change(tensors)
        save_file(tensors, folder / LORA)

    return damage


def rename_first(name):
    def change(tensors):
        key = min(tensors)
        tensors[name] = tensors.pop(key)

    return change_lora(change)


class Hostile:
    def __reduce__(self):
        return (print, ("this ran",))


def learned(**changes):
    return lambda folder: write_embeddings(folder, **changes)


def embeddings_of(value, token="<class_0>"):
    content = {f"<class_{label}>": torch.zeros(TINY_WIDTH) for label in range(3)}
    return learned(learned_embeds_dict={**content, token: value})


REFUSALS = {
    "no LoRA": (remove(LORA), f"has no {LORA}"),
    "no embeddings": (remove(EMBEDDINGS), f"has no {EMBEDDINGS}"),
    "LoRA is no safetensors": (overwrite(LORA, b"not a tensor in sight"), "not a safetensors file"),
    "LoRA is empty": (overwrite(LORA, b""), "not a safetensors file"),
    "LoRA is cut off": (
        lambda folder: overwrite(LORA, (folder / LORA).read_bytes()[:-100])(folder),
        "not a safetensors",
    ),
    "LoRA of no tensor": (change_lora(dict.clear), "no LoRA tensor"),
    "LoRA of a wider model": (
        lambda folder: save_file(
            {key: torch.zeros(10, 320) if ".down" in key else torch.zeros(320, 10) for key in load_file(folder / LORA)},
            folder / LORA,
        ),
        "another base model",
    ),
    "LoRA without a place": (rename_first("down_blocks.9.attentions.0.to_q.lora.down.weight"), "nothing in the UNet"),
    "LoRA of nothing we know": (rename_first("some.other.tensor"), "nothing in the UNet takes some.other.tensor"),
    "LoRA for the text encoder": (rename_first("text_encoder.layer.to_q.lora_A.weight"), "is for the text encoder"),
    "LoRA in half a pair": (change_lora(lambda tensors: tensors.pop(min(tensors))), "LoRA tensors do not fill"),
    "LoRA of two ranks": (
        change_lora(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)][:3]})),
        "has rank 10, but the other matrix of its layer has not",
    ),
    "LoRA not finite": (change_lora(lambda tensors: tensors[min(tensors)].fill_(torch.nan)), "not finite"),
    "hostile pickle": (overwrite(EMBEDDINGS, pickle.dumps(Hostile())), "not loaded"),
    "no pickle": (overwrite(EMBEDDINGS, b"zip?"), "not loaded"),
    "embeddings are no dictionary": (lambda folder: torch.save([1], folder / EMBEDDINGS), "holds no dictionary with"),
    "embeddings without names": (learned(name2placeholder=None), "with learned_embeds_dict and name2placeholder"),
    "a name without embedding": (learned(name2placeholder={"owl": "<class_7>"}), "'<class_7>' for class 'owl'"),
    "two names on one token": (learned(name2placeholder={"owl": "<class_0>", "kite": "<class_0>"}), "share a token"),
    "two names alike": (learned(name2placeholder={"a b": "<class_0>", "a_b": "<class_1>"}), "differ only in spaces"),
    "embedding too wide": (embeddings_of(torch.zeros(TINY_WIDTH + 1)), r"shape \(33,\)"),
    "embedding not finite": (embeddings_of(torch.full((TINY_WIDTH,), torch.inf)), "<class_0> is not finite"),
    "embedding sparse": (embeddings_of(torch.zeros(TINY_WIDTH).to_sparse()), "is not finite, or not dense"),
    "embedding without data": (embeddings_of(torch.zeros(TINY_WIDTH, device="meta")), "is not finite, or not dense"),
    "embedding no tensor": (embeddings_of("0.5"), "is not a tensor"),
    "token known already": (embeddings_of(torch.zeros(TINY_WIDTH), token="a</w>"), "already has the token a</w>"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_one_line_that_names_the_file(tiny_model, tiny_lora, tmp_path, capsys, case):
    damage, message = REFUSALS[case]
    write_checkpoint(tmp_path, in_old_keys(tiny_lora))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(str(tiny_model), tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    captured = capsys.readouterr()
    assert "this ran" not in captured.out
    assert captured.err == ""


def test_a_dtype_may_be_a_string(tiny_model, tiny_checkpoint):
    assert load_pipeline(str(tiny_model), tiny_checkpoint, "cpu", "bfloat16").unet.dtype == torch.bfloat16
    for wrong in ("float8", torch.int8, torch.float64, 16):
        with pytest.raises(InputError, match="dtype: has to be float16, bfloat16, float32 or None"):
            load_pipeline(str(tiny_model), tiny_checkpoint, "cpu", wrong)


def test_a_lack_of_memory_is_not_called_a_damaged_model(tiny_model, tiny_checkpoint, monkeypatch):
    def never(*arguments, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough memory: you tried")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", never)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", never)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load_pipeline(str(tiny_model), tiny_checkpoint, device="cpu")


def test_an_invalid_model_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match=r"^model: "):
        load_pipeline(str(tmp_path), tiny_checkpoint, device="cpu")


# Weights that do not fit the model


WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def change_weights(model, part, change):
    """Change the tensors of a part; `change` gets their dictionary and a name of one."""
    file = model / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(file)
    change(tensors, next(name for name in tensors if "layers.1.mlp.fc1.weight" in name or "resnets.0.conv1.w" in name))
    save_file(tensors, file, {"format": "pt"})


MISFITS = {
    "missing": (lambda tensors, name: tensors.pop(name), "{name} is missing"),
    "left over": (lambda tensors, name: tensors.update({name + ".more": torch.zeros(1)}), "{name}.more is left over"),
    "of another shape": (lambda tensors, name: tensors.update({name: torch.zeros(3)}), "{name} has a wrong shape"),
    "renamed": (
        lambda tensors, name: [tensors.update({f"cond_stage.{key}": tensors.pop(key)}) for key in list(tensors)],
        "is missing and cond_stage",
    ),
}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_a_library_would_make_up_are_refused(tiny_model, tiny_checkpoint, tmp_path, part, kind):
    """transformers fills what is missing with random numbers, diffusers ends in an error about meta tensors."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    change, message = MISFITS[kind]
    names = []
    change_weights(model, part, lambda tensors, name: (names.append(name), change(tensors, name)))
    refusal = refusal_of(model, tiny_checkpoint, load_whole)
    wanted = message.format(name=names[0].removeprefix("text_model."))
    assert f"the weights do not fit {part}/config.json: " in refusal and wanted in refusal


def test_a_text_encoder_with_fewer_layers_than_its_config_is_refused(tiny_model, tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = model / "text_encoder" / "config.json"
    layers = json.loads(config.read_text())["num_hidden_layers"]
    for wanted, message in ((layers + 1, f"encoder.layers.{layers}."), (layers - 1, None)):
        content = {**json.loads(config.read_text()), "num_hidden_layers": wanted}
        config.write_text(json.dumps(content))
        if message:
            assert message in refusal_of(model, tiny_checkpoint, load_whole)
        else:  # as a config does that skips the last layer
            assert load_pipeline(str(model), tiny_checkpoint, "cpu").text_encoder.config.num_hidden_layers == wanted


def test_a_whole_clip_and_position_ids_are_taken_as_a_text_encoder(tiny_model, tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    more = {
        "text_model.embeddings.position_ids": torch.arange(24)[None],
        "vision_model.embeddings.class_embedding": torch.zeros(4),
        "visual_projection.weight": torch.zeros(4, 4),
        "text_projection.weight": torch.zeros(4, 4),
        "logit_scale": torch.tensor(1.0),
    }
    change_weights(model, "text_encoder", lambda tensors, name: tensors.update(more))
    loaded, plain = (load_pipeline(str(path), tiny_checkpoint, "cpu").text_encoder for path in (model, tiny_model))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
