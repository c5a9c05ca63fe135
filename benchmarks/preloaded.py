"""What the fork server of rank processes imports once: otherwise each would, half a minute for two of them on two cores."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import diffusers.models.unets.unet_2d_condition  # noqa: F401
import peft  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401
