"""The official VideoCrafter2 checkpoint becomes a base folder, which every script here takes as --base.

    python convert_ckpt.py                      # downloads model.ckpt of VideoCrafter/VideoCrafter2 first
    python convert_ckpt.py path/to/model.ckpt   # a local .ckpt or .safetensors file

The conversion is a rename table that is strict in both directions: every official name is used or known to be
unused, and every tensor of the networks in model.py is filled. An existing folder is never replaced.
"""
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.cli import ROOT, BadInput, FlagParser, atomic_write, check_out, lock_folder, one_line, run_script
from support.config import BaseConfig, save_config
from support.files import PARTS, fingerprint, from_hub

# Official name -> PART/name in model.py. All rules are applied, in this order.
RENAME = [
    (r"^model\.diffusion_model\.", "unet/"),
    (r"^first_stage_model\.", "vae/"),
    (r"^cond_stage_model\.model\.", "text_encoder/"),
    # The UNet.
    (r"/fps_embedding\.", "/fps_embed."),
    (r"/init_attn\.0\.", "/input_blocks.0.1."),
    (r"/out\.0\.", "/norm_out."),
    (r"/out\.2\.", "/conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".skip."),
    # Upstream quirk: "temopral".
    *[(rf"\.temopral_conv\.conv{i + 1}\.0\.", f".temporal_conv.norms.{i}.") for i in range(4)],
    *[(rf"\.temopral_conv\.conv{i + 1}\.[23]\.", f".temporal_conv.convs.{i}.") for i in range(4)],
    (r"\.transformer_blocks\.0\.", ".block."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
    (r"\.ff\.net\.2\.", ".ff.proj_out."),
    (r"/(input_blocks\.\d+\.0)\.op\.", r"/\1."),       # downsampling
    (r"/(output_blocks\.\d+\.\d)\.conv\.", r"/\1."),   # upsampling
    # The VAE.
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.downsample\.conv\.", ".downsample."),
    (r"\.upsample\.conv\.", ".upsample."),
]
# Unused: the schedule's buffers, and everything after the text tower's last-but-one block.
SCHEDULE = re.compile(r"^(betas|scale_arr|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_"
                      r"alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12]))$")
TEXT_END = r"^cond_stage_model\.model\.(text_projection|logit_scale|transformer\.resblocks\.{last}\..*)$"

# How other checkpoints are recognised: by the first of these patterns that matches one of their names.
OTHER_CHECKPOINTS = [
    (r"lora_|\.alpha$", "it looks like a LoRA: convert the base model, LoRA files go to sample.py --subject"),
    (r"image_proj_model|to_k_ip", "it looks like an image-to-video checkpoint"),
    (r"relative_position", "it looks like a VideoCrafter1 checkpoint"),
    (r"^(down_blocks|up_blocks|conv_in)\.", "it looks like a diffusers model, with other names"),
    (r"temopral_conv", "it looks like a VideoCrafter checkpoint of another version, or an incomplete one"),
    (r"model\.diffusion_model\.", "it looks like an image model such as Stable Diffusion")]
REPO, FILE = "VideoCrafter/VideoCrafter2", "model.ckpt"


def main():
    p = FlagParser(description="Convert the official VideoCrafter2 checkpoint.")
    p.add_argument("checkpoint", nargs="?", type=Path, help=".ckpt or .safetensors (default: download it)")
    p.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "videocrafter2", help="base folder")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                   help="of the stored UNet; text encoder and VAE are float32 (default: %(default)s)")
    args = p.parse_args()
    check_out(args.out)
    if args.out.exists():
        raise BadInput(f"--out {args.out}: exists already; name another folder, or move this one away")
    path = args.checkpoint or from_hub(REPO, FILE, "checkpoint", "pass its path")
    convert(path, args.out, BaseConfig(), getattr(torch, args.dtype))
    print(f"wrote {args.out}: config.json, " + ", ".join(f"{part}.safetensors" for part in PARTS))


def convert(path, out, config, dtype):
    """Checkpoint file -> base folder `out`, which is written completely or not at all. Raises BadInput."""
    official = open_checkpoint(path)
    plan = match_names(path, {name: tuple(tensor.shape) for name, tensor in official.items()}, config)

    def part_tensors(part):
        """Our name -> tensor of our shape, in the checkpoint's own precision."""
        return {ours: official[name].reshape(shape) for ours, (name, shape) in plan[part].items()}

    with lock_folder(out.parent), atomic_write(out) as folder:
        folder.mkdir()
        # The fingerprint is of the checkpoint's own values, so --dtype does not change it.
        values = ((f"{part}.{name}", tensor) for part in PARTS
                  for name, tensor in sorted(part_tensors(part).items()))
        config.fingerprint = fingerprint(values)
        save_config(config, folder / "config.json")
        for part in PARTS:
            cast = dtype if part == "unet" else torch.float32
            state = {name: tensor.to(cast).contiguous() for name, tensor in part_tensors(part).items()}
            bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
            if bad:
                raise BadInput(f"{path}: {plan[part][bad[0]][0]} has values that are not finite in {cast}; "
                               f"try --dtype float32, or download the file again")
            save_file(state, folder / f"{part}.safetensors", {"fingerprint": config.fingerprint})


def match_names(path, shapes, config):
    """Official name -> shape becomes, for each part, our name -> (official name, our shape).

    Raises BadInput unless official and our tensors match one to one, with equal shapes.
    """
    text_end = re.compile(TEXT_END.replace("{last}", str(config.text_encoder.layers)))
    names, unknown, plan = {part: {} for part in PARTS}, [], {}
    for name in shapes:
        part, ours = our_name(name)
        if SCHEDULE.match(name) or text_end.match(name):
            continue
        if part not in PARTS:
            unknown.append(name)
        elif ours in names[part]:
            raise BadInput(f"{path}: {name} and {names[part][ours]} are the same tensor under two names")
        else:
            names[part][ours] = name
    for part in PARTS:
        with torch.device("meta"):
            expected = PARTS[part](getattr(config, part)).state_dict()
        unknown += [name for ours, name in names[part].items() if ours not in expected]
        missing = expected.keys() - names[part].keys()
        if unknown or missing:
            first = ", ".join([*unknown[:1], *sorted(missing)[:1]])
            raise BadInput(f"{path}: not VideoCrafter2's text-to-video checkpoint; {describe(shapes)} "
                           f"({len(unknown)} unknown names, {len(missing)} missing, such as {first})")
        plan[part] = {ours: (names[part][ours], tuple(tensor.shape)) for ours, tensor in expected.items()}
        for name, shape in plan[part].values():
            # Upstream's convolutions with kernel 1 (init_attn, VAE attention) are Linear here.
            if shapes[name] != shape + (1,) * (len(shapes[name]) - len(shape)):
                raise BadInput(f"{path}: {name} is {shapes[name]}, and {shape} is expected")
    return plan


def our_name(name):
    """Official name -> (part, our name)."""
    for pattern, replacement in RENAME:
        name = re.sub(pattern, replacement, name)
    part, _, ours = name.partition("/")
    return part, ours


def describe(names):
    """A guess at the kind of checkpoint that has these tensor names."""
    for pattern, guess in OTHER_CHECKPOINTS:
        if re.search(pattern, "\n".join(names), re.MULTILINE):
            return guess
    return f"download {FILE} from {REPO}"


def open_checkpoint(path):
    """Checkpoint file -> official name -> tensor, memory-mapped. Nothing in it is run. Raises BadInput."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise BadInput(f"{path}: {one_line(error)}; pass a .ckpt or .safetensors file") from None
    if re.match(rb"\s*<(!doctype|html)|version https://git-lfs", head, re.IGNORECASE):
        raise BadInput(f"{path}: is a web page or a git-lfs pointer; download {FILE} from {REPO} again")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        state = torch.load(path, map_location="cpu", mmap=head[:2] == b"PK", weights_only=True)
        state = state.get("state_dict", state)
        return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    except pickle.UnpicklingError:
        raise BadInput(f"{path}: its pickle is damaged or would run code, so it is not loaded") from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, AttributeError) as error:
        raise BadInput(f"{path}: is truncated or damaged ({os.path.getsize(path):,} bytes, "
                       f"{one_line(error)}); download it again and compare its size") from None


if __name__ == "__main__":
    run_script(main)
