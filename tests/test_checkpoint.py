"""Checkpoints as Diff-Mix writes them, and in newer keys: applied exactly, or refused with one line."""

import json
import pickle

import pytest
import torch
from conftest import CLASS_NAMES, TINY_WIDTH, in_old_keys, random_lora, write_checkpoint, write_embeddings
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from noisecutmix.checkpoint import find_placeholders, load_pipeline
from noisecutmix.errors import InputError

LORA = "pytorch_lora_weights.safetensors"
EMBEDDINGS = "learned_embeds-steps-last.bin"


def in_peft_keys(layers):
    state_dict = {}
    for name, (down, up) in layers.items():
        state_dict[f"unet.{name}.lora_A.weight"] = down
        state_dict[f"unet.{name}.lora_B.weight"] = up
    return state_dict


def in_named_adapter_keys(layers):
    """As peft keeps them in a model."""
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in in_peft_keys(layers).items()}


def in_wrapped_model_keys(layers):
    """As peft saves a model of its own."""
    return {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in in_peft_keys(layers).items()}


def in_prefixed_old_keys(layers):
    return {f"unet.{key}": tensor for key, tensor in in_old_keys(layers).items()}


def in_kohya_keys(layers):
    """With alpha, half the rank: the LoRA counts half."""
    state_dict = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state_dict[f"{key}.lora_down.weight"] = down
        state_dict[f"{key}.lora_up.weight"] = up
        state_dict[f"{key}.alpha"] = torch.tensor(len(down) / 2)
    return state_dict


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        (in_old_keys, 1),
        (in_prefixed_old_keys, 1),
        (in_peft_keys, 1),
        (in_named_adapter_keys, 1),
        (in_wrapped_model_keys, 1),
        (in_kohya_keys, 0.5),
    ],
)
def test_lora_changes_the_unet_by_up_times_down(tiny_model, tiny_lora, tmp_path, keys, scale):
    write_checkpoint(tmp_path, keys(tiny_lora))
    before = StableDiffusionPipeline.from_pretrained(tiny_model).unet.state_dict()
    after = load_pipeline(str(tiny_model), tmp_path, device="cpu").unet.state_dict()
    assert after.keys() == before.keys()  # no adapter is left
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        expected = weight
        if layer in tiny_lora:
            down, up = tiny_lora[layer]
            expected = weight + scale * up @ down
            assert not torch.equal(after[name], weight)
        assert (after[name] - expected).abs().max() < 1e-5


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
    """A folder with fp16 files alone loads in either dtype; beside float32 files, float16 takes the fp16 ones."""
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
    "no LoRA": (remove(LORA), f"{LORA} is missing"),
    "no embeddings": (remove(EMBEDDINGS), f"{EMBEDDINGS} is missing"),
    "LoRA is no safetensors": (overwrite(LORA, b"not a tensor in sight"), "no safetensors file"),
    "LoRA is empty": (overwrite(LORA, b""), "no safetensors file"),
    "LoRA is cut off": (lambda folder: overwrite(LORA, (folder / LORA).read_bytes()[:-100])(folder), "no safetensors"),
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
    "LoRA for the text encoder": (rename_first("text_encoder.layer.to_q.lora_A.weight"), "nothing in the UNet"),
    "LoRA in half a pair": (change_lora(lambda tensors: tensors.pop(min(tensors))), "LoRA tensors do not fill"),
    "LoRA of two ranks": (
        change_lora(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)][:3]})),
        "does not fit its other half",
    ),
    "LoRA not finite": (change_lora(lambda tensors: tensors[min(tensors)].fill_(torch.nan)), "not finite"),
    "hostile pickle": (overwrite(EMBEDDINGS, pickle.dumps(Hostile())), "not loaded"),
    "no pickle": (overwrite(EMBEDDINGS, b"zip?"), "not loaded"),
    "embeddings are no dictionary": (lambda folder: torch.save([1], folder / EMBEDDINGS), "no dictionary"),
    "embeddings without names": (learned(name2placeholder=None), "lacks learned_embeds_dict or name2placeholder"),
    "a name without embedding": (learned(name2placeholder={"owl": "<class_7>"}), "'<class_7>' for class 'owl'"),
    "two names on one token": (learned(name2placeholder={"owl": "<class_0>", "kite": "<class_0>"}), "share a token"),
    "two names alike": (learned(name2placeholder={"a b": "<class_0>", "a_b": "<class_1>"}), "differ in spaces"),
    "embedding too wide": (embeddings_of(torch.zeros(TINY_WIDTH + 1)), r"shape \(33,\)"),
    "embedding not finite": (embeddings_of(torch.full((TINY_WIDTH,), torch.inf)), "<class_0> is not finite"),
    "embedding no tensor": (embeddings_of("0.5"), "no tensor"),
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
    told = capsys.readouterr()
    assert "this ran" not in told.out
    assert told.err == ""


def test_loading_leaves_the_global_random_state_alone(tiny_model, tiny_checkpoint):
    before = torch.random.get_rng_state()
    load_pipeline(str(tiny_model), tiny_checkpoint, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_device_that_is_not_there_is_named(tiny_model, tiny_checkpoint):
    with pytest.raises(InputError, match="--device: cuda:99 cannot be used"):
        load_pipeline(str(tiny_model), tiny_checkpoint, device="cuda:99")


def test_a_model_that_is_none_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match="--model"):
        load_pipeline(str(tmp_path), tiny_checkpoint, device="cpu")


def test_other_ranks_load(tiny_model, tiny_components, tmp_path):
    write_checkpoint(tmp_path, in_old_keys(random_lora(tiny_components["unet"], rank=3)))
    load_pipeline(str(tiny_model), tmp_path, device="cpu")


def test_class_names_match_after_normalising():
    tokens = {"cyclamen ": "<class_0>", "F-16A B": "<class_1>", "Blue_Jay": "<class_2>"}
    assert find_placeholders(["F-16A/B", "cyclamen", "Blue  Jay"], tokens) == ["<class_1>", "<class_0>", "<class_2>"]


def test_a_class_without_token_is_named():
    tokens = {name: f"<class_{label}>" for label, name in enumerate(CLASS_NAMES)}
    with pytest.raises(InputError, match=r"'blue jax'.*'blue jay'"):
        find_placeholders(["red kite", "blue jax"], tokens)
