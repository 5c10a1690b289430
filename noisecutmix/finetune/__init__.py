"""Fine-tune Stable Diffusion on pictures: `python -m noisecutmix.finetune --help`."""
