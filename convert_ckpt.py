"""The official VideoCrafter2 checkpoint becomes a base folder, which every script here takes as --base.

    python convert_ckpt.py                      # downloads model.ckpt of VideoCrafter/VideoCrafter2 first
    python convert_ckpt.py path/to/model.ckpt   # a local .ckpt or .safetensors file

The work is a rename table, strict both ways: every official name is used or known to be unused, every tensor
of ours is filled. The checkpoint stays memory-mapped; our files are written tensor by tensor.
"""
import json
import math
import os
import pickle
import re
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cli import (ROOT, BadInput, FlagParser, Progress, check_out, complete_or_absent, one_line, only_writer,
                 read_bytes, run_script)
import torch
from safetensors import safe_open

from config import BaseConfig
from files import (PARTS, base_files, build_part, check_replaced, check_tensors, fingerprint, from_hub,
                   is_plain_state, save_base_config)

# Official name -> PART/name of ours. All rules are applied, in this order.
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
# Unused: the schedule's buffers, and all after the text tower's last-but-one block.
SCHEDULE = re.compile(r"^(betas|scale_arr|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_"
                      r"alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12]))$")
TEXT_END = r"^cond_stage_model\.model\.(text_projection|logit_scale|transformer\.resblocks\.{last}\..*)$"

# What another checkpoint is: the first of these that is found in its names says so.
OTHER_CHECKPOINTS = [
    (r"lora_|\.alpha$", "it looks like a LoRA: convert the base model, LoRA files go to sample.py --subject"),
    (r"image_proj_model|to_k_ip", "it looks like an image-to-video checkpoint"),
    (r"relative_position", "it looks like a VideoCrafter1 checkpoint"),
    (r"^(down_blocks|up_blocks|conv_in)\.", "it looks like a diffusers model, with other names"),
    (r"temopral_conv", "it looks like a VideoCrafter checkpoint of another version, or an incomplete one"),
    (r"model\.diffusion_model\.", "it looks like an image model such as Stable Diffusion")]
REPO, FILE = "VideoCrafter/VideoCrafter2", "model.ckpt"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}     # safetensors' names


def main():
    p = FlagParser(description="Convert the official VideoCrafter2 checkpoint.")
    p.add_argument("checkpoint", nargs="?", type=Path, help=".ckpt or .safetensors (default: download it)")
    p.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "videocrafter2", help="base folder")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                   help="what the UNet is stored in; text encoder and VAE are float32 (default: %(default)s)")
    args = p.parse_args()
    path = args.checkpoint or from_hub(REPO, FILE, "checkpoint", "pass its path")
    convert(path, args.out, BaseConfig(), getattr(torch, args.dtype))
    print(f"wrote {args.out}: config.json, " + ", ".join(f"{part}.safetensors" for part in PARTS))


def convert(path, out, config, dtype):
    """Checkpoint file -> base folder `out`, which is complete or untouched. Raises BadInput."""
    check_out(out)
    targets = base_files(out)
    if path.resolve() in [target.resolve() for target in targets]:
        raise BadInput(f"--out {out}: {path} would be written over; name another folder")
    check_replaced(out)     # before the work, and again when nobody else writes there
    plan = match_names(path, read_shapes(path), config)
    with only_writer(out), ExitStack() as files:
        check_replaced(out)
        # Replaced in reverse order, so config.json last: its checksums refuse a mixture of old and new.
        config_path, *part_paths = [files.enter_context(complete_or_absent(target)) for target in targets]
        states = {}
        for part_path, (part, names) in zip(part_paths, plan.items()):
            states[part] = write_part(path, part_path, names, dtype if part == "unet" else torch.float32)
        save_base_config(replace(config, fingerprint=fingerprint(states)), config_path, part_paths)


def match_names(path, shapes, config):
    """Official name -> shape becomes, per part, our name -> (official name, our shape).

    Raises BadInput unless every name finds its tensor and every tensor its name, with equal shapes.
    """
    text_end = re.compile(TEXT_END.replace("{last}", str(config.text.layers)))
    official, unknown, plan = {part: {} for part in PARTS}, [], {}
    for name in shapes:
        if SCHEDULE.match(name) or text_end.match(name):
            continue
        part, ours = our_name(name)
        if part not in PARTS:
            unknown.append(name)
        elif ours in official[part]:
            raise BadInput(f"{path}: {name} and {official[part][ours]} are the same tensor under two names")
        else:
            official[part][ours] = name
    for part, names in official.items():
        with torch.device("meta"):
            expected = build_part(part, config).state_dict()
        unknown += [name for ours, name in names.items() if ours not in expected]
        missing = expected.keys() - names.keys()
        if unknown or missing:
            first_unknown = f", first {unknown[0]}" if unknown else ""
            first_missing = f", first {min(missing)}" if missing else ""
            faults = f"{len(unknown)} unknown names{first_unknown}; {len(missing)} missing{first_missing}"
            raise BadInput(f"{path}: not VideoCrafter2's text-to-video checkpoint; {describe(shapes)} "
                           f"({faults})")
        found = {ours: without_ones(shapes[name], expected[ours].dim()) for ours, name in names.items()}
        check_tensors(path, {ours: torch.empty(s, device="meta") for ours, s in found.items()}, expected)
        plan[part] = {ours: (names[ours], tuple(tensor.shape)) for ours, tensor in expected.items()}
    return plan


def our_name(name):
    """Official name -> (part, our name)."""
    for pattern, replacement in RENAME:
        name = re.sub(pattern, replacement, name)
    part, _, ours = name.partition("/")
    return part, ours


def without_ones(shape, dims):
    """A shape of `dims` sizes: convolutions with kernel 1 (init_attn, VAE attention) are Linear here."""
    return shape[:dims] if all(size == 1 for size in shape[dims:]) else shape


def describe(names):
    """What a file with these tensor names looks like."""
    text = "\n".join(names)
    looks = [says for pattern, says in OTHER_CHECKPOINTS if re.search(pattern, text, re.MULTILINE)]
    return looks[0] if looks else f"download {FILE} from {REPO}"


# ------------------------------------------------------------------------------------------------------------
# Reading and writing


def open_checkpoint(path):
    """Checkpoint file -> (name -> shape, function name -> tensor). Memory-mapped; nothing in it is run."""
    try:
        head = read_bytes(path, 512)
    except OSError as error:
        raise BadInput(f"{path}: {one_line(error)}; pass a .ckpt or .safetensors file") from None
    if re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
        raise BadInput(f"{path}: is a web page, not the file; download {FILE} from {REPO} again")
    if head.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: is a git-lfs pointer, not the file; `git lfs pull` or download {FILE} again")
    try:
        if path.suffix == ".safetensors":
            f = safe_open(path, framework="pt")
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}, f.get_tensor
        state = torch.load(path, map_location="cpu", mmap=head[:2] == b"PK", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and torch each raise their own
        if isinstance(error, pickle.UnpicklingError) and re.search("nsupported|GLOBAL", str(error)):
            raise BadInput(f"{path}: its pickle would run code or build foreign objects, so it is not "
                           f"loaded; a checkpoint holds plain tensors only") from None
        raise BadInput(f"{path}: is empty, truncated or damaged ({os.path.getsize(path):,} bytes); "
                       f"download it again and compare its size") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not is_plain_state(state):
        raise BadInput(f"{path}: its state_dict is no dictionary of plain tensors; get {FILE} from {REPO}")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, state.get


def read_shapes(path):
    """Name -> shape. Raises BadInput, also where a .ckpt's own checksums say that it is damaged."""
    shapes, _ = open_checkpoint(path)
    try:
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
    except Exception as error:  # zipfile, zlib and struct each raise their own
        damaged = one_line(error)
    if damaged:
        raise BadInput(f"{path}: is damaged ({damaged}); download it again")
    return shapes


def write_part(path, out, names, dtype):
    """Our name -> (official name, shape) becomes a file. Returns our tensors, large ones without values."""
    header, end = {}, 0
    for ours, (_, shape) in names.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[ours] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state, bytes_read = {}, math.inf
    with open(out, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for ours, (name, shape) in Progress(names.items(), desc=out.name, unit="tensor"):
            if bytes_read > 2**28:  # opened anew now and then, to let go of the mapped pages already read
                tensor = get_tensor = None
                (_, get_tensor), bytes_read = open_checkpoint(path), 0
            tensor = get_tensor(name)
            bytes_read += tensor.nbytes
            if tensor.dtype not in DTYPES:
                raise BadInput(f"{path}: {name} is {tensor.dtype}; float16, bfloat16 or float32 is expected")
            for piece in tensor.reshape(-1).split(2**20):
                piece = piece.to(dtype).contiguous()
                if not piece.isfinite().all():
                    raise BadInput(f"{path}: {name} has values that are not finite in {dtype}; "
                                   f"try --dtype float32, or download the file again")
                f.write(piece.view(torch.uint8).numpy())
            state[ours] = tensor.to(dtype).clone() if len(shape) <= 1 else torch.empty(shape, device="meta")
    return state


if __name__ == "__main__":
    run_script(main)
