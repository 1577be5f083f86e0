"""The paper's metrics: CLIP-T, CLIP-I, DINO-I and temporal consistency; and motion, which none of them sees.

    python paper/evaluate.py --videos outputs/x --images photos/dog           # towers from the hub
    python paper/evaluate.py --videos outputs/x --images photos/dog --clip open_clip_model.safetensors \\
                             --dino model.safetensors
    torchrun --nproc_per_node 4 paper/evaluate.py --videos outputs/x outputs/y --images photos/dog

Reads the videos that sample.py wrote, and each video's prompt from the JSON beside it. The numbers follow
DreamVideo's published protocol: features are L2-normalised; all frames count; a video's number is the mean
over its frames or its (photo, frame) pairs; a folder's number is the plain mean over its videos. Clips of
the base alone (`sample.py --subject none`) with the same prompt and seed show the motion that a subject's
video should keep. They lie in the same folders or in --base_videos. Prints a line per folder; writes
evaluation.json and evaluation.csv, a row per video.

Shapes: T frames, N photos, D features; videos (T, H, W, 3) uint8.
"""
import csv
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import (BadInput, FlagParser, Progress, check_out, check_regular, complete_or_absent, join_processes,
                 one_line, printable, read_json, run_script, this_process, warn)
import numpy as np
import open_clip
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from data import load_photos
from files import check_tensors, check_values, from_hub, is_plain_state
from texts import without_placeholders
from video import read_video

METRICS = ("CLIP-T", "CLIP-I", "DINO-I", "T.Cons", "motion", "motion of base")


def main():
    args = parse_args()
    process = this_process()
    join_processes(process, "gloo")
    videos = find_videos(args.videos)
    base_videos = find_videos(args.base_videos) if args.base_videos else []
    photos = [photo.image for photo in load_photos(args.images, 10**6)]
    clip, dino = load_clip(args.clip, process.device), load_dino(args.dino, process.device)

    # The photos' features once, then every video against them.
    clip_photos, dino_photos = clip.images(photos), dino.images(photos)                     # (N, D) each
    rows, base_rows = [], []
    mine = videos[process.rank::process.world]
    for path, facts in Progress(mine, desc="evaluate", unit="video", disable=process.rank > 0):
        video, row = read_video(path, facts.get("frames")), describe(path, facts)           # (T, H, W, 3)
        frames = [Image.fromarray(frame) for frame in video]
        clip_frames, dino_frames = clip.images(frames), dino.images(frames)                 # (T, D) each
        row["CLIP-T"] = cosines(clip.text(row["text"]), clip_frames)
        row["CLIP-I"] = cosines(clip_photos, clip_frames)
        row["DINO-I"] = cosines(dino_photos, dino_frames)
        row["T.Cons"] = consistency(clip_frames)
        row["motion"] = motion(video)
        rows.append(row)
    for path, facts in base_videos[process.rank::process.world]:
        base_rows.append({**describe(path, facts), "motion": motion(read_video(path, facts.get("frames")))})

    # What all processes found becomes one table.
    rows, base_rows = of_all_processes(rows, process), of_all_processes(base_rows, process)
    if process.rank == 0:
        base_motion(rows, rows + base_rows)
        report(rows, args.out or args.videos[0])


def of_all_processes(rows, process):
    """This process's rows -> those of all processes, in the order of folders and videos."""
    found = [rows]
    if process.world > 1:
        found = [None] * process.world
        dist.all_gather_object(found, rows)
    together = []
    for part in found:
        together += part
    return sorted(together, key=lambda row: (row["folder"], row["video"]))


def describe(path, facts):
    """What identifies a video in the table. Its text has no V*, which neither CLIP nor the base can read."""
    text = without_placeholders(facts["prompt"], [subject["placeholder"] for subject in facts["subjects"]])
    return {"folder": str(path.parent), "video": path.name, "text": text, "seed": facts["seed"],
            "subjects": " ".join(subject["class_word"] for subject in facts["subjects"])}


# ------------------------------------------------------------------------------------------------------------
# The metrics. Features are L2-normalised, so a product of two is a cosine.


def cosines(a, b):
    """a (N, D), b (T, D) -> mean cosine of all N x T pairs: CLIP-T of a text, CLIP-I and DINO-I of photos."""
    return (a @ b.T).mean().item()


def consistency(frames):
    """Features of frames (T, D) -> T.Cons, the mean cosine of neighbours: 1 if frozen, None if T = 1."""
    return (frames[1:] * frames[:-1]).sum(dim=1).mean().item() if len(frames) > 1 else None


def motion(video, width=128, block=16, reach=8, explained=0.5, visible=2.0):
    """How far things move between frames: (T, H, W, 3) uint8 -> mean over blocks, in percent of the
    picture's width.

    Each block of 16 pixels (of a picture at most 128 wide) is looked for in the next frame, up to 8 pixels
    away, and compared up to brightness and contrast. A displacement counts only if it more than halves the
    block's residual. So noise that is drawn anew for each frame, flicker, and changes below 2 grey levels
    count as no motion.
    """
    if len(video) < 2:
        return None
    width = max(block, min(width, video.shape[2]) // block * block)
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
    counts = (least < explained * residuals[0]) & (residuals[0] > visible ** 2)
    return (length * counts).mean().item() / width * 100


# ------------------------------------------------------------------------------------------------------------
# The towers


class Tower(torch.nn.Module):
    """A frozen image model (for CLIP, with its text model) in float32, whose features are L2-normalised."""

    def __init__(self, model, encode, resize, mean, std, tokenizer=None):
        super().__init__()
        self.model, self.encode, self.tokenizer = model.eval().requires_grad_(False), encode, tokenizer
        self.transform = transforms.Compose([
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
            transforms.ToTensor(), transforms.Normalize(mean, std)])

    @torch.no_grad()
    def images(self, pictures, batch=16):
        """List of N RGB pictures of any size -> (N, D)."""
        device = next(self.model.parameters()).device
        features = []
        for i in range(0, len(pictures), batch):
            x = torch.stack([self.transform(picture) for picture in pictures[i:i + batch]])
            features.append(self.encode(self.model, x.to(device)))
        return F.normalize(torch.cat(features).float().cpu(), dim=1)

    @torch.no_grad()
    def text(self, text):
        """A text -> (1, D)."""
        tokens = self.tokenizer([text]).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(tokens).float().cpu(), dim=1)


def load_clip(path, device):
    """OpenAI's ViT-B/32, with QuickGELU: `ViT-B-32` takes the same weights, and scores wrongly."""
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    repository = "timm/vit_base_patch32_clip_224.openai"
    load_weights(model, path, "--clip", repository, "open_clip_model.safetensors")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    return Tower(model, lambda model, x: model.encode_image(x), 224, mean, std, tokenizer).to(device)


def load_dino(path, device):
    """DINO's ViT-S/16, the class token after the norm; resize 256 and crop 224, as its authors do."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    load_weights(model, path, "--dino", "timm/vit_small_patch16_224.dino", "model.safetensors")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Tower(model, lambda model, x: model(x), 256, mean, std).to(device)


def load_weights(model, path, flag, repository, file):
    """A local file, else the hub's, into `model`, strictly. Raises BadInput. Nothing in the file is run."""
    path = path or from_hub(repository, file, flag, f"name it with {flag} PATH")
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not is_plain_state(state):
            raise ValueError("it is no dictionary of plain tensors")
    except Exception as error:  # pickle, zip, TorchScript, safetensors and the disk each raise their own
        raise BadInput(f"{flag} {path}: not readable as plain weights ({one_line(error)}); "
                       f"{file} of {repository} is") from None
    check_tensors(f"{flag} {path}", state, model.state_dict())
    check_values(f"{flag} {path}", state)
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------
# Files and tables


def find_videos(folders):
    """Folders -> list of (video file, the facts that sample.py wrote beside it). Raises BadInput if none."""
    found = []
    once = {folder.resolve(): folder for folder in reversed(folders)}  # where a folder is given twice
    for folder in reversed(once.values()):
        if not folder.is_dir():
            raise BadInput(f"--videos {folder}: no such folder; name one that sample.py wrote into")
        for path in sorted(folder.glob("*.json")):
            try:
                facts = read_json(path)
                describe(path, facts)
                if type(facts["seed"]) is not int or type(facts.get("frames", 0)) is not int:
                    continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # no video of ours, such as evaluation.json
            if facts.get("compare"):
                warn(f"{path}: shows several videos side by side (--compare); left out")
                continue
            for video in (path.with_suffix(".mp4"), path.with_suffix(".gif")):
                if video.exists():
                    found.append((video, facts))
                    break
    if not found:
        raise BadInput(f"--videos {' '.join(map(str, folders))}: no video with its JSON is there; "
                       f"sample.py writes both")
    return found


def base_motion(rows, base_rows):
    """Writes into each row the motion of the base with the same text and seed, or None."""
    known = {(row["text"], row["seed"]): row["motion"] for row in base_rows if not row["subjects"]}
    for row in rows:
        row["motion of base"] = known.get((row["text"], row["seed"]))


def report(rows, out):
    """Prints a line per folder, means with standard errors; writes evaluation.json and evaluation.csv."""
    table, counts = {row["folder"]: {} for row in rows}, Counter(row["folder"] for row in rows)
    for row in rows:
        for metric in METRICS:
            if row[metric] is not None and not np.isfinite(row[metric]):
                warn(f"{row['folder']}: {metric} of {row['video']} is not finite; left out")
                row[metric] = None
            if row[metric] is not None:
                table[row["folder"]].setdefault(metric, []).append(row[metric])
    lines = {}
    for folder, values in table.items():
        lines[folder] = {metric: (float(np.mean(x)), float(np.std(x) / len(x) ** 0.5), len(x))
                         for metric, x in values.items()}
    print("| | videos | " + " | ".join(METRICS) + " |\n" + "|---" * (2 + len(METRICS)) + "|")
    for folder, line in lines.items():
        cells = [f"{line[m][0]:.3f} ± {line[m][1]:.3f}" if m in line else "–" for m in METRICS]
        print(f"| {printable(folder)} | {counts[folder]} | " + " | ".join(cells) + " |")
    with complete_or_absent(out / "evaluation.json") as temporary:
        report = {"folders": lines, "videos": rows}
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with complete_or_absent(out / "evaluation.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"wrote {out / 'evaluation.json'} {out / 'evaluation.csv'}")


def parse_args():
    p = FlagParser(description="CLIP-T, CLIP-I, DINO-I, temporal consistency and motion of sampled videos.")
    p.add_argument("--videos", type=Path, nargs="+", required=True,
                   help="folders that sample.py wrote into; a line of the table each")
    p.add_argument("--images", type=Path, required=True, help="folder with the subject's photos")
    p.add_argument("--base_videos", type=Path, nargs="+", default=[],
                   help="folders with clips of the base (sample.py --subject none), same prompts and seeds")
    p.add_argument("--clip", type=Path,
                   help="weights of OpenAI's ViT-B/32 as open_clip names them (default: from the hub)")
    p.add_argument("--dino", type=Path,
                   help="weights of DINO's ViT-S/16 as timm names them (default: from the hub)")
    p.add_argument("--out", type=Path,
                   help="folder for evaluation.json and .csv (default: the first of --videos)")
    args = p.parse_args()
    if args.out:
        check_out(args.out)
    return args


if __name__ == "__main__":
    run_script(main)
