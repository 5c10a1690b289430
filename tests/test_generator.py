"""The generator in Python: valid and invalid arguments, and its behaviour when memory is short."""

import numpy as np
import pytest
import torch
from drawing import CLASS_NAMES

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.classes import Classes
from noisecutmix.errors import InputError, RunError, is_out_of_memory
from noisecutmix.plan import Plan


def make(**changes):
    return NoiseCutMixGenerator(**{"device": "cpu", "data_name": "digits", "num_inference_steps": 1, **changes})


@pytest.fixture(scope="module")
def generator():
    return make()


def refusal(error, call, *arguments, **named):
    with pytest.raises(error) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "labels",
    [
        [True],
        [np.True_],
        [torch.tensor(True)],
        np.array([True]),
        torch.tensor([False]),
        [3.0],
        [3.7],
        np.array([3.0]),
        torch.tensor([3.0]),
        [None],
        ["three"],
        [[3]],
        np.array([[3]]),
        [-1],
        [10],
        np.array([10]),
    ],
    ids=repr,
)
def test_labels_have_to_be_integers_in_range(generator, labels):
    assert refusal(InputError, generator, labels).startswith("target_labels: ")
    assert refusal(InputError, generator, [1], aug_labels=labels).startswith("aug_labels: ")


@pytest.mark.parametrize(
    "labels",
    [[3, 5], (3, 5), range(3, 6, 2), np.array([3, 5]), np.array([3, 5], np.uint8), torch.tensor([3, 5])],
    ids=repr,
)
def test_labels_may_be_lists_arrays_or_tensors(generator, labels):
    soft = generator(labels, aug_labels=[0, 0])[1]
    assert [int(label[1:].argmax()) + 1 for label in soft] == [3, 5]
    assert all(label.sum() == pytest.approx(1) for label in soft)
    elements = generator(list(labels), aug_labels=list(labels)[::-1])[1]
    assert {int(i) for label in elements for i in np.flatnonzero(label)} <= {3, 5}


def test_no_labels_give_no_pictures(generator):
    assert generator([], return_mask=True) == ([], [], [])


WRONG = {
    "dtype": ("float8", torch.int8),
    "data_name": ("birds",),
    "class_names": (["one", "one"],),
    "alpha": ("1", True, None),
    "num_inference_steps": (2.0, True, "2", 0, -1, 1000, 10**30),
    "guidance_scale": (-1.0, True, "7.5", None),
    "guidance_interval": ((0.8, 0.2), (0.0, 1.5)),
    "batch_size": (2.5, True, "2", 0),
    "seed": (1.0, True, "0"),
    "resolution": (32.0, True, "32", 33, 0, -32),
    "plan": (Plan(0, 3, 1.0, 32),),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_are_named(name, value):
    """The message names the parameter, not the flag of a script."""
    message = refusal(InputError, make, **{name: value})
    assert f"{name}: " in message or (name == "resolution" and "resolution" in message)
    assert "--" not in message


@pytest.mark.parametrize("resolution", [33, 0, 32.0, "32", True])
def test_a_wrong_resolution_of_a_call_is_named(generator, resolution):
    wanted = "a multiple of 2" if resolution == 33 else "a whole number from 1 to 8192"
    message = refusal(InputError, generator, [1], resolution=resolution)
    assert message == f"resolution: has to be {wanted}, not {resolution!r}"


def test_numpy_numbers_are_accepted():
    generator = make(seed=np.int64(3), batch_size=np.int32(2), alpha=np.float32(1), resolution=np.int64(32))
    assert generator([1])[0][0].size == (32, 32)


def test_a_prompt_that_is_cut_after_the_class_is_refused(capsys):
    message = refusal(InputError, make, prompt="{name} and then a very, very long tail")
    assert message.startswith("prompt: {name} or the text after it lies beyond the 24 tokens")
    assert capsys.readouterr().err == ""


def test_given_classes_and_plan_are_used(tiny_model, tiny_checkpoint, tmp_path):
    """No file is read for them, and the plan replaces seed, alpha and resolution."""
    classes = Classes(tuple(CLASS_NAMES), "bird", str(tiny_model), tiny_checkpoint, 512)
    plan = Plan(7, 3, 0.5, 16)
    generator = make(data_name=classes, plan=plan)
    assert (generator.class_names, generator.meta_class, generator.plan) == (CLASS_NAMES, "bird", plan)
    again = make(data_name=classes, seed=7, alpha=0.5, resolution=16)
    pictures = [made.draw([plan.item(0)])[0] for made in (generator, again)]
    assert np.array_equal(*pictures) and pictures[0].size == (16, 16)


def test_items_are_drawn_at_their_size_which_has_to_be_one(generator):
    small, large = Plan(0, 10, 1.0, 16).item(0), Plan(0, 10, 1.0, 48).item(1)
    assert [generator.draw([item])[0].size for item in (small, large)] == [(16, 16), (48, 48)]
    assert "items: have to be of one resolution" in refusal(InputError, generator.draw, [small, large])


def test_too_little_memory_for_the_model_is_reported_in_one_line(monkeypatch):
    def never(*arguments, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough memory: you tried")

    monkeypatch.setattr("noisecutmix.generator.load_pipeline", never)
    message = refusal(RunError, make)
    assert message.startswith("out of memory on cpu while loading the model")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
        "MPS backend out of memory (MPS allocated: 1.00 GB)",
    ],
)
def test_out_of_memory_errors_of_every_backend_halve_the_batch(monkeypatch, capsys, message):
    generator = make(batch_size=4)
    draw_batch = generator._draw_batch

    def short_of_memory(items):
        if len(items) > 2:
            raise RuntimeError(message)
        return draw_batch(items)

    monkeypatch.setattr(generator, "_draw_batch", short_of_memory)
    assert len(generator.draw([generator.plan.item(i) for i in range(4)])) == 4
    assert generator.batch_size == 2
    assert "out of memory at batch size 4, continuing with 2" in capsys.readouterr().err
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_messages_during_a_run_name_parameters(monkeypatch):
    generator = make()
    item = generator.plan.item(1)

    def fail_with(error):
        def never(*arguments, **named):
            raise error

        monkeypatch.setattr(generator, "pipe", never)
        monkeypatch.setattr(generator, "_encode", lambda prompts: None)
        return refusal(RunError, generator.draw, [item])

    message = fail_with(RuntimeError("CUDA out of memory."))
    assert "resolution" in message and "dtype=float16" in message and "--" not in message


def test_a_class_alone_costs_two_evaluations_a_step_in_place_of_three(tiny_model, tiny_checkpoint, tiny_data):
    """As in fine-tuning's previews and with --single_class: one prompt beside the empty one."""
    counts = {}
    for single_class in (False, True):
        plan = Plan(0, 3, 1.0, 16, single_class=single_class)
        options = {"ckpt_path": tiny_checkpoint, "model": tiny_model, "num_inference_steps": 4, "plan": plan}
        generator = NoiseCutMixGenerator("cpu", str(tiny_data), **options)
        evaluated = []
        generator.pipe.unet.register_forward_pre_hook(lambda _, inputs, seen=evaluated: seen.append(len(inputs[0])))
        generator.draw(list(plan.items(2)))
        counts[single_class] = sum(evaluated)
    assert counts == {False: 2 * 3 * 4, True: 2 * 2 * 4}


def test_a_missing_checkpoint_is_named_before_a_model_is_downloaded(tmp_path):
    with pytest.raises(InputError, match=r"ckpt_path: .* has no pytorch_lora_weights"):
        NoiseCutMixGenerator("cpu", "cub", ckpt_path=tmp_path, model="nobody/nothing")
