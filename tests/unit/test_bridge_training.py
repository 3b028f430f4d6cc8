"""The trainers other people wrote take the bridge as it is: PEFT, TRL."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from actors.learner import prepare
from actors.policy import adapt
from rlhf.batching import collate
from rlhf.types import Loss, Sample, TrainSpec
from tests.unit.systems import spec
from tests.unit.test_bridge_build import MOE, picture, tiny
from tests.unit.test_packing import media

# Vendors warn about each other's versions and devices while they step; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


def settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    } | more


def test_lora_wraps_and_merges():
    model, processor = tiny()
    inputs = processor(text=["<image>?"], images=[[picture(0)]], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs).logits, before)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        adapted = wrapped(**inputs).logits
        merged = wrapped.merge_and_unload()(**inputs).logits
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)


def test_adapters_are_the_decoders_alone():
    """An encoder's layers have the same names."""
    plan = TrainSpec("x", 0, Loss(), {"*": 1.0}, 1, lora=(2, 4.0, ("q_proj", "self_attn.v_proj")))
    adapted = {name for name, _ in adapt(tiny()[0], plan).named_parameters() if "lora_A" in name}
    layers = tiny()[0].config.text_config.num_hidden_layers
    assert len(adapted) == 2 * layers
    assert all(".language_model." in name for name in adapted)
    wherever = get_peft_model(tiny()[0], LoraConfig(target_modules=["q_proj"], r=2))
    assert any("vision" in name for name, _ in wherever.named_parameters() if "lora_A" in name)  # the control
    # a model of text alone is a decoder as a whole
    text = AutoModelForCausalLM.from_config(tiny()[0].config.text_config)
    assert sum("lora_A" in name for name, _ in adapt(text, plan).named_parameters()) == 2 * layers
    with pytest.raises(ValueError, match="no layer of the decoder is called so"):
        adapt(tiny()[0], dataclasses.replace(plan, lora=(2, 4.0, ("proj_q",))))


@pytest.mark.parametrize("decoder", [{}, {"decoder": MOE}])
def test_trl_sft_takes_a_step(tmp_path, decoder):
    from trl import SFTConfig, SFTTrainer

    model, processor = tiny(loud=False, **decoder)
    rows = Dataset.from_dict(
        {"text": ["<image>one<eos>", "<image>two<eos>"], "images": [[picture(0, 40, 24)], [picture(1, 16, 16)]]}
    )
    arguments = SFTConfig(**settings(tmp_path, per_device_train_batch_size=2, max_length=None))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    assert [name for name, value in model.named_parameters() if torch.equal(value, before[name])] == []


def test_trl_grpo_takes_a_step(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    model, processor = tiny(loud=False)
    processor.chat_template = TEMPLATE
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "what?"}]] * 2,
            "images": [[picture(0, 40, 24)], [picture(1, 16, 16)]],
        }
    )
    arguments = GRPOConfig(
        **settings(tmp_path, per_device_train_batch_size=4, num_generations=2, max_completion_length=4, temperature=1.0)
    )

    def reward(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    before = model.model.connector[2].weight.clone()
    trainer = GRPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=processor, reward_funcs=reward
    )
    trainer.train()
    assert not torch.equal(model.model.connector[2].weight, before)


@pytest.mark.parametrize("system", ["sail_vl2", "monkey"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_computed_anew_where_the_recipe_says(tmp_path, checkpointing, system):
    model, processor = tiny(loud=False, **spec(system) | {"decoder": MOE})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stage = TrainSpec(str(tmp_path), 0, Loss(), {"*": 1e-3}, 1, packed=True, checkpointing=checkpointing)
    learner, opened, visual = prepare(stage)
    calls = []
    layers = [*learner.model.language_model.layers, *learner.model.vision.tower.encoder.layers]
    for layer in layers:
        first = layer.layer_norm1 if hasattr(layer, "layer_norm1") else next(iter(layer.children()))
        first.register_forward_pre_hook(lambda *_: calls.append(1))
    picture_of = media(0, 40, 24)
    ids = opened.expand([opened.image_token_id, 9, 8, 7], [picture_of.size])
    tensors = collate([Sample("a", tuple(ids), len(ids) - 2, (picture_of,))], visual)
    out = learner.train()(**tensors.model_inputs(), use_cache=False)
    assert len(calls) == len(layers)
    out.logits.sum().backward()
    assert len(calls) == len(layers) * (1 + checkpointing)
    assert all(parameter.grad is not None for parameter in learner.parameters())
