"""The paper's four metrics (CLIP-T, CLIP-I, DINO-I, temporal consistency), and motion, which they miss.

    python paper/evaluate.py --videos outputs/x outputs/base --images photos/dog

Reads the mp4s that sample.py wrote, and each video's prompt from the JSON beside it. The numbers follow
DreamVideo's published protocol: features are L2-normalised; all frames count; a video's number is the mean
over its frames or its (photo, frame) pairs; a folder's number is the plain mean over its videos. A folder of
the base alone (`sample.py --subject none`) shows the motion that a subject's videos should keep. Prints a
line per folder, and writes evaluation.json with a row per video.

Shapes: T frames, N photos, D features; videos (T, H, W, 3) uint8.
"""
import itertools
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from data import PICTURES, load_picture, read_folder
from support.cli import (BadInput, FlagParser, atomic_write, check_out, join_processes, one_line,
                         progress_bar, run_script, warn)
from support.files import from_hub
from support.texts import without_placeholders
from support.video import check_ffmpeg, read_json

METRICS = ("CLIP-T", "CLIP-I", "DINO-I", "T.Cons", "motion")


def main():
    args = parse_args()
    device = join_processes().device
    videos = [video for folder in dict.fromkeys(args.videos) for video in find_videos(folder)]
    pictures = read_folder(args.images, PICTURES, partial(load_picture, longest=10**6), "--images", "photos")
    photos = [photo for _, photo in pictures]
    clip, dino = load_clip(args.clip, device), load_dino(args.dino, device)

    # Compute the photos' features once, and compare every video with them.
    clip_photos, dino_photos = clip.images(photos), dino.images(photos)                     # (N, D) each
    rows = []
    for path, job in progress_bar(videos, desc="evaluate", unit="video"):
        video = read_video(path, job)                                                       # (T, H, W, 3)
        text = without_placeholders(job["prompt"], [subject["placeholder"] for subject in job["subjects"]])
        frames = [Image.fromarray(frame) for frame in video]
        clip_frames, dino_frames = clip.images(frames), dino.images(frames)                 # (T, D) each
        rows.append({"folder": str(path.parent), "video": path.name, "text": text, "seed": job["seed"],
                     "CLIP-T": cosines(clip.text(text), clip_frames),
                     "CLIP-I": cosines(clip_photos, clip_frames),
                     "DINO-I": cosines(dino_photos, dino_frames),
                     "T.Cons": consistency(clip_frames),
                     "motion": motion(video)})
    report(rows, args.out)


# ------------------------------------------------------------------------------------------------------------
# The metrics. Features are L2-normalised, so a product of two is a cosine.


def cosines(a, b):
    """a (N, D), b (T, D) -> mean cosine of all N x T pairs: CLIP-T of a text, CLIP-I and DINO-I of photos."""
    return (a @ b.T).mean().item()


def consistency(frames):
    """Features of frames (T, D) -> T.Cons, the mean cosine of neighbours: 1 if frozen, None if T = 1."""
    return (frames[1:] * frames[:-1]).sum(dim=1).mean().item() if len(frames) > 1 else None


def motion(video):
    """How far things move between frames: (T, H, W, 3) uint8 -> mean over blocks, in percent of the
    picture's width; None if T = 1.

    Each block of 16 x 16 pixels, in a picture at most 128 wide, is searched for in the next frame, up to 8
    pixels away, whatever its brightness and contrast there. A displacement counts only if the residual of the
    block at rest is above 2 grey levels, and the displacement more than halves it (as a variance). So noise
    and flicker count as no motion.
    """
    if len(video) < 2:
        return None
    block, reach = 16, 8
    width = max(block, min(128, video.shape[2]) // block * block)
    size = (max(block, round(width * video.shape[1] / video.shape[2] / block) * block), width)
    grey = torch.from_numpy(video).float().mean(dim=-1, keepdim=True).permute(0, 3, 1, 2)   # (T, 1, H, W)
    grey = F.interpolate(grey, size, mode="area")
    now, then = grey[:-1], F.pad(grey[1:], [reach] * 4, mode="replicate")
    mean = lambda x: F.avg_pool2d(x, block)
    steps = range(-reach, reach + 1)
    displacements = sorted(itertools.product(steps, steps), key=lambda way: np.hypot(*way))     # (0, 0) first
    residuals = []
    for dx, dy in displacements:
        there = then[:, :, reach + dy:reach + dy + size[0], reach + dx:reach + dx + width]
        variance = (mean(there ** 2) - mean(there) ** 2).clamp(min=0.01)
        covariance = (mean(now * there) - mean(now) * mean(there)).clamp(min=0)
        residuals.append(mean(now ** 2) - mean(now) ** 2 - covariance ** 2 / variance)
    residuals = torch.stack(residuals)                                      # (ways, T-1, 1, H/16, W/16)
    least, best = residuals.min(dim=0)
    length = torch.tensor([np.hypot(*way) for way in displacements])[best]
    counts = (least < 0.5 * residuals[0]) & (residuals[0] > 2 ** 2)
    return (length * counts).mean().item() / width * 100


# ------------------------------------------------------------------------------------------------------------
# The towers


class Tower:
    """A frozen image model (for CLIP, with its text model) in float32, whose features are L2-normalised."""

    def __init__(self, model, encode, device, resize, mean, std, tokenizer=None):
        from torchvision import transforms
        self.model, self.encode = model.to(device).eval(), encode
        self.device, self.tokenizer = device, tokenizer
        self.transform = transforms.Compose([
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
            transforms.ToTensor(), transforms.Normalize(mean, std)])

    @torch.no_grad()
    def images(self, pictures):
        """List of N RGB pictures of any size -> (N, D)."""
        features = []
        for i in range(0, len(pictures), 16):
            x = torch.stack([self.transform(picture) for picture in pictures[i:i + 16]])
            features.append(self.encode(x.to(self.device)))
        return F.normalize(torch.cat(features).float().cpu(), dim=1)

    @torch.no_grad()
    def text(self, text):
        """A text -> (1, D)."""
        tokens = self.tokenizer([text]).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float().cpu(), dim=1)


def load_clip(path, device):
    """OpenAI's ViT-B/32. open_clip's `ViT-B-32` has another activation, so its scores would be wrong."""
    import open_clip
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    repository = "timm/vit_base_patch32_clip_224.openai"
    load_weights(model, path, "--clip", repository, "open_clip_model.safetensors")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    return Tower(model, model.encode_image, device, 224, mean, std, tokenizer)


def load_dino(path, device):
    """DINO's ViT-S/16: its class token after the norm. Pictures are resized to 256 and cropped to 224."""
    import timm
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    load_weights(model, path, "--dino", "timm/vit_small_patch16_224.dino", "model.safetensors")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Tower(model, model, device, 256, mean, std)


def load_weights(model, path, flag, repository, file):
    """Loads a local safetensors file, or else the hub's, into `model`. Raises BadInput."""
    path = path or from_hub(repository, file, flag, f"name it with {flag} PATH")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and PyTorch each raise errors of their own
        raise BadInput(f"{flag} {path}: not the weights of this model ({one_line(error)}); "
                       f"pass {file} of {repository}") from None


# ------------------------------------------------------------------------------------------------------------
# Videos and tables


def find_videos(folder):
    """Folder of videos -> list of (mp4, the content of its JSON). Raises BadInput if an mp4 is missing."""
    videos = []
    for path in sorted(folder.glob("*.json")):
        job, mp4 = read_json(path) or {}, path.with_suffix(".mp4")
        if "subjects" not in job:
            continue    # not the JSON of a video, such as evaluation.json
        if job["compare"]:
            warn(f"{path}: shows several videos side by side (--compare); skipped")
        elif mp4.exists():
            videos.append((mp4, job))
        else:
            raise BadInput(f"{mp4}: no such file; sample it again with --format mp4, or delete {path.name}")
    if not videos:
        raise BadInput(f"{folder}: has no video with its JSON; name a folder that sample.py wrote into")
    return videos


def read_video(path, job):
    """mp4 -> video (T, H, W, 3). Raises BadInput if it cannot be read, or has lost frames."""
    import imageio.v3 as iio
    try:
        video = iio.imread(path, plugin="FFMPEG")
        if len(video) != job["frames"]:
            raise ValueError(f"it has {len(video)} of {job['frames']} frames")
        return video
    except Exception as error:  # imageio and ffmpeg each raise errors of their own
        raise BadInput(f"{path}: not a readable video ({one_line(error)}); "
                       f"delete it and sample it again") from None


def report(rows, out):
    """Prints a line of means and standard errors per folder, and writes evaluation.json."""
    print("| | videos | " + " | ".join(METRICS) + " |\n" + "|---" * (2 + len(METRICS)) + "|")
    for folder, own_rows in itertools.groupby(rows, key=lambda row: row["folder"]):
        own_rows, cells = list(own_rows), []
        for metric in METRICS:
            values = [row[metric] for row in own_rows if row[metric] is not None]
            cell = "–"
            if values:
                cell = f"{np.mean(values):.3f} ± {np.std(values) / len(values) ** 0.5:.3f}"
            cells.append(cell)
        print(f"| {folder} | {len(own_rows)} | " + " | ".join(cells) + " |")
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps({"videos": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out / 'evaluation.json'}")


def parse_args():
    p = FlagParser(description="CLIP-T, CLIP-I, DINO-I, temporal consistency and motion of sampled videos.")
    p.add_argument("--videos", type=Path, nargs="+", required=True,
                   help="folders that sample.py wrote into; each is a line of the table")
    p.add_argument("--images", type=Path, required=True, help="folder with the subject's photos")
    p.add_argument("--clip", type=Path, help="safetensors of OpenAI's ViT-B/32 (default: from the hub)")
    p.add_argument("--dino", type=Path, help="safetensors of DINO's ViT-S/16 (default: from the hub)")
    p.add_argument("--out", type=Path, help="folder for evaluation.json (default: the first of --videos)")
    args = p.parse_args()
    check_ffmpeg("--videos", "or evaluate on another machine")
    args.out = args.out or args.videos[0]
    check_out(args.out)
    return args


if __name__ == "__main__":
    run_script(main)
