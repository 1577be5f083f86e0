"""Official VideoCrafter2 checkpoint -> a base folder that every script here takes as --base.

    python convert_ckpt.py                     # downloads model.ckpt (VideoCrafter/VideoCrafter2) into the hub's cache
    python convert_ckpt.py path/to/model.ckpt  # or a local .ckpt or .safetensors file, float16, bfloat16 or float32

Writes checkpoints/videocrafter2: config.json, unet.safetensors, vae.safetensors, text_encoder.safetensors. The work is one
rename table, strict both ways: every name in the file is used or knowingly dropped, every tensor of ours is filled,
shapes are equal. The source stays memory-mapped and the output is written tensor by tensor.
"""
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import PARTS, ROOT, BadInput, BaseConfig, FlagParser, build_part, check_tensors, fingerprint, one_line, only_writer, run_script, save_config

REPO, FILE = "VideoCrafter/VideoCrafter2", "model.ckpt"

# Where each part's names begin in the official file, and how the rest of a name becomes ours: every rule is applied, in order.
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."}
RENAME = {
    "unet": [
        (r"^fps_embedding\.", "fps_embed."),
        (r"^init_attn\.0\.", "input_blocks.0.1."),
        (r"^out\.0\.", "norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".skip."),
        *[(rf"\.temopral_conv\.conv{i + 1}\.0\.", f".temporal_conv.norms.{i}.") for i in range(4)],  # upstream's spelling
        *[(rf"\.temopral_conv\.conv{i + 1}\.[23]\.", f".temporal_conv.convs.{i}.") for i in range(4)],
        (r"\.transformer_blocks\.0\.", ".block."),
        (r"\.to_out\.0\.", ".to_out."),
        (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
        (r"\.ff\.net\.2\.", ".ff.proj_out."),
        (r"^(input_blocks\.\d+\.0)\.op\.", r"\1."),       # downsampling
        (r"^(output_blocks\.\d+\.\d)\.conv\.", r"\1."),   # upsampling
    ],
    "vae": [
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
        (r"\.nin_shortcut\.", ".shortcut."),
        (r"\.downsample\.conv\.", ".downsample."),
        (r"\.upsample\.conv\.", ".upsample."),
    ],
    "text_encoder": [],
}
# Not needed: the schedule's buffers (model.py computes them), and what comes after the text tower's last-but-one block.
SCHEDULE = re.compile(r"^(betas|scale_arr|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_alphas_cumprod"
                      r"|posterior_(variance|log_variance_clipped|mean_coef[12]))$")
TEXT_END = r"^cond_stage_model\.model\.(text_projection|logit_scale|transformer\.resblocks\.{last}\..*)$"


def main():
    p = FlagParser(description="Convert the official VideoCrafter2 checkpoint.")
    p.add_argument("checkpoint", nargs="?", type=Path, help="local .ckpt or .safetensors file; left out: download it")
    p.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "videocrafter2", help="base folder to write")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                   help="what the UNet is stored in; text encoder and VAE are float32 (default: %(default)s)")
    args = p.parse_args()
    path = args.checkpoint or download()
    convert(path, args.out, BaseConfig(), getattr(torch, args.dtype))
    print(f"wrote {args.out}: config.json, " + ", ".join(f"{part}.safetensors" for part in PARTS))


def convert(path, out, config, dtype):
    """Checkpoint file -> base folder `out` with the given BaseConfig. Raises BadInput; `out` is complete or untouched."""
    if out.exists() and not (out / "config.json").exists():
        raise BadInput(f"--out {out}: exists and is not a base folder; name another")
    plan = match_names(path, read_shapes(path), config)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (out.with_name(f".{out.name}-{word}") for word in ("unfinished", "old"))
    with only_writer(unfinished, unfinished=("*",)):
        if old.exists():  # killed between the two renamings below
            shutil.rmtree(old) if out.exists() else os.rename(old, out)
        try:
            small = {}
            for part, names in plan.items():
                small[part] = write_part(path, unfinished / f"{part}.safetensors", names, dtype if part == "unet" else torch.float32)
            config.fingerprint = fingerprint(small)
            save_config(config, unfinished / "config.json")
            if out.exists():
                os.rename(out, old)
            os.rename(unfinished, out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def match_names(path, shapes, config):
    """Official name -> shape becomes, per part, our name -> (official name, our shape).

    Raises BadInput unless every name finds its tensor and every tensor its name, with equal shapes.
    """
    last_block = re.compile(TEXT_END.replace("{last}", str(config.text.layers)))
    plan, unknown = {part: {} for part in PARTS}, []
    for name in shapes:
        if SCHEDULE.match(name) or last_block.match(name):
            continue
        part = next((part for part, prefix in PREFIX.items() if name.startswith(prefix)), None)
        if part is None:
            unknown.append(name)
            continue
        ours = name.removeprefix(PREFIX[part])
        for pattern, replacement in RENAME[part]:
            ours = re.sub(pattern, replacement, ours)
        if ours in plan[part]:
            raise BadInput(f"{path}: {name} and {plan[part][ours]} are the same tensor under two names")
        plan[part][ours] = name
    for part, names in plan.items():
        with torch.device("meta"):
            expected = build_part(part, config).state_dict()
        unknown += [name for ours, name in names.items() if ours not in expected]
        missing = expected.keys() - names.keys()
        if unknown or missing:
            raise BadInput(f"{path}: not VideoCrafter2's text-to-video checkpoint; {describe(shapes)} "
                           f"({len(unknown)} unknown names{f', first {unknown[0]}' if unknown else ''}; "
                           f"{len(missing)} missing{f', first {min(missing)}' if missing else ''})")
        # Convolutions with kernel 1 (init_attn, the VAE's attention) are Linear layers here: same numbers, no trailing ones.
        flat = {ours: torch.empty(squeeze(shapes[name], expected[ours].shape), device="meta") for ours, name in names.items()}
        check_tensors(path, flat, expected)
        plan[part] = {ours: (names[ours], tuple(expected[ours].shape)) for ours in expected}
    return plan


def squeeze(shape, like):
    extra = len(shape) - len(like)
    return shape[:len(shape) - extra] if extra > 0 and all(n == 1 for n in shape[-extra:]) else shape


def describe(names):
    """What a file with these tensor names looks like."""
    text = "\n".join(names)
    for pattern, looks in [
            (r"lora_|\.alpha$", "it looks like a LoRA: convert the base model, LoRA files go to sample.py --subject"),
            (r"image_proj_model|to_k_ip", "it looks like an image-to-video checkpoint"),
            (r"relative_position", "it looks like a VideoCrafter1 checkpoint"),
            (r"^(down_blocks|up_blocks|conv_in)\.", "it looks like a diffusers model, with other names"),
            (r"temopral_conv", "it looks like a VideoCrafter checkpoint of another version, or an incomplete one"),
            (r"model\.diffusion_model\.", "it looks like an image model such as Stable Diffusion")]:
        if re.search(pattern, text, re.MULTILINE):
            return looks
    return f"download {FILE} from {REPO}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def download():
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(REPO, FILE))
    except Exception as error:  # the hub's, the network's and the disk's own errors share no base class
        raise BadInput(f"could not download {FILE} from {REPO} ({one_line(error)}); download it by hand and pass its path") from None


def open_checkpoint(path):
    """Checkpoint file -> (name -> shape, function name -> tensor). Memory-mapped; runs no code from the file."""
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; pass a .ckpt or .safetensors file") from None
    if re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
        raise BadInput(f"{path}: is a web page, so the download went wrong; download {FILE} from {REPO} again")
    if head.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`, or download {FILE} again")
    truncated = BadInput(f"{path}: is empty, truncated or damaged ({os.path.getsize(path):,} bytes); download it again "
                         f"and compare its size")
    if path.suffix == ".safetensors":
        try:
            f = safe_open(path, framework="pt")
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}, f.get_tensor
        except (SafetensorError, OSError, ValueError):
            raise truncated from None
    try:
        state = torch.load(path, map_location="cpu", mmap=head[:2] == b"PK", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) or "GLOBAL" in str(error):
            raise BadInput(f"{path}: its pickle would run code or build foreign objects, so it is not loaded; "
                           f"a checkpoint holds plain tensors only") from None
        raise truncated from None
    except Exception:  # pickle, zip and torch each raise their own
        raise truncated from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise BadInput(f"{path}: holds no dictionary of tensors (state_dict); download {FILE} from {REPO}")
    return {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__


def read_shapes(path):
    """Name -> shape. Raises BadInput, also if a .ckpt's own checksums say that it is damaged (a .safetensors file has none)."""
    shapes = open_checkpoint(path)[0]
    if zipfile.is_zipfile(path):
        try:
            damaged = zipfile.ZipFile(path).testzip()
        except Exception as error:  # zipfile, zlib and struct each raise their own
            damaged = one_line(error)
        if damaged:
            raise BadInput(f"{path}: is damaged ({damaged}); download it again")
    return shapes


def write_part(path, out, names, dtype):
    """Our name -> (official name, shape) becomes one safetensors file. Returns the tensors, only the small ones with values."""
    size = torch.empty(0, dtype=dtype).element_size()
    header, offset = {}, 0
    for ours, (_, shape) in names.items():
        end = offset + size * int(torch.Size(shape).numel())
        header[ours] = {"dtype": {2: "BF16", 4: "F32"}[size] if dtype != torch.float16 else "F16", "shape": shape,
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    small, read = {}, math.inf
    with open(out, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for ours, (name, shape) in tqdm(names.items(), desc=out.name, unit="tensor"):
            if read > 2**28:  # opened anew now and then, so that the mapped pages already read are let go
                source = get = None
                get, read = open_checkpoint(path)[1], 0
            source = get(name)
            read += source.nbytes
            if source.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise BadInput(f"{path}: {name} is {source.dtype}; float16, bfloat16 or float32 is expected")
            for piece in source.reshape(-1).split(2**20):
                piece = piece.to(dtype)
                if not piece.isfinite().all():
                    raise BadInput(f"{path}: {name} has values that are not finite in {dtype}; try --dtype float32, "
                                   f"or download the file again")
                f.write(piece.view(torch.uint8).numpy())
            small[ours] = source.to(dtype).clone() if len(shape) <= 1 else torch.empty(shape, device="meta")
    return small


if __name__ == "__main__":
    run_script(main)
